"""The options of every command.

Where to add an option: a setting that `DDPOTrainer` reads is a field of `DDPOConfig`, and needs nothing here. What
`train` or `plan` need before there is a trainer is a field of `RunArguments`, or of the dataclass of one command below.
An option of `sample` or `info` is an `add_argument` in that command's parser.

This module does not import torch, which takes seconds: `--help` and a misspelt option are answered at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ddpo_fast.commands.parser import Parser
from ddpo_fast.commands.reward_options import REWARD_HELP, RewardArguments
from ddpo_fast.config import DDPOConfig
from ddpo_fast.config_rules import MAX_LORA_RANK, one_of
from ddpo_fast.prompts import PROMPT_LISTS, existing
from ddpo_fast.recipes import LORA_SETTINGS, Recipe, choose, fit, load
from ddpo_fast.rewards import weights_of
from ddpo_fast.tiny_sd import MODELS

# the layers that TRL adapts
TRL_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


# rewards that the bundled scorer has, see docs/rewards.md
BUNDLED_SCORERS = ("aesthetic", "clip_score")


@dataclass
class PlanArguments:
    """The machine that `ddpo-fast plan` plans for."""

    num_processes: int = field(default=1, metadata={"help": "Processes, each with a GPU of its own."})
    host_memory: float = field(
        default=0.0,
        metadata={
            "help": "GB of host memory that they share, above which a plan is refused (default: this machine's, above "
            "which it is remarked on)."
        },
    )

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes is {self.num_processes} but must be a whole number of at least 1")
        if not 0 <= self.host_memory < float("inf"):
            raise ValueError(f"host_memory is {self.host_memory} but must be a number above 0 (GB)")


@dataclass
class StartArguments:
    """How far `ddpo-fast train` goes, and what it may do with `--resume_from`."""

    dry_run: bool = field(
        default=False, metadata={"help": "Check everything, print the arithmetic and the predicted memory, and stop."}
    )
    trust_run: bool = field(
        default=False,
        metadata={"help": "Import the functions that the resumed run names, and use its settings for other programs."},
    )
    hf_user_access_token: str = field(
        default="",
        metadata={"help": "Token for push_to_hub (default: HF_TOKEN or `hf auth login`); it is not written anywhere."},
    )


@dataclass
class RunArguments(RewardArguments):
    """The model, the part of it to train, the rewards and the prompts."""

    pretrained_model: str = field(
        default="",
        metadata={
            "help": "Folder, Hub id or .safetensors file of a model (default: the bundled tiny Stable Diffusion; "
            "`bundled-flow`: the bundled flow-matching one)."
        },
    )
    pretrained_revision: str = field(default="main", metadata={"help": "Revision of the model on the Hub."})
    single_file_config: str = field(
        default="",
        metadata={
            "help": "Of a .safetensors file: folder or Hub id of a diffusers model of its kind, for the configs and "
            "tokenizers (default: beside the file, or in the Hub's cache)."
        },
    )
    full_finetune: bool = field(default=False, metadata={"help": "Train all weights of the UNet instead of a LoRA."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: float = field(default=4, metadata={"help": "Scale of the LoRA adapter, divided by its rank."})
    lora_target_modules: str = field(
        default=",".join(TRL_TARGETS), metadata={"help": "Names of the adapted layers, separated by commas."}
    )
    reward: str = field(default="jpeg_compressibility", metadata={"help": REWARD_HELP})
    prompts: str = field(
        default="simple_animals",
        metadata={
            "help": f"{', '.join(PROMPT_LISTS)}, a file (text with a prompt a line, .csv, .tsv, .jsonl, .json), a "
            "dataset as hf:NAME[:SPLIT][#COLUMN], or module:function."
        },
    )
    eval_reward: str = field(
        default="",
        metadata={"help": "Rewards, as in --reward, that score images of fixed noise every --eval_freq epochs."},
    )
    eval_prompts: str = field(default="", metadata={"help": "Prompts of these images (default: those of --prompts)."})
    sample_prompts: str = field(
        default="", metadata={"help": "Prompts of the images of --sample_freq (default: those of --prompts)."}
    )
    recipe: str = field(
        default="",
        metadata={
            "help": "Settings for all options that are not given: a name that `ddpo-fast recipes` lists, or your own "
            "YAML file (default: chosen by the model and --full-finetune; trl: the defaults below)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.lora_rank <= MAX_LORA_RANK:
            raise ValueError(f"lora_rank is {self.lora_rank} but must be a whole number from 1 to {MAX_LORA_RANK}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha} but must be a number above 0")
        if not self.target_modules:
            raise ValueError(f"lora_target_modules is {self.lora_target_modules!r} but must name a layer")

    @property
    def reward_specs(self) -> list[str]:
        """The reward to train on and, if there is one, the one to evaluate by."""
        return [self.reward, *([self.eval_reward] if self.eval_reward else [])]

    @property
    def reward_names(self) -> list[str]:
        return [name for spec in self.reward_specs for name in weights_of(spec)]

    @property
    def target_modules(self) -> list[str]:
        return [name.strip() for name in self.lora_target_modules.split(",") if name.strip()]


@dataclass
class HeadArguments:
    """The data, the CLIP and the head of `ddpo-fast train-reward`."""

    data: str = field(
        metadata={
            "help": "AVA.txt; a .csv, .jsonl or .parquet file with the columns image, score, or caption, jpg_0, jpg_1, "
            "label_0, label_1; or a folder of such parquet files."
        },
    )
    images: str = field(
        default="", metadata={"help": "Folder of the images (default: the file's own, or `images` beside AVA.txt)."}
    )
    clip: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Folder or Hub id of the CLIP, or `bundled` for the scorer of the bundled model."},
    )
    head: str = field(
        default="linear", metadata={"help": "linear, or mlp: LAION's layers.", "choices": ["linear", "mlp"]}
    )
    output_dir: str = field(default="reward_head", metadata={"help": "Folder of the head and the kept embeddings."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the head that is in the folder."})
    max_broken_share: float = field(
        default=0.05, metadata={"help": "Share of rows that may be broken: they are left out, and named."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of rows that measure the head."})
    seed: int = field(default=0, metadata={"help": "Seed of the division of rows and of an MLP's training."})
    device: str = field(default="", metadata={"help": "Where the CLIP computes (default: the GPU if there is one)."})
    clip_batch_size: int = field(default=64, metadata={"help": "Images that the CLIP embeds at a time."})
    epochs: int = field(default=50, metadata={"help": "Passes over the rows, for an MLP."})
    batch_size: int = field(default=256, metadata={"help": "Rows of an update of an MLP."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's learning rate for an MLP."})

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("clip_batch_size", 1), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be a whole number of at least {least}")
        if not 0 <= self.max_broken_share < 1:
            raise ValueError(f"max_broken_share is {self.max_broken_share} but must be a number from 0 to below 1")
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(f"validation_share is {self.validation_share} but must be a number above 0, up to 0.5")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate} but must be a number above 0 and below 1")


def given_options(arguments: Sequence[str]) -> set[str]:
    """Names of the options on a command line, with underscores: of `--no_x` both `no_x` and `x`."""
    names = {word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def check_no_lora_options(given: set[str], full_finetune: bool) -> None:
    """Raises `ValueError` if an option of a LoRA was given to a run that trains all weights.

    Only the command line can tell: in `RunArguments` a given value and a default look alike.
    """
    lora = [name for name in LORA_SETTINGS if name in given]
    if full_finetune and lora:
        raise ValueError(f"--full-finetune trains all weights, and --{lora[0]} is of a LoRA: leave out one of them")


def apply_recipe(options: argparse.Namespace, given: set[str]) -> Recipe:
    """Sets in `options` what a recipe says of those that are not `given`, and returns the recipe.

    That is the one that the options name, else the one for their model and for a LoRA or all weights. `options` are
    those of `train` or `plan`, with their defaults. Raises `ValueError` for a recipe that is missing or wrong.
    """
    recipe = load(options.recipe or _recipe_of(options))
    options.recipe = recipe.name
    config = {name: value for name, value in recipe.settings.items() if name not in LORA_SETTINGS}
    lora = {name: value for name, value in recipe.settings.items() if name in LORA_SETTINGS and name not in given}
    # they are a new adapter's, and one beside the model has settings of its own
    if options.full_finetune or _has_adapter(options.pretrained_model):
        lora = {}
    for name, value in {**fit(config, vars(options), given), **lora}.items():
        setattr(options, name, value)
    return recipe


def _has_adapter(model: str) -> bool:
    folder = existing(model)
    if folder is None or not folder.is_dir():
        return False
    # this imports torch
    from ddpo_fast.lora import LORA_WEIGHTS

    return (folder / LORA_WEIGHTS).is_file()


def apply_bundled_scorer(options: argparse.Namespace) -> None:
    """Sets `reward_model` to the bundled scorer, for rewards that it has, if the model is a bundled one.

    Their images are like no others, and other scorers' weights would have to be fetched. Raises `ValueError` for a
    reward that is written wrongly.
    """
    specs = [spec for spec in (options.reward, options.eval_reward) if spec]
    names = dict.fromkeys(name for spec in specs for name in weights_of(spec) if name in BUNDLED_SCORERS)
    if _bundled_name(options.pretrained_model) is not None and not options.reward_model:
        options.reward_model = ",".join(f"{name}=bundled" for name in names)


def _recipe_of(options: argparse.Namespace) -> str:
    bundled = _bundled_name(options.pretrained_model)
    if bundled is not None:
        return choose(bundled or "bundled", options.full_finetune)
    # this imports torch
    from ddpo_fast.model_configs import family_of_model

    try:
        family = family_of_model(options.pretrained_model, options.pretrained_revision).recipe
    except (OSError, ValueError):
        # the command's check of the model says what is wrong
        family = "sd"
    return choose(family, options.full_finetune)


def _bundled_name(model: str) -> str | None:
    """The name of the bundled model that is meant by its name or folder, or None for any other."""
    folder = existing(model)
    if folder is None:
        return model if model in MODELS else None
    return next((name for name, bundled in MODELS.items() if folder.resolve() == bundled.resolve()), None)


def precision_or_default(given: str | None, on_gpu: bool) -> str:
    """The precision that a command computes in.

    That is the `given` one, else that of `accelerate launch`, else TRL's default 'fp16' on a GPU and 'no' on a CPU.
    Raises `ValueError` if the precision of `accelerate launch` is not supported.
    """
    if given is not None:
        return given
    # `accelerate launch` passes its setting on in the environment
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precisions = [name for name in _FIELDS["mixed_precision"].metadata["choices"] if name is not None]
    if launched is not None and launched not in precisions:
        raise ValueError(
            f"accelerate's mixed_precision is {launched!r} but must be {one_of(precisions)}: change its config, or "
            "give --mixed_precision"
        )
    return launched or ("fp16" if on_gpu else "no")


_FIELDS = {option.name: option for option in fields(DDPOConfig)}


def train_parser() -> Parser:
    parser = Parser(
        [RunArguments, DDPOConfig, StartArguments],
        prog="ddpo-fast train",
        description="Fine-tune Stable Diffusion on a reward with DDPO (arXiv 2305.13301).",
    )
    # The `deepspeed` launcher adds this option to the command line of every process. It is not read, as the launcher
    # says the same in the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    # None lets `precision_or_default` choose
    parser.set_defaults(logdir="runs", mixed_precision=None, keep_best_checkpoint=True, sample_freq=10)
    parser.group_help()
    return parser


def plan_parser() -> Parser:
    parser = Parser(
        [RunArguments, DDPOConfig, PlanArguments],
        prog="ddpo-fast plan",
        description="Predict the memory of `ddpo-fast train` with the same options, and choose what fits --gpu-memory.",
    )
    # None lets `precision_or_default` choose
    parser.set_defaults(mixed_precision=None)
    parser.group_help()
    return parser


def sample_parser() -> Parser:
    parser = Parser(
        [RewardArguments],
        prog="ddpo-fast sample",
        description="Draw a grid: the base model above, the trained ones below, from the same noise.",
    )
    parser.add_argument("run", help="output folder of a run, or a checkpoint in it")
    parser.add_argument(
        "--checkpoint",
        help="which checkpoints of the run: all, best, last, or numbers of epochs as in 10,20 (default: last)",
    )
    parser.add_argument(
        "--format",
        choices=("grid", "images"),
        default="grid",
        help="one picture, or a folder with a file for each image",
    )
    parser.add_argument("--prompts", help="as for `train` (default: the run's)")
    parser.add_argument("--reward", help="rewards for the captions, as in `train` (default: the run's)")
    parser.add_argument("--num-images", "--num_images", type=int, default=8, help="images of each model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the choice of prompts")
    parser.add_argument(
        "--output",
        type=Path,
        help="where the grid goes, as .png, .jpg, .webp, .pdf or .svg, or with --format images a folder (default: a "
        "new samples.png, or samples_images, in the run's folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --output names")
    parser.add_argument("--trust_run", "--trust-run", action="store_true", help="import the run's functions")
    return parser


def report_parser() -> Parser:
    parser = Parser(
        prog="ddpo-fast report",
        description="Write a page about one run, or about several side by side: one file that opens without a network.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, help="where the page goes (default: report.html, or comparison.html, in the first RUN)"
    )
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine while the run goes on")
    parser.add_argument("--port", type=_port, default=0, help="port for --watch (default: any that is free)")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port: use a whole number from 1 to {2**16 - 1}")
    return port


def train_reward_parser() -> Parser:
    return Parser(
        [HeadArguments],
        prog="ddpo-fast train-reward",
        description="Train a reward head on CLIP's embeddings of rated images, or of pairs with a preference.",
    )


def recipes_parser() -> Parser:
    parser = Parser(
        prog="ddpo-fast recipes", description="List the recipes of `ddpo-fast train`, or print the file of one."
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or a file of your own, which is checked")
    return parser


def info_parser() -> Parser:
    return Parser(
        prog="ddpo-fast info", description="Print which kernels run on this machine, and why the others do not."
    )


def from_options(kind: type, namespace: argparse.Namespace) -> Any:
    """An object of the dataclass `kind` with the options' values. Raises what its `__post_init__` raises."""
    return kind(**{f.name: getattr(namespace, f.name) for f in fields(kind)})
