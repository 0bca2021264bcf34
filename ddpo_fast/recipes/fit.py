"""A recipe's settings beside a user's own: where the two do not fit together, the recipe's give way."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from ddpo_fast.config import DDPOConfig

DEFAULTS = {f.name: f.default for f in fields(DDPOConfig)}
# images of a sampling batch, sampling batches of an epoch, images of a training batch, training batches of an update
BATCH_SIZES = (
    "sample_batch_size",
    "sample_num_batches_per_epoch",
    "train_batch_size",
    "train_gradient_accumulation_steps",
)
# A number and its unit: a user's own number is in the unit that `--help` calls the default, TRL's.
UNITS = (("train_clip_range", "train_clip_unit"),)


def fit(settings: Mapping[str, Any], options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings of a recipe that apply beside the options that a user gave.

    These rules, in this order:

    1. A setting that the user gave does not apply, nor does the other one of a number and its unit (`UNITS`), if the
       user's value is not the recipe's.
    2. Beside a batch size that the user gave, the recipe's other batch sizes change, so that an epoch and an update
       have as many images as the recipe says, or as nearly as the sizes divide each other (`_batch_sizes`).
    3. Beside a number of denoising steps that the user gave, the recipe's length of updates changes (`target_for`).
    4. A setting with which `DDPOConfig` would refuse the user's options does not apply.

    Options that are wrong by themselves are not refused here but by the `DDPOConfig` that is then made of them.

    Args:
        settings: the recipe's fields of `DDPOConfig`.
        options: all values that the run would have without the recipe; fields that are not in it have their defaults.
        given: the names of those that the user gave.
    """
    wanted = {name: value for name, value in settings.items() if name not in given}
    for pair in UNITS:
        for own, other in (pair, pair[::-1]):
            if own in given and options[own] != settings.get(own):
                wanted.pop(other, None)
    own_sizes = {name: options[name] for name in BATCH_SIZES if name in given}
    if own_sizes and any(name in settings for name in BATCH_SIZES):
        # first, as other settings may depend on them
        wanted = _batch_sizes(settings, own_sizes) | {k: v for k, v in wanted.items() if k not in BATCH_SIZES}
    if "sample_num_steps" in given and "train_target_update" in wanted:
        wanted |= target_for(settings, options["sample_num_steps"])

    base = {name: value for name, value in options.items() if name in DEFAULTS}
    if _is_allowed({**base, **wanted}):
        return wanted
    # Every setting is tried alone, but for batch sizes, which only fit each other together. One that is refused may be
    # allowed beside those that are kept later, so that it is tried again.
    parts = [{k: v for k, v in wanted.items() if k in BATCH_SIZES}]
    parts += [{k: v} for k, v in wanted.items() if k not in BATCH_SIZES]
    kept: dict[str, Any] = {}
    found_one = True
    while found_one:
        found_one = False
        for part in parts:
            if not part.keys() <= kept.keys() and _is_allowed({**base, **kept, **part}):
                kept |= part
                found_one = True
    return kept


def target_for(settings: Mapping[str, Any], steps: Any) -> dict[str, float]:
    """A recipe's `train_target_update` for another number of denoising steps than its own, if it has a target.

    The target is a shift of the mean of each step in standard deviations of the step. Of n steps with a variance of
    1 / n of an image's noise, shifts by d of each, in one direction, move the image by d sqrt(n) standard deviations of
    that noise. So d is in proportion to 1 / sqrt(n), for updates that move images as far as the recipe's.
    """
    target, own = settings.get("train_target_update"), settings.get("sample_num_steps", DEFAULTS["sample_num_steps"])
    # what is no whole number above 0 `DDPOConfig` refuses by its name
    if not target or not isinstance(steps, int) or steps < 1 or steps == own:
        return {}
    return {"train_target_update": float(f"{target * math.sqrt(own / steps):.3g}")}


def _batch_sizes(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, int]:
    """The batch sizes that are not the user's `own`, or none of them if the user's do not allow any.

    Sampling batches have the recipe's size, or the next larger one that the user's training batches divide. Their
    number gives as many updates an epoch as the recipe's and, as nearly as it can, as many images. The other two give
    the number of images an update that is nearest to the recipe's, with the largest training batches.
    """
    sampled, batches, trained, accumulated = (settings.get(name, DEFAULTS[name]) for name in BATCH_SIZES)
    images, per_update = sampled * batches, trained * accumulated
    try:
        size = own.get("sample_batch_size")
        if not size:
            divisor = own.get("train_batch_size", 1)
            size = -(-sampled // divisor) * divisor
        count = own.get("sample_num_batches_per_epoch")
        if not count:
            updates = max(1, images // per_update) if size <= per_update else 1
            count = max(1, round(images / updates / size)) * updates
        of_train = [own["train_batch_size"]] if "train_batch_size" in own else range(1, min(size, per_update) + 1)
        of_steps = own.get("train_gradient_accumulation_steps")
        pairs = [
            (train, steps)
            for train in of_train
            if size % train == 0
            for steps in ([of_steps] if of_steps else range(1, -(-per_update // train) + 1))
            if size * count % (train * steps) == 0
        ]
    # a size that is no whole number above 0, which `DDPOConfig` refuses by its name
    except (TypeError, ZeroDivisionError):
        return {}
    if not pairs:
        return {}
    best = min(pairs, key=lambda pair: (abs(pair[0] * pair[1] - per_update), -pair[0]))
    found = dict(zip(BATCH_SIZES, (size, count, *best), strict=True))
    return {name: value for name, value in found.items() if name not in own}


def _is_allowed(options: Mapping[str, Any]) -> bool:
    try:
        DDPOConfig(**options)
    except (ValueError, ImportError):
        return False
    return True
