"""Chooses the fastest settings whose predicted peak fits a GPU."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from ddpo_fast.batch_sizes import equal_parts
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import GB
from ddpo_fast.plan.footprint import Footprint
from ddpo_fast.plan.phases import SHOWN_IMAGES, Plan, merged_batches_of, pairs_of, predict

# of the capacity: fragments of the allocator, and what the prediction does not see
MARGIN = 0.05
# with fewer rows in a UNet call everything else is tried first
FEW_ROWS = 8
# what saves memory, the fastest first
LEVERS: tuple[tuple[str, Any], ...] = (
    ("gradient_checkpointing", "selective"),
    # costs no time, where computing blocks again is a third more work
    ("train_use_8bit_adam", True),
    ("gradient_checkpointing", "blocks"),
    ("train_gradient_dtype", "half"),
    ("vae_slicing", True),
    ("vae_tiling", True),
    ("offload_frozen", True),
    ("offload", "optimizer"),
)
SIZES = ("train_micro_batch_size", "sample_merge_batches")
DEFAULTS = {option.name: option.default for option in fields(DDPOConfig)}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Settings to change, what they lead to, and why each is needed, a line each."""

    settings: Settings
    plan: Plan
    reasons: list[str]


def choose(
    footprint: Footprint,
    config: DDPOConfig,
    capacity: float,
    num_processes: int = 1,
    shown_images: int = SHOWN_IMAGES,
) -> Choice:
    """The fastest settings for a GPU of `capacity` bytes, of which `MARGIN` is left.

    Settings that are not at their defaults stay as they are. Large UNet calls come first, then what LEVERS says, then
    small UNet calls. Raises `ValueError` where the least that is known does not fit.
    """
    return _Search(footprint, config, capacity * (1 - MARGIN), num_processes, shown_images).found()


class _Search:
    def __init__(
        self, footprint: Footprint, config: DDPOConfig, limit: float, num_processes: int, shown_images: int
    ) -> None:
        self.footprint, self.config, self.limit = footprint, config, limit
        self.num_processes, self.shown_images = num_processes, shown_images
        self.levers = [(name, value) for name, value in LEVERS if self._is_free(name)]
        if importlib.util.find_spec("bitsandbytes") is None:
            self.levers = [lever for lever in self.levers if lever[0] != "train_use_8bit_adam"]
        few = max(1, FEW_ROWS // (2 if config.guides_training else 1))
        self.few_pairs = min(few, pairs_of(config))

    def _is_free(self, name: str) -> bool:
        return getattr(self.config, name) == DEFAULTS[name]

    def found(self) -> Choice:
        small: Settings = {}
        for pairs in dict.fromkeys((self.few_pairs, 1)):
            small = self._sizes(pairs, 1)
            settings: Settings = {}
            for lever in (None, *self.levers):
                if lever is not None:
                    changed = {**settings, lever[0]: lever[1]}
                    if not self._helps({**settings, **small}, {**changed, **small}):
                        continue
                    settings = changed
                if self._fits({**settings, **small}):
                    return self._choice(self._largest(self._needed(settings, small), pairs))
        least = self._plan({**settings, **small})
        needs = least.peak / self.limit * self._capacity / GB
        raise ValueError(
            f"training {'all weights' if self.footprint.adapter is None else 'a LoRA'} needs at least {needs:.1f} GB "
            f"of GPU memory (while {least.peak_phase}), and there are {self._capacity / GB:g}: take a GPU with more"
            f"{', or train a LoRA' if self.footprint.adapter is None else ''}"
        )

    @property
    def _capacity(self) -> float:
        return self.limit / (1 - MARGIN)

    def _plan(self, settings: Settings) -> Plan:
        return predict(self.footprint, with_settings(self.config, settings), self.num_processes, self.shown_images)

    def _fits(self, settings: Settings) -> bool:
        return self._plan(settings).peak <= self.limit

    def _helps(self, before: Settings, after: Settings) -> bool:
        """Whether a phase that is too large gets smaller, by more than it would by chance."""
        old, new = self._plan(before).totals, self._plan(after).totals
        return any(size > self.limit and new[phase] < 0.995 * size for phase, size in old.items())

    def _needed(self, settings: Settings, small: Settings) -> Settings:
        """Without what later settings have made superfluous, the slowest first."""
        for name in list(reversed(settings)):
            for value in self._weaker(name, settings[name]):
                lighter = {**settings, name: value}
                if self._fits({**lighter, **small}):
                    settings = lighter
                    break
        return {name: value for name, value in settings.items() if value != DEFAULTS[name]}

    def _weaker(self, name: str, value: Any) -> Iterator[Any]:
        """What else a setting may be, the fastest first."""
        yield DEFAULTS[name]
        yield from (other for lever, other in LEVERS[: LEVERS.index((name, value))] if lever == name)

    def _sizes(self, pairs: int, merged: int) -> Settings:
        return {name: n for name, n in zip(SIZES, (pairs, merged), strict=True) if self._is_free(name)}

    def _largest(self, settings: Settings, pairs: int) -> Settings:
        """With the largest UNet calls that fit: so many pairs, doubled as often as it goes, or all that there is."""
        merged = 1
        for doubled in _doubled(pairs, pairs_of(self.config)):
            if self._fits({**settings, **self._sizes(doubled, merged)}):
                pairs = doubled
        for doubled in _doubled(1, merged_batches_of(self.config)):
            if self._fits({**settings, **self._sizes(pairs, doubled)}):
                merged = doubled
        return {**self._sizes(equal_parts(self.config.pairs_per_update, pairs), merged), **settings}

    def _choice(self, settings: Settings) -> Choice:
        plan = self._plan(settings)
        return Choice(settings, plan, [self._reason(name, settings) for name in settings])

    def _reason(self, name: str, settings: Settings) -> str:
        value = settings[name]
        if name in SIZES:
            whole = {"train_micro_batch_size": pairs_of, "sample_merge_batches": merged_batches_of}[name](self.config)
            if value >= whole:
                return f"{name}={value}: more gains nothing"
            more = self._plan({**settings, name: min(2 * value, whole)})
        else:
            value = repr(value) if isinstance(value, bool) else value
            more = self._plan({other: v for other, v in settings.items() if other != name})
        instead = f"{min(2 * settings[name], whole)} of them" if name in SIZES else "without it"
        return f"{name}={value}: {instead} would take {more.peak / GB:.2f} GB while {more.peak_phase}"


def _doubled(start: int, most: int) -> Iterator[int]:
    size = start
    while size < most:
        size = min(2 * size, most)
        yield size


def with_settings(config: DDPOConfig, settings: Settings) -> DDPOConfig:
    """A copy with other settings, unchecked: a plan may be for a machine that has packages which this one has not."""
    changed = copy.copy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
