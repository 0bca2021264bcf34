"""The kinds of model that can be trained, one small file each."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from ddpo_fast.config import DDPOConfig
from ddpo_fast.families.base import Family, Prompts
from ddpo_fast.families.flux import Flux
from ddpo_fast.families.sd3 import StableDiffusion3
from ddpo_fast.families.sdxl import SDXL
from ddpo_fast.families.stable_diffusion import StableDiffusion

__all__ = [
    "FAMILIES",
    "SDXL",
    "Family",
    "Flux",
    "Prompts",
    "StableDiffusion",
    "StableDiffusion3",
    "family_of",
    "family_of_pipeline",
    "unchecked_with_family",
    "with_family",
    "working",
]

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, SDXL, StableDiffusion3, Flux)


def family_of(index: Mapping[str, Any]) -> type[Family]:
    """The family of a model whose `model_index.json` is `index`.

    A pipeline class of another name counts as Stable Diffusion's, if it has the same parts: who calls this checks them.
    """
    return next((family for family in FAMILIES if index.get("_class_name") in family.pipelines), StableDiffusion)


def family_of_pipeline(pipeline: Any) -> Family:
    """The family of a loaded pipeline: its own attribute, else by its class, which may be a subclass of diffusers'.

    A user's own `DDPOStableDiffusionPipeline` is Stable Diffusion.
    """
    family = getattr(pipeline, "family", None)
    if isinstance(family, Family):
        return family
    names = {kind.__name__ for kind in type(pipeline).__mro__}
    return next((kind for kind in FAMILIES if names.intersection(kind.pipelines)), StableDiffusion)(pipeline)


def with_family(config: DDPOConfig, family: type[Family] | Family) -> DDPOConfig:
    """`config` with what depends on the kind of model: a copy, or `config` itself for a model like Stable Diffusion.

    Raises `ValueError` for settings that the model leaves no step to train on.
    """
    changed = unchecked_with_family(config, family)
    if changed is not config:
        changed.check()
    return changed


def unchecked_with_family(config: DDPOConfig, family: type[Family] | Family) -> DDPOConfig:
    """`with_family` for settings of another machine, which may have other packages."""
    found = {name: getattr(family, name) for name in ("guides_by_rows", "last_step_has_noise", "is_flow_matching")}
    if all(getattr(config, name) == value for name, value in found.items()):
        return config
    config = copy(config)
    vars(config).update(found)
    return config


def working() -> str:
    """The models that can be trained, for messages."""
    *first, last = (family.title for family in FAMILIES)
    return f"{', '.join(first)} or {last}" if first else last
