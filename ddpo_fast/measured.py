"""What a run measured rather than was told: kept with it, so that a resumed one computes alike, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", int, float, str)


class Measured(dict[str, int | float | str]):
    """Plain values by name, each measured once in the life of a run: sizes from free memory, the fastest kernel.

    A checkpoint and `config.json` keep them; the run that is resumed starts with them.
    """

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """The value under `name`; `measure()`, on which all processes must agree, if there is none yet."""
        if name not in self:
            self[name] = measure()
        return self[name]  # type: ignore[return-value]
