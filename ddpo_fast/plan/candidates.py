"""Chooses the fastest settings whose predicted peak fits a GPU.

What is tried, in this order:
1. The settings as they are, with UNet calls of `SMALL_CALL_ROWS` rows, which may be enlarged at the end. Calls of fewer
   rows leave a GPU idle for much of the time, so all savings are tried before those.
2. The savings of `SAVINGS`, one more at a time and the fastest first, until the peak fits. One that does not make a
   phase smaller that is too large is skipped.
3. If all of them together are not enough: the same again with UNet calls of one pair.

Of what has been added, each setting that turns out not to be needed is taken back, the slowest first: a later one may
have made an earlier one superfluous. What memory is left then goes to larger UNet calls.
"""

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
from ddpo_fast.plan.phases import EVALUATED_IMAGES, Plan, merged_batches, pairs_per_call, predict

# share of the GPU's memory that is left over: for the allocator's fragments, and for what the prediction does not see
MARGIN = 0.05
# rows of a UNet call below which every saving is preferred to a smaller call
SMALL_CALL_ROWS = 8
# (setting, value) pairs that save memory, the fastest first
SAVINGS: tuple[tuple[str, Any], ...] = (
    # computes norms and activation functions again, which is little work
    ("gradient_checkpointing", "selective"),
    # states of a quarter of the size, at no cost in time
    ("train_use_8bit_adam", True),
    # computes the whole forward pass again, which is about a third more work
    ("gradient_checkpointing", "blocks"),
    # costs precision of the gradients' sums: tried only after what costs nothing but time
    ("train_gradient_dtype", "half"),
    # these two slow down decoding only, but tiles also change the images a little where they overlap
    ("vae_slicing", True),
    ("vae_tiling", True),
    # the frozen networks cross the bus each time that they compute
    ("offload_frozen", True),
    # every gradient and every weight crosses the bus at each update, and the CPU computes it
    ("offload", "optimizer"),
)
# settings of how large UNet calls are, in training and in sampling
CALL_SIZES = ("train_micro_batch_size", "sample_merge_batches")
DEFAULTS = {option.name: option.default for option in fields(DDPOConfig)}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Settings to change, the plan that they lead to, and why each is needed, a line each."""

    settings: Settings
    plan: Plan
    reasons: list[str]


def choose(
    footprint: Footprint,
    config: DDPOConfig,
    capacity: float,
    num_processes: int = 1,
    evaluated_images: int = EVALUATED_IMAGES,
) -> Choice:
    """The fastest settings for a GPU of `capacity` bytes, of which the share `MARGIN` stays free.

    Settings of `config` that are not at their defaults are the user's and stay as they are. Raises `ValueError` where
    even all savings together do not fit.
    """
    return _Search(footprint, config, capacity, num_processes, evaluated_images).run()


class _Search:
    def __init__(
        self, footprint: Footprint, config: DDPOConfig, capacity: float, num_processes: int, evaluated_images: int
    ) -> None:
        self.footprint, self.config = footprint, config
        self.num_processes, self.evaluated_images = num_processes, evaluated_images
        self.capacity = capacity
        # what a plan's peak must not exceed
        self.limit = capacity * (1 - MARGIN)
        self.savings = [(name, value) for name, value in SAVINGS if self._is_free(name)]
        if importlib.util.find_spec("bitsandbytes") is None:
            self.savings = [saving for saving in self.savings if saving[0] != "train_use_8bit_adam"]
        small_call_pairs = max(1, SMALL_CALL_ROWS // config.rows_per_pair)
        self.small_call_pairs = min(small_call_pairs, pairs_per_call(config))

    def run(self) -> Choice:
        smallest: Settings = {}
        for pairs in dict.fromkeys((self.small_call_pairs, 1)):
            smallest = self._call_sizes(pairs, 1)
            settings: Settings = {}
            for saving in (None, *self.savings):
                if saving is not None:
                    name, value = saving
                    # a second value of the same setting replaces the first
                    with_saving = {**settings, name: value}
                    if not self._helps({**settings, **smallest}, {**with_saving, **smallest}):
                        continue
                    settings = with_saving
                if self._fits({**settings, **smallest}):
                    needed = self._without_superfluous(settings, smallest)
                    return self._explained(self._with_largest_calls(needed, pairs))
        # all savings that help, with the smallest calls, and it does not fit
        least = self._plan({**settings, **smallest})
        needs = least.peak / (1 - MARGIN) / GB
        raise ValueError(
            f"training {'all weights' if self.footprint.adapter is None else 'a LoRA'} needs at least {needs:.1f} GB "
            f"of GPU memory (while {least.peak_phase}), and there are {self.capacity / GB:g}: take a GPU with more"
            f"{', or train a LoRA' if self.footprint.adapter is None else ''}"
        )

    # what can be tried

    def _is_free(self, name: str) -> bool:
        """Whether the user has left a setting at its default."""
        return getattr(self.config, name) == DEFAULTS[name]

    def _call_sizes(self, pairs: int, merged: int) -> Settings:
        """Settings for UNet calls of so many pairs in training, and of so many sampling batches."""
        return {name: n for name, n in zip(CALL_SIZES, (pairs, merged), strict=True) if self._is_free(name)}

    def _faster_values(self, name: str, value: Any) -> Iterator[Any]:
        """The other values that a setting may have in place of a saving's, the fastest first."""
        yield DEFAULTS[name]
        yield from (other for saved, other in SAVINGS[: SAVINGS.index((name, value))] if saved == name)

    # what it leads to

    def _plan(self, settings: Settings) -> Plan:
        config = with_settings(self.config, settings)
        return predict(self.footprint, config, self.num_processes, self.evaluated_images)

    def _fits(self, settings: Settings) -> bool:
        return self._plan(settings).peak <= self.limit

    def _helps(self, before: Settings, after: Settings) -> bool:
        """Whether a phase that is too large gets smaller, by at least 0.5 %: less is no reason to give up time."""
        old, new = self._plan(before).totals, self._plan(after).totals
        return any(size > self.limit and new[phase] < 0.995 * size for phase, size in old.items())

    # from settings that fit to the choice

    def _without_superfluous(self, settings: Settings, smallest: Settings) -> Settings:
        """The settings of these that are needed to fit, looking at the slowest first."""
        for name in list(reversed(settings)):
            for value in self._faster_values(name, settings[name]):
                faster = {**settings, name: value}
                if self._fits({**faster, **smallest}):
                    settings = faster
                    break
        return {name: value for name, value in settings.items() if value != DEFAULTS[name]}

    def _with_largest_calls(self, settings: Settings, pairs: int) -> Settings:
        """Adds the largest UNet calls that fit: sizes are doubled as often as they fit, up to all that there is.

        Training's come first: a pair there takes a forward and a backward pass, a step of sampling a forward pass only.
        """
        merged = 1
        for doubled in _doubled(pairs, pairs_per_call(self.config)):
            if self._fits({**settings, **self._call_sizes(doubled, merged)}):
                pairs = doubled
        for doubled in _doubled(1, merged_batches(self.config)):
            if self._fits({**settings, **self._call_sizes(pairs, doubled)}):
                merged = doubled
        # as many calls of equal size instead of a small one at the end
        return {**self._call_sizes(equal_parts(self.config.pairs_per_update, pairs), merged), **settings}

    def _explained(self, settings: Settings) -> Choice:
        return Choice(settings, self._plan(settings), [self._reason(name, settings) for name in settings])

    def _reason(self, name: str, settings: Settings) -> str:
        """What would happen without a setting, or with twice its size."""
        value = settings[name]
        if name in CALL_SIZES:
            most_of = {"train_micro_batch_size": pairs_per_call, "sample_merge_batches": merged_batches}
            most = most_of[name](self.config)
            if value >= most:
                return f"{name}={value}: more gains nothing"
            more = min(2 * value, most)
            plan, instead = self._plan({**settings, name: more}), f"{more} of them"
        else:
            plan = self._plan({other: v for other, v in settings.items() if other != name})
            instead = "without it"
        return f"{name}={value}: {instead} would take {plan.peak / GB:.2f} GB while {plan.peak_phase}"


def _doubled(start: int, most: int) -> Iterator[int]:
    size = start
    while size < most:
        size = min(2 * size, most)
        yield size


def with_settings(config: DDPOConfig, settings: Settings) -> DDPOConfig:
    """A copy with other settings, unchecked: a plan may be for a machine with packages that are missing here."""
    changed = copy.copy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
