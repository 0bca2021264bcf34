"""The contenders of `learning.py` by name: TRL at the demo's settings, our recipes, and settings from the command line.

A contender's settings are those of `DDPOConfig`, and of the LoRA (`lora_rank`, `lora_alpha`, `lora_target_modules`).
What it leaves out is as in `TASK`: the denoising steps, the guidance and the sizes of batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ddpo_fast import recipes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.recipes import LORA_SETTINGS
from ddpo_fast.recipes.fit import target_for
from lib.workloads import NEVER, OURS, TINY, TRL_DEMO, Contender, Settings

KINDS = ("full", "lora")
# with the demo's settings that TRL lacks
BASELINE_SETTINGS: Settings = {**TRL_DEMO, "train_warmup_steps": 10, "train_micro_batch_size": 40}
TASK: Settings = {
    name: BASELINE_SETTINGS[name]
    for name in (
        "mixed_precision",
        "sample_num_steps",
        "sample_guidance_scale",
        "sample_batch_size",
        "sample_num_batches_per_epoch",
        "train_batch_size",
        "train_micro_batch_size",
    )
}
BASELINE, RECIPE = "trl", "recipe"
OWN_OPTIONS = ("name", "base", "kind")


class UnknownContender(ValueError):
    pass


def kind_of(contender: Contender) -> str:
    return "lora" if contender.use_lora else "full"


def contenders(names: Iterable[str], own: Iterable[str], kinds: Iterable[str], forced: Settings) -> list[Contender]:
    """A contender for each name (`trl`, `recipe`, a recipe's name) and each text of `--contender`, in each kind.

    A name that ends with `@full` or `@lora`, or a recipe's that ends with `-full` or `-lora`, is of that kind alone.
    `recipe` is the recipe of the bundled model for each kind. `forced` are settings that all have (`--steps`).
    Raises `UnknownContender` in one sentence.
    """
    found = []
    for kind in kinds:
        for name in names:
            plain, _, only = name.partition("@")
            only = only or next((k for k in KINDS if plain.endswith(f"-{k}")), kind)
            if only not in KINDS:
                raise UnknownContender(f"contender {name!r} must end with @full or @lora, or name no kind")
            if only == kind:
                found.append(_made(plain, kind, settings_of(plain, kind, forced), forced))
        for text in own:
            given = parsed(text)
            if given.get("kind", kind) == kind:
                base = settings_of(given.get("base", BASELINE), kind, forced)
                changes = {key: value for key, value in given.items() if key not in OWN_OPTIONS}
                found.append(_made(given["name"], kind, {**base, **changes}, forced))
    labels = [(c.name, c.use_lora) for c in found]
    if doubled := {name for name, lora in labels if labels.count((name, lora)) > 1}:
        raise UnknownContender(f"two contenders are called {', '.join(sorted(doubled))}: give each a name of its own")
    return found


def parsed(text: str) -> dict[str, Any]:
    """The settings of `name=NAME,setting=value,...`; a value is JSON, or a word as it stands."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and key for key, equals, _ in pairs) or "name" not in (given := {k: v for k, _, v in pairs}):
        raise UnknownContender(f"--contender is {text!r} but must be name=NAME,setting=value,...")
    return {key: value if key in OWN_OPTIONS else _value(value) for key, value in given.items()}


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def settings_of(name: str, kind: str, forced: Settings) -> Settings:
    """TRL's settings, or a recipe's over those of the task, with its length of updates for the steps of `--steps`."""
    if name == BASELINE:
        return BASELINE_SETTINGS
    try:
        settings = recipes.load(f"bundled-{kind}" if name == RECIPE else name).settings
        return {**TASK, **settings, **target_for(settings, forced.get("sample_num_steps"))}
    except (ValueError, ImportError) as error:
        raise UnknownContender(f"contender {name!r}: {error}") from None


def _made(name: str, kind: str, settings: Settings, forced: Settings) -> Contender:
    merged = {**settings, **forced, "save_freq": NEVER}
    if "sample_batch_size" in forced and "sample_group_size" in merged:
        # a tiny epoch has fewer images than a recipe's group
        images = merged["sample_batch_size"] * merged["sample_num_batches_per_epoch"]
        merged["sample_group_size"] = min(merged["sample_group_size"], images)
    try:
        DDPOConfig(**config_settings(merged))
    except (TypeError, ValueError) as error:
        raise UnknownContender(f"contender {name!r}: {error}") from None
    return Contender(name, OURS, kind == "lora", merged)


def config_settings(settings: Settings) -> Settings:
    """The settings that are `DDPOConfig`'s: all but those of the LoRA, which the pipeline takes."""
    return {name: value for name, value in settings.items() if name not in LORA_SETTINGS}


def lora_settings(settings: Settings) -> Settings:
    """The settings of the LoRA, as the pipeline's arguments: names of layers are a list there."""
    given = {name: value for name, value in settings.items() if name in LORA_SETTINGS}
    if isinstance(targets := given.get("lora_target_modules"), str):
        given["lora_target_modules"] = [target.strip() for target in targets.split(",")]
    return given


def trl_settings(settings: Settings) -> Settings:
    """The settings that TRL's own config has; the others are ours. TRL's warm-up is added by `learning_run`."""
    from trl import DDPOConfig as TRLConfig

    known = {option.name for option in fields(TRLConfig)}
    return {name: value for name, value in settings.items() if name in known}


def forced_settings(size: str, steps: int | None, precision: str | None) -> Settings:
    """What `--size`, `--steps` and `--mixed_precision` set for every contender."""
    given = {"sample_num_steps": steps, "mixed_precision": precision}
    return {**(TINY if size == "tiny" else {}), **{name: value for name, value in given.items() if value is not None}}
