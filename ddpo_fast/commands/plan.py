"""`ddpo-fast plan`, and the settings that `ddpo-fast train --auto_memory` chooses.

`plan` reads the model's config files, predicts for one GPU how many bytes each phase of training takes, tries settings
from the fastest to the smallest until they fit, and prints the table, the reasons and the `train` command. No weights
are loaded.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import psutil
import torch

from ddpo_fast.commands.options import (
    PlanArguments,
    RunArguments,
    apply_bundled_scorer,
    apply_recipe,
    check_no_lora_options,
    from_options,
    given_options,
    precision_or_default,
)
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import CUDA_CONTEXT, GB
from ddpo_fast.engine import compute_dtype
from ddpo_fast.families import with_family
from ddpo_fast.lora import TRL_TARGETS
from ddpo_fast.model_configs import ModelConfigs, check_model
from ddpo_fast.plan import (
    CUDA_WORKSPACES,
    MARGIN,
    Adapter,
    Choice,
    Footprint,
    Plan,
    RewardMemory,
    choose,
    predict,
    reward_memory,
)
from ddpo_fast.prompts import PROMPT_LISTS, ListPrompts, existing, load_prompts
from ddpo_fast.recipes import LORA_SETTINGS


def run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Checks the options, then prints the memory that training takes and the fastest settings that fit.

    That is of all weights if `full_finetune` is given, of a LoRA if one of its options is, and of both otherwise.
    """
    given = given_options(arguments)
    # The plan is for a GPU, also where it is made on a machine without one.
    options.mixed_precision = precision_or_default(options.mixed_precision, on_gpu=True)
    check_no_lora_options(given, options.full_finetune)
    wants_lora = not given.isdisjoint(LORA_SETTINGS)
    # of each plan, whether it trains all weights
    kinds = [True] if options.full_finetune else [False] if wants_lora else [False, True]
    machine = from_options(PlanArguments, options)
    print_plans([Case(options, given, full) for full in kinds], machine.num_processes, machine.host_memory * GB)


class Case:
    """What is planned: the options of `plan` with the settings of a recipe, for all weights (`full`) or a LoRA.

    Raises what `RunArguments` and `DDPOConfig` raise, and `ValueError` for a wrong recipe.
    """

    def __init__(self, options: argparse.Namespace, given: set[str], full: bool) -> None:
        options = argparse.Namespace(**{**vars(options), "full_finetune": full})
        self.names_recipe = bool(options.recipe)
        apply_bundled_scorer(options)
        self.recipe = apply_recipe(options, given)
        self.run, self.config = from_options(RunArguments, options), from_options(DDPOConfig, options)


def configs_of(run: RunArguments, config: DDPOConfig) -> ModelConfigs:
    """The model's config files. Raises `ValueError` or `OSError` for a model that cannot be trained."""
    return check_model(
        run.pretrained_model,
        run.pretrained_revision,
        config.sample_num_steps,
        config.sample_eta,
        has_weights=False,
        single_file_config=run.single_file_config,
    )


def footprint_of(
    run: RunArguments,
    config: DDPOConfig,
    configs: ModelConfigs,
    full: bool,
    reward: RewardMemory,
    device_type: str = "cuda",
) -> Footprint:
    """The sizes of the model's weights and activations, if all weights are trained (`full`) or a LoRA."""
    return Footprint(
        configs,
        None if full else Adapter(run.lora_rank, _targets(run)),
        compute_dtype(config.mixed_precision),
        device_type,
        config.fuse_unet,
        config.sample_num_steps,
        config.sample_cache,
        reward,
        config.largest_size,
        "none" if full else config.quantize_frozen,
        _number_of_prompts(run.prompts),
    )


def _targets(run: RunArguments) -> tuple[str, ...] | None:
    """The layers of a new adapter; TRL's default stands for the family's usual ones."""
    return None if set(run.target_modules) == set(TRL_TARGETS) else tuple(run.target_modules)


def _number_of_prompts(spec: str) -> int | None:
    """How many prompts a list or file has; None for a function or a dataset, which a plan neither imports nor loads."""
    if spec in PROMPT_LISTS or existing(spec) is not None:
        function = load_prompts(spec)
        assert isinstance(function, ListPrompts), "neither is a function"
        return len(set(function.prompts))
    return None


def memory_of_rewards(
    run: RunArguments, config: DDPOConfig, configs: ModelConfigs, device_type: str = "cuda"
) -> RewardMemory:
    """The memory of the rewards that are trained on and evaluated by, where they tell it.

    Raises what loading the rewards raises; no weights are loaded.
    """
    # in this process, where they can be asked
    functions = replace(run, reward_process=False).load(*run.reward_specs)
    size = configs.family.image_size_of(configs.parts, *config.largest_size)
    return reward_memory(functions, config.sample_batch_size, size, device_type, run.reward_process)


def print_plans(cases: Sequence[Case], num_processes: int = 1, host_memory: float = 0.0) -> None:
    """Prints a plan for each case.

    Args:
        host_memory: bytes that the processes share; 0 for this machine's, which is not insisted on.

    Raises `ValueError` where there is no GPU and no `gpu_memory`, and where none of the cases fits.
    """
    capacity = _capacity(cases[0].config)
    configs = configs_of(cases[0].run, cases[0].config)
    problems = []
    for case in cases:
        full = case.run.full_finetune
        print(
            f"== {'all weights' if full else f'a LoRA of rank {case.run.lora_rank}'} in {capacity / GB:g} GB, recipe "
            f"{case.recipe.name}\n"
        )
        reward = memory_of_rewards(case.run, case.config, configs)
        try:
            config = with_family(case.config, configs.family)
            choice = choose(footprint_of(case.run, config, configs, full, reward), config, capacity, num_processes)
            if host_memory and (problem := host_problem(choice.plan, num_processes, host_memory)):
                raise ValueError(problem)
        except ValueError as error:
            problems.append(str(error))
            print(f"{error}\n")
            continue
        print(choice.plan.table())
        print("\n" + "\n".join(choice.reasons))
        if not host_memory and (problem := host_problem(choice.plan, num_processes, psutil.virtual_memory().total)):
            print(f"\non this machine: {problem}")
        print(f"\n{train_command(case, choice)}\n")
    print(
        f"{MARGIN:.0%} of the memory is left for fragmentation. Not measured but assumed: {CUDA_CONTEXT / GB:.1f} GB "
        f"for the CUDA context and {CUDA_WORKSPACES / GB:.1f} GB for workspaces. Rewards are counted as far as "
        "they tell their memory: those with a CLIP do."
    )
    if len(problems) == len(cases):
        raise ValueError(problems[0])


def host_problem(plan: Plan, num_processes: int, host_memory: float) -> str:
    """A sentence about host memory that the processes of a machine with `host_memory` bytes do not have, or ''."""
    needed = plan.host_bytes * num_processes
    if needed <= host_memory:
        return ""
    processes = f" for {num_processes} processes" if num_processes > 1 else ""
    return (
        f"training needs {needed / GB:.1f} GB of host memory{processes} (each {plan.host_parts}), and there are "
        f"{host_memory / GB:.1f}: take a machine with more, or a GPU with more"
    )


def _capacity(config: DDPOConfig) -> float:
    """Bytes of the GPU's memory to use: `gpu_memory`, else all that this machine's GPU has."""
    if config.gpu_memory is not None:
        return config.gpu_memory * GB
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here to plan for: say how many GB it has with --gpu-memory")
    return torch.cuda.get_device_properties(0).total_memory


def train_command(case: Case, choice: Choice) -> str:
    """The `ddpo-fast train` command line with the chosen settings, as a shell takes it.

    Options that have the recipe's value, or the default where the recipe has none, are left out, except the precision,
    whose default depends on the machine. So is the recipe that `train` chooses by itself.
    """
    words = ["ddpo-fast", "train"]
    unsaid = {"exp_name", "output_dir", *(() if case.names_recipe else ("recipe",))}
    for arguments, changes in ((case.run, {}), (case.config, {**choice.settings, "gpu_memory": None})):
        for option in fields(arguments):
            value = changes.get(option.name, getattr(arguments, option.name))
            default = option.default if option.default is not MISSING else {}
            default = case.recipe.settings.get(option.name, default)
            if option.name == "mixed_precision" or (value != default and option.name not in unsaid):
                words += _as_option(option.name, value)
    return shlex.join(words)


def _as_option(name: str, value: Any) -> list[str]:
    # A switch that is on needs no value. Not every one that is off has the form --no_x.
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def print_on_main(line: str) -> None:
    """Prints in one process of those that were launched together."""
    # the launcher sets RANK; there is no accelerator yet that could be asked which process this is
    if os.environ.get("RANK", "0") == "0":
        print(line)


def prediction(run: RunArguments, config: DDPOConfig) -> list[str]:
    """Lines about the memory that a run takes on a GPU with the settings as they are, and what would fit."""
    configs = configs_of(run, config)
    footprint = footprint_of(run, config, configs, run.full_finetune, memory_of_rewards(run, config, configs))
    plan = predict(footprint, config, num_processes())
    lines = ["", "predicted memory of a GPU, in GB:", plan.table()]
    if config.gpu_memory is None and not torch.cuda.is_available():
        return lines
    capacity = _capacity(config)
    fits = plan.peak <= capacity * (1 - MARGIN)
    say = (
        "which fits" if fits else "which does not fit: `ddpo-fast plan` with the same options, or --auto_memory, helps"
    )
    return [*lines, f"{plan.peak / GB:.2f} GB at its peak, and {capacity / GB:g} GB are there, {say}"]


def num_processes() -> int:
    """The processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def apply_auto_memory(
    run: RunArguments, config: DDPOConfig, device: torch.device | str, say: Callable[[str], Any] = print_on_main
) -> dict[str, Any]:
    """Sets in `config` what `auto_memory` chooses for the device, prints why by `say`, and returns the settings.

    Settings that are not at their defaults stay as they are. On a CPU nothing is chosen, unless `gpu_memory` is set.
    Raises `ValueError` where nothing fits.
    """
    device = torch.device(device)
    if device.type != "cuda" and config.gpu_memory is None:
        say("auto_memory: there is no GPU here, so nothing is chosen")
        return {}
    configs = configs_of(run, config)
    reward = memory_of_rewards(run, config, configs, device.type)
    footprint = footprint_of(run, config, configs, run.full_finetune, reward, device.type)
    choice = choose(footprint, with_family(config, configs.family), _capacity(config), num_processes())
    # a launcher sets how many processes share this machine
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if problem := host_problem(choice.plan, here, psutil.virtual_memory().total):
        raise ValueError(problem)
    for name, value in choice.settings.items():
        setattr(config, name, value)
    config.check()
    for line in _explanation(choice):
        say(f"auto_memory: {line}")
    return choice.settings


def _explanation(choice: Choice) -> Iterator[str]:
    yield f"a peak of {choice.plan.peak / GB:.2f} GB is predicted, while {choice.plan.peak_phase}"
    yield from choice.reasons
