"""The options of every command, read without torch: `--help` and a misspelt option cost no seconds of imports."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ddpo_fast.config import DDPOConfig
from ddpo_fast.config_rules import MOST_RANK
from ddpo_fast.prompts import PROMPT_LISTS

TRL_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
# `rewards.REWARDS`, whose module needs torch
BUILT_IN_REWARDS = ("jpeg_compressibility", "jpeg_incompressibility")
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_target_modules")


@dataclass
class PlanArguments:
    """Where it is to run."""

    num_processes: int = field(default=1, metadata={"help": "Processes, each with a GPU of its own."})


@dataclass
class ResumeArguments:
    """What a resumed run may do."""

    trust_run: bool = field(
        default=False,
        metadata={"help": "Import the functions and use the settings of others' programs that resume_from names."},
    )


@dataclass
class RunArguments:
    """What to train, on what, towards what."""

    pretrained_model: str = field(
        default="", metadata={"help": "Folder or Hub id of a Stable Diffusion (default: the bundled tiny model)."}
    )
    pretrained_revision: str = field(default="main", metadata={"help": "Revision of the model on the Hub."})
    full_finetune: bool = field(default=False, metadata={"help": "Train all weights of the UNet instead of a LoRA."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: float = field(default=4, metadata={"help": "Scale of the LoRA adapter, divided by its rank."})
    lora_target_modules: str = field(
        default=",".join(TRL_TARGETS), metadata={"help": "Names of the adapted layers, separated by commas."}
    )
    reward: str = field(
        default="jpeg_compressibility",
        metadata={"help": f"{', '.join(BUILT_IN_REWARDS)}, or your own function as module:function."},
    )
    prompts: str = field(
        default="simple_animals",
        metadata={"help": f"{', '.join(PROMPT_LISTS)}, a text file with a prompt a line, or module:function."},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.lora_rank <= MOST_RANK:
            raise ValueError(f"lora_rank is {self.lora_rank} but must be a whole number from 1 to {MOST_RANK}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha} but must be a number above 0")
        if not self.target_modules:
            raise ValueError(f"lora_target_modules is {self.lora_target_modules!r} but must name a layer")

    @property
    def target_modules(self) -> list[str]:
        return [name.strip() for name in self.lora_target_modules.split(",") if name.strip()]


class Parser(HfArgumentParser):
    """Options from dataclasses; a mistake is a `ValueError` of one sentence, in place of pages of usage."""

    def __init__(self, kinds: Sequence[type] = (), **kwargs: Any) -> None:
        super().__init__(list(kinds), allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        # what may be None can be given as 'None', as by somebody who resumes a run that has something else
        for kind in kinds:
            for name, hint in get_type_hints(kind).items():
                if name == "mixed_precision" or (get_origin(hint) is Union and type(None) in get_args(hint)):
                    self._allow_none(name)

    def _allow_none(self, name: str) -> None:
        for action in self._actions:
            if action.dest == name:
                action.type = _OrNone(action.type)
                if action.choices is not None:
                    action.choices = [*action.choices, None]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{_plainly(message)} (`{self.prog} --help` lists the options)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises `ValueError` for what is no option, with the nearest one."""
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            what = f"there is no option {name}" if name.startswith("-") else f"{name!r} belongs to no option"
            self.error(what + _did_you_mean(name, self._option_string_actions))
        return namespace


class _OrNone:
    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__ = getattr(kind, "__name__", str(kind))

    def __call__(self, text: str) -> Any:
        return None if text == "None" else self.kind(text)


def _plainly(message: str) -> str:
    """argparse's complaint in the words of the settings' own."""
    message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1: ", message)
    for kind, demand in (("int", "a whole number"), ("float", "a number")):
        message = re.sub(rf"^(\S+): invalid {kind} value: (.*)$", rf"\1 is \2 but must be {demand}", message)
    return message


def _did_you_mean(name: str, known: Any) -> str:
    """' (did you mean ...?)', or nothing where no option is near."""
    written = {option.lstrip("-").replace("-", "_"): option for option in reversed(list(known))}
    word = name.lstrip("-").replace("-", "_").lower()
    parts = set(word.split("_"))
    near = difflib.get_close_matches(word, written, n=1, cutoff=0.8)
    near = near or [option for option in written if parts <= set(option.split("_"))][:3]
    near = near or difflib.get_close_matches(word, written, n=1)
    return f": did you mean {' or '.join(written[option] for option in near)}?" if near else ""


def given_options(arguments: Sequence[str]) -> set[str]:
    """Names of the options on a command line, with underscores."""
    names = {word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def check_given(given: set[str], full_finetune: bool) -> None:
    """Options that contradict each other, as only the command line can tell what was asked for and what is default."""
    lora = [name for name in LORA_OPTIONS if name in given]
    if full_finetune and lora:
        raise ValueError(f"--full-finetune trains all weights, and --{lora[0]} is of a LoRA: leave out one of them")


def train_parser() -> Parser:
    parser = Parser(
        [RunArguments, DDPOConfig, ResumeArguments],
        prog="ddpo-fast train",
        description="Fine-tune Stable Diffusion on a reward with DDPO (arXiv 2305.13301).",
    )
    # the `deepspeed` launcher tells a process its number in the environment, and here too
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    # a run has a folder of its own below this one
    parser.set_defaults(logdir="runs", mixed_precision=None)
    return parser


def plan_parser() -> Parser:
    parser = Parser(
        [RunArguments, DDPOConfig, PlanArguments],
        prog="ddpo-fast plan",
        description="Predict the memory of `ddpo-fast train` with the same options, and choose what fits --gpu-memory.",
    )
    # for a GPU, wherever this is asked
    parser.set_defaults(mixed_precision="fp16")
    return parser


def sample_parser() -> Parser:
    parser = Parser(
        prog="ddpo-fast sample",
        description="Draw a grid: the base model above, the trained one below, from the same noise.",
    )
    parser.add_argument("run", help="output folder of a run, or a checkpoint in it")
    parser.add_argument("--prompts", help="a named list, a text file or module:function (default: the run's)")
    parser.add_argument("--reward", help="a named reward or module:function for the captions (default: the run's)")
    parser.add_argument("--num-images", "--num_images", type=int, default=8, help="images of each model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the choice of prompts")
    parser.add_argument(
        "--output",
        type=Path,
        help="where the grid goes, as .png, .jpg, .webp, .pdf or .svg (default: a new samples.png in the run's folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file that --output names")
    parser.add_argument("--trust_run", "--trust-run", action="store_true", help="import the functions that it names")
    return parser


def info_parser() -> Parser:
    return Parser(
        prog="ddpo-fast info", description="Print which kernels run on this machine, and why the others do not."
    )


def filled(kind: type, namespace: argparse.Namespace) -> Any:
    """A dataclass from the options of its names."""
    return kind(**{f.name: getattr(namespace, f.name) for f in fields(kind)})
