"""Recipes: named sets of settings, one YAML file each in this folder.

`ddpo-fast train` and `ddpo-fast plan` use the recipe that `choose` names, or that of `--recipe`. In a script, `config`
makes a `DDPOConfig` from one; `DDPOConfig()` itself has TRL's defaults. This package does not import torch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ddpo_fast.config import PLACE_FIELDS, DDPOConfig
from ddpo_fast.config_rules import shown
from ddpo_fast.recipes.fit import BATCH_SIZES, DEFAULTS, fit

# settings that are no fields of `DDPOConfig` but options of the command line, with their types
LORA_SETTINGS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "lora_rank": (int, "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "lora_target_modules": (str, "names separated by commas"),
}
# Where a run reads and writes is no part of a recipe, and `exp_name` is a part of where.
SETTINGS = (*(f.name for f in fields(DDPOConfig) if f.name not in PLACE_FIELDS), *LORA_SETTINGS)
PARTS = ("description", "known", "settings")


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file says.

    Args:
        name: of a recipe in this folder, or the path of another file.
        description: what it is for, in one or two sentences.
        known: what it is known to do, a sentence each with the model and the hardware.
        settings: values by the names of options of `ddpo-fast train`.
    """

    name: str
    description: str
    known: tuple[str, ...]
    settings: dict[str, Any]

    def describe(self, options: dict[str, Any], given: set[str]) -> list[str]:
        """Lines for a person: what the recipe is, and what of it a run uses.

        Args:
            options: the values that the run has.
            given: names of the options that the user gave.
        """
        lines = [f"recipe {self.name}: {self.description}", *(f"  known: {sentence}" for sentence in self.known)]
        used = [f"{name}={value}" for name, value in self.settings.items() if options.get(name) == value]
        # of the batch sizes also those that the recipe leaves at their defaults, as `fit` may have changed them
        recipe = {**self.settings, **{name: DEFAULTS[name] for name in BATCH_SIZES if name not in self.settings}}
        other = {
            name: f"{name}={options[name]} (recipe: {value})"
            for name, value in recipe.items()
            if name in options and options[name] != value
        }
        yours = [text for name, text in other.items() if name in given and name in self.settings]
        fitted = [text for name, text in other.items() if name not in given]
        for what, words in (("settings", used), ("you gave", yours), ("changed to fit what you gave", fitted)):
            if words:
                lines.append(f"  {what}: {', '.join(words)}")
        return lines


class _Loader(yaml.SafeLoader):
    """Reads numbers and words as YAML 1.2 does: 1e-5 is a number, and `no` is a word, as `mixed_precision` needs it."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":float", ":bool"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$"),
    "-+.0123456789",
)


def names() -> list[str]:
    """The names of the recipes in this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def choose(kind: str, full_finetune: bool) -> str:
    """The name of the recipe for a bundled model or a `Family.recipe`, and for all weights or a LoRA."""
    return f"{kind}-{'full' if full_finetune else 'lora'}"


def path_of(name: str) -> Path:
    """The file of a recipe: one in this folder, or the YAML file at the path `name`.

    Raises `ValueError` if there is none.
    """
    if name in names():
        return Path(__file__).parent / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            path = Path(name).expanduser()
            if path.is_file():
                return path
        # a name that no file can have, or '~name' without such a user
        except (OSError, RuntimeError, ValueError):
            pass
        raise ValueError(f"recipe is {shown(name)}, and there is no such file: give a YAML file or {_any_name()}")
    near = difflib.get_close_matches(name, names(), n=1)
    meant = f"did you mean {near[0]}? There is {_any_name()}" if near else f"give a YAML file or {_any_name()}"
    raise ValueError(f"recipe is {shown(name)}, which does not exist: {meant}")


def load(name: str) -> Recipe:
    """The recipe of that name or file.

    Raises `ValueError` for a file that is missing or is no recipe, and for settings that `DDPOConfig` refuses
    (`ImportError` where they need a package that is not installed).
    """
    path = path_of(name)
    content = read_yaml(path, f"recipe {name!r}")
    if not isinstance(content, dict):
        raise ValueError(f"recipe {name!r} holds {shown(content)} but must have {', '.join(PARTS)}")
    for part in content:
        if part not in PARTS:
            where = "under `settings:`" if part in SETTINGS else f"into one of {', '.join(PARTS)}"
            raise ValueError(f"recipe {name!r} has {shown(part)} at its top level: write that {where}")
    description, known, settings = content.get("description", ""), content.get("known") or [], content.get("settings")
    if not isinstance(description, str):
        raise ValueError(f"recipe {name!r}: description is {shown(description)} but must be a sentence")
    if not isinstance(known, list) or not all(isinstance(sentence, str) for sentence in known):
        raise ValueError(f"recipe {name!r}: known is {shown(known)} but must be a list of sentences")
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {name!r}: settings is {shown(settings)} but must be names with values")
    _check_settings(name, settings)
    return Recipe(name, " ".join(description.split()), tuple(" ".join(s.split()) for s in known), settings)


def config(name: str, **changes: Any) -> DDPOConfig:
    """A `DDPOConfig` with a recipe's settings and your `changes`, to which the recipe's give way as in `fit`.

    A recipe's LoRA settings, which are arguments of the pipeline, are in `load(name).settings` alone.
    """
    settings = {k: v for k, v in load(name).settings.items() if k not in LORA_SETTINGS}
    return DDPOConfig(**{**fit(settings, changes, set(changes)), **changes})


def _check_settings(name: str, settings: dict[Any, Any]) -> None:
    for setting in settings:
        if setting in PLACE_FIELDS:
            raise ValueError(f"recipe {name!r} has {setting}, which belongs to one run: give it as an option")
        if setting not in SETTINGS:
            near = difflib.get_close_matches(str(setting), SETTINGS, n=1)
            meant = f"did you mean {near[0]}?" if near else "`ddpo-fast train --help` lists them"
            raise ValueError(f"recipe {name!r} has {shown(setting)}, which is no setting: {meant}")
        kind, demand = LORA_SETTINGS.get(setting, (object, ""))
        if not isinstance(settings[setting], kind) or (demand and isinstance(settings[setting], bool)):
            raise ValueError(f"recipe {name!r}: {setting} is {shown(settings[setting])} but must be {demand}")
    try:
        DDPOConfig(**{k: v for k, v in settings.items() if k not in LORA_SETTINGS})
    except (ValueError, ImportError) as error:
        raise type(error)(f"recipe {name!r}: {error}") from None


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, with numbers and words as in YAML 1.2.

    Raises `ValueError` for a file that cannot be read, which `what` names, such as "recipe 'mine.yaml'".
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{what} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _any_name() -> str:
    return f"one of {', '.join(names())}"
