"""Checks of a run that are made before the model's weights are loaded and the run's folder exists."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ddpo_fast import cuda_graphs, ops, rewards
from ddpo_fast.commands.options import RunArguments
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import zero_settings
from ddpo_fast.families import with_family
from ddpo_fast.model_configs import ModelConfigs, check_model
from ddpo_fast.processes import check_launch
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.hub import push_problem
from ddpo_fast.run_folder.run_log import folder_problem, output_folder
from ddpo_fast.unet import attention_problem


def check_before_loading(run: RunArguments, config: DDPOConfig) -> ModelConfigs:
    """Checks launch, device, folder, Hub and model, and returns what the model's config files say.

    Raises `ValueError` or `OSError` in one sentence.
    """
    # how this process was launched, and what its device can run
    check_launch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.require_backend(config.kernel_backend, device)
    if config.attention == "xformers" and (problem := attention_problem("xformers", (), device)):
        raise ValueError(f"attention is 'xformers', which cannot run: {problem}")
    if config.cuda_graphs:
        cuda_graphs.check(torch.device(device))
    if config.uses_deepspeed:
        zero_settings(config, config.mixed_precision)

    # the folder that the run will write to
    folder = output_folder(config)
    try:
        if not checkpoint.continues_in(folder, config.resume_from) and (problem := folder_problem(folder)):
            raise ValueError(problem)
    # a name that is too long for the file system, or of characters that it does not take
    except OSError as error:
        raise ValueError(f"output_dir is {str(folder)!r}, which cannot be ({error.strerror}): choose another") from None
    check_can_write(folder, "output_dir")

    # the Hub and the model, which may be on another machine
    if config.push_to_hub and (problem := push_problem(folder.absolute().name)):
        raise ValueError(f"push_to_hub is True, but {problem}")
    configs = check_model(run.pretrained_model, run.pretrained_revision, config.sample_num_steps, config.sample_eta)
    configs.family.check_settings(configs.parts, config)
    with_family(config, configs.family)
    return configs


def check_can_write(folder: Path, option: str) -> None:
    """Writes a temporary file into `folder`, or into its nearest parent that exists.

    Raises `ValueError` naming `option` if that fails.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".ddpo_fast") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise ValueError(
            f"{option} is {str(folder)!r}, but nothing can be written in {str(there)!r} ({error.strerror}): choose "
            "another folder"
        ) from None


def try_reward(
    reward_function: rewards.RewardFunction, examples: tuple[tuple[str, ...], tuple[Any, ...]], size: tuple[int, int]
) -> None:
    """Calls the reward function with two gray images of the model's size and the first two of (prompts, metadata).

    Raises `ValueError` for a function that fails or returns what cannot be trained on.
    """
    # two prompts, also where there is only one: it is then given twice
    prompts, metadata = (part[:2] * (3 - len(part[:2])) for part in examples)
    try:
        rewards.score(reward_function, torch.full((2, 3, *size), 0.5), prompts[:2], metadata[:2])
    except RuntimeError as error:
        raise ValueError(f"{error} (when it was tried on two gray images of {size[0]} x {size[1]})") from error
