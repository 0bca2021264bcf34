"""Chooses the fastest settings whose predicted peak fits a GPU.

The search tries, in this order:
1. The given settings, with UNet calls of `SMALL_CALL_ROWS` rows. Calls of fewer rows leave a GPU idle for much of the
   time, so all savings are tried before smaller calls are.
2. The settings in `SAVINGS`, added one by one, the fastest first, until the peak fits. A setting is skipped if it does
   not reduce a phase that is too large.
3. If all savings together are not enough: steps 1 and 2 again with UNet calls of one pair.

A later saving may have made an earlier one superfluous, so each added setting that is not needed to fit is then taken
back, the slowest first. Memory that is left goes to larger UNet calls.
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
from ddpo_fast.families import unchecked_with_family
from ddpo_fast.plan.footprint import Footprint
from ddpo_fast.plan.phases import EVALUATED_IMAGES, Plan, least_bytes, merged_batches, pairs_per_call, predict

# share of the GPU's memory that stays free, for fragmentation and for allocations that the prediction does not count
MARGIN = 0.05
# rows of a UNet call below which every saving is preferred to a smaller call
SMALL_CALL_ROWS = 8
# (setting, value) pairs that save memory, the fastest first
SAVINGS: tuple[tuple[str, Any], ...] = (
    # computes norms and activation functions again, which is little work
    ("gradient_checkpointing", "selective"),
    # states of a quarter of the size; the step takes no longer
    ("train_use_8bit_adam", True),
    # computes the whole forward pass again, which is about a third more work
    ("gradient_checkpointing", "blocks"),
    # makes the sums of gradients less precise, so it comes after the settings that cost only time
    ("train_gradient_dtype", "half"),
    # these two slow down decoding only, but tiles also change the images a little where they overlap
    ("vae_slicing", True),
    ("vae_tiling", True),
    # copies the text encoders to the GPU for new prompts only
    ("embed_prompts_once", True),
    # copies the weights of the frozen networks to the GPU each time that they compute
    ("offload_frozen", True),
    # copies every gradient to the host and every weight back at each update, and the CPU computes the update
    ("offload", "optimizer"),
)
# the settings for the size of UNet calls, in training and in sampling
CALL_SIZES = ("train_micro_batch_size", "sample_merge_batches")
DEFAULTS = {option.name: option.default for option in fields(DDPOConfig)}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Settings to change, the plan with these settings, and for each setting a line that says why it is needed."""

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

    Settings of `config` that differ from their defaults were set by the user and are not changed. Raises `ValueError`
    if the run does not fit even with all savings.
    """
    return _Search(footprint, config, capacity, num_processes, evaluated_images).run()


class _Search:
    def __init__(
        self, footprint: Footprint, config: DDPOConfig, capacity: float, num_processes: int, evaluated_images: int
    ) -> None:
        self.footprint, self.config = footprint, unchecked_with_family(config, footprint.configs.family)
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
        # what needs no trace of the networks first: large ones take half a minute
        everything = with_settings(self.config, dict(self.savings))
        if (least_of_all := least_bytes(self.footprint, everything, self.num_processes)) > self.limit:
            raise self._too_small(least_of_all, "for weights, gradients and the optimizer's states alone")
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
        # the run does not fit even with all helpful savings and the smallest UNet calls
        least = self._plan({**settings, **smallest})
        raise self._too_small(least.peak, f"(while {least.peak_phase})")

    def _too_small(self, peak: int, where: str) -> ValueError:
        remedy = "train a LoRA"
        if self.footprint.adapter is not None:
            remedy = "try --quantize_frozen 8bit or 4bit, which changes what the networks compute a little"
        known = self.footprint.adapter is not None and self.footprint.quantized == "4bit"
        return ValueError(
            f"training {'all weights' if self.footprint.adapter is None else 'a LoRA'} needs at least "
            f"{peak / (1 - MARGIN) / GB:.1f} GB of GPU memory {where}, and there are {self.capacity / GB:g}: take a "
            f"GPU with more{'' if known else f', or {remedy}'}"
        )

    # what can be tried

    def _is_free(self, name: str) -> bool:
        """Whether the user has left a setting at its default."""
        return getattr(self.config, name) == DEFAULTS[name]

    def _call_sizes(self, pairs: int, merged: int) -> Settings:
        """Settings for UNet calls of `pairs` pairs in training and `merged` batches in sampling, unless the user's."""
        return {name: n for name, n in zip(CALL_SIZES, (pairs, merged), strict=True) if self._is_free(name)}

    def _faster_values(self, name: str, value: Any) -> Iterator[Any]:
        """The values of the setting `name` that are faster than `value`, the fastest first."""
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
        """Replaces each setting by its fastest value that still fits, the slowest setting first; drops defaults."""
        for name in list(reversed(settings)):
            for value in self._faster_values(name, settings[name]):
                faster = {**settings, name: value}
                if self._fits({**faster, **smallest}):
                    settings = faster
                    break
        return {name: value for name, value in settings.items() if value != DEFAULTS[name]}

    def _with_largest_calls(self, settings: Settings, pairs: int) -> Settings:
        """Adds the largest UNet calls that fit: sizes are doubled as long as they fit and there is enough work.

        Training comes first, because it takes a forward and a backward pass for each pair, and sampling only a forward
        pass.
        """
        merged = 1
        for doubled in _doubled(pairs, pairs_per_call(self.config)):
            if self._fits({**settings, **self._call_sizes(doubled, merged)}):
                pairs = doubled
        for doubled in _doubled(1, merged_batches(self.config)):
            if self._fits({**settings, **self._call_sizes(pairs, doubled)}):
                merged = doubled
        # the same number of calls, but of equal size, instead of a small call at the end
        return {**self._call_sizes(equal_parts(self.config.pairs_per_update, pairs), merged), **settings}

    def _explained(self, settings: Settings) -> Choice:
        return Choice(settings, self._plan(settings), [self._reason(name, settings) for name in settings])

    def _reason(self, name: str, settings: Settings) -> str:
        """The predicted peak without a saving, or with twice the size of UNet calls."""
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
    """A copy with other settings, which are not checked: the plan may be for a machine that has other packages."""
    changed = copy.copy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
