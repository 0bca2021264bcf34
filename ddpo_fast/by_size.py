"""State that is kept apart for each size of images, as rewards of images of different sizes cannot be compared.

A JPEG's kilobytes, for example, grow with the number of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

S = TypeVar("S")

SIZES = "sizes"


class BySize(Generic[S]):
    """States of which one is in use, that of the present size; a run of one size has one, under the name ''.

    Args:
        make: a new state, for a size that is used for the first time.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._size = ""
        self._states = {"": make()}

    @property
    def now(self) -> S:
        """The state of the present size."""
        return self._states[self._size]

    @property
    def all(self) -> list[S]:
        return list(self._states.values())

    def use(self, size: str) -> None:
        """Makes `size` the present one."""
        if size not in self._states:
            self._states[size] = self._make()
        self._size = size

    def packed(self, pack: Callable[[S], dict[str, Any]]) -> dict[str, Any]:
        """All states as a checkpoint keeps them: `pack(state)` of the only one, else each with the name of its size."""
        if self._states.keys() == {""}:
            return pack(self.now)
        return {SIZES: [[size, pack(state)] for size, state in self._states.items() if size]}

    def unpack(self, packed: dict[str, Any], unpack: Callable[[dict[str, Any]], S]) -> None:
        """Takes what `packed` made; the present size stays, and has a new state if it is not among those."""
        of_sizes = packed.get(SIZES)
        # the state of a run of one size may have a key of this name too, a prompt for instance, but no pairs under it
        has_pairs = isinstance(of_sizes, list) and all(isinstance(pair, list) for pair in of_sizes)
        states: list[Any] = of_sizes if has_pairs and of_sizes else [["", packed]]
        self._states = {size: unpack(state) for size, state in states}
        self.use(self._size)
