"""A YAML file with options: `ddpo-fast train run.yaml`, what `ddpo-fast init` writes, and a run's own `config.yaml`.

The file holds names of options with their values, and means the same as these on a command line; options that are given
there too replace it. This module does not import torch.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ddpo_fast.commands.option_groups import grouped
from ddpo_fast.config import PLACE_FIELDS
from ddpo_fast.config_rules import shown
from ddpo_fast.recipes import LORA_SETTINGS, read_yaml

# characters of a line of comment
WIDTH = 100


def expanded(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words of a command line, where a settings file at its beginning is replaced by the options in it.

    Raises `ValueError` for a file that is missing or cannot be read, and for a name in it that is no option.
    """
    if not arguments or not arguments[0].lower().endswith((".yaml", ".yml")):
        return list(arguments)
    name = arguments[0]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"the settings file is {name!r}, and there is no such file")
    content = read_yaml(path, f"settings file {name!r}")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"settings file {name!r} holds {shown(content)} but must have options with values")
    if "settings" in content and "known" in content:
        raise ValueError(f"{name!r} is a recipe: give it by --recipe {name}")
    options = {action.dest: action for action in reversed(parser._actions)}
    words = []
    for option, value in content.items():
        if option not in options:
            # the parser's own message, with the nearest option
            try:
                parser.parse([f"--{option}"])  # type: ignore[attr-defined]
            except ValueError as error:
                raise ValueError(f"settings file {name!r}: {error}") from None
        if isinstance(value, list) and options[option].nargs == "+":
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={_as_word(value)}")
    return [*words, *arguments[1:]]


def _as_word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def written(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], active: Collection[str], heading: Sequence[str]
) -> str:
    """The text of a settings file with every option of a parser, by groups, each with its help above it.

    Args:
        values: of the options.
        active: names of those that the file sets. The others are comments with the value that they have without it.
        heading: lines of comment at the top.
    """
    # reversed, as --no_NAME comes after --NAME
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in values}
    lines = [f"# {line}" for line in heading]
    for group, names in grouped(list(actions)):
        lines += ["", f"# {group.title}", ""]
        for name in names:
            lines += [f"# {line}" for line in textwrap.wrap(str(actions[name].help).replace("%%", "%"), WIDTH)]
            lines.append(("" if name in active else "#") + entry(name, values[name]))
    return "\n".join(lines) + "\n"


def entry(name: str, value: Any) -> str:
    """A line `name: value` of YAML."""
    # in one line, whatever its length
    text = yaml.safe_dump({name: value}, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def of_run(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> str:
    """The `config.yaml` of a run: every option but those that say where it reads and writes.

    Of a run that trains all weights, those of a LoRA are left out, as such a run refuses them.
    """
    left_out = {
        *PLACE_FIELDS,
        "trust_run",
        "dry_run",
        "hf_user_access_token",
        *(LORA_SETTINGS if values.get("full_finetune") else ()),
    }
    kept = {name: value for name, value in values.items() if name not in left_out}
    return written(parser, kept, kept, ["The options of this run: `ddpo-fast train config.yaml` starts one like it."])
