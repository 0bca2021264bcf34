"""The parser of the commands' options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ddpo_fast.commands.option_groups import grouped_help


class Parser(HfArgumentParser):
    """Options from the fields of dataclasses.

    A mistake raises `ValueError` with one sentence, where argparse would print pages of usage and exit.
    """

    def __init__(self, kinds: Sequence[type] = (), **kwargs: Any) -> None:
        super().__init__(list(kinds), allow_abbrev=False, **kwargs)
        # The word None is accepted for a field that may be None: a resumed run, whose defaults are the recorded
        # settings, can be set back with it.
        for kind in kinds:
            hints = get_type_hints(kind)
            for action in self._actions:
                if get_origin(hints.get(action.dest)) is Union and type(None) in get_args(hints[action.dest]):
                    action.type = _OrNone(action.type)

    def group_help(self) -> None:
        """Makes `--help` show the usual options by groups, and adds `--help-all`, which shows all of them."""
        self.add_argument(
            "--help-all", "--help_all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all options"
        )
        self.epilog = (
            "An option that is on is turned off by --no_NAME or --NAME False. `ddpo-fast init` writes all options into "
            "a file of settings, which is given as FILE.yaml."
        )
        self.format_help = lambda: grouped_help(self, everything=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{_reworded(message)} (`{self.prog} --help` lists the options)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options with their defaults. Raises `ValueError` for a word that is no option, naming the nearest one."""
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            what = f"there is no option {name}" if name.startswith("-") else f"{name!r} belongs to no option"
            self.error(what + _did_you_mean(name, self._option_string_actions))
        for dest, value in vars(namespace).items():
            # the word None for an option that takes several values
            if value == [None]:
                setattr(namespace, dest, None)
        return namespace


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(grouped_help(parser, everything=True))
        parser.exit()


class _OrNone:
    """An argparse type: `kind`, or None for the word None."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__ = getattr(kind, "__name__", str(kind))

    def __call__(self, text: str) -> Any:
        return None if text == "None" else self.kind(text)


def _reworded(message: str) -> str:
    """argparse's message about a value, in the form that messages about settings have."""
    message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1: ", message)
    for kind, demand in (("int", "a whole number"), ("float", "a number")):
        message = re.sub(rf"^(\S+): invalid {kind} value: (.*)$", rf"\1 is \2 but must be {demand}", message)
    return message


def _did_you_mean(name: str, known: Any) -> str:
    """': did you mean ...?' with up to three of the `known` options, or '' if none is similar."""
    # compared by the words alone, as people mix dashes and underscores
    written = {option.lstrip("-").replace("-", "_"): option for option in reversed(list(known))}
    word = name.lstrip("-").replace("-", "_").lower()
    parts = set(word.split("_"))
    # a likely spelling mistake, else options that end in the words (learning-rate), or contain them, else the nearest
    near = difflib.get_close_matches(word, written, n=1, cutoff=0.8)
    near = near or [option for option in written if option.endswith(f"_{word}")][:3]
    near = near or [option for option in written if parts <= set(option.split("_"))][:3]
    near = near or difflib.get_close_matches(word, written, n=1)
    return f": did you mean {' or '.join(written[option] for option in near)}?" if near else ""
