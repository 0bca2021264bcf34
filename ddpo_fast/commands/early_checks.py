"""What can be found wrong with a run before its model is loaded and its folder is made."""

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
from ddpo_fast.model_configs import ModelConfigs, check_model
from ddpo_fast.processes import launch_problem
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.hub import push_problem
from ddpo_fast.run_folder.run_log import folder_problem, output_folder
from ddpo_fast.unet import attention_problem


def check_before_loading(run: RunArguments, config: DDPOConfig) -> ModelConfigs:
    """What the model's config files say. Raises `ValueError` or `OSError` in one sentence."""
    if problem := launch_problem():
        raise ValueError(problem)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.require_backend(config.kernel_backend, device)
    if config.attention == "xformers" and (problem := attention_problem("xformers", (), device)):
        raise ValueError(f"attention is 'xformers', which cannot run: {problem}")
    if config.cuda_graphs and (problem := cuda_graphs.problem(torch.device(device))):
        raise ValueError(f"cuda_graphs is True, but {problem}: leave it out")
    if config.uses_deepspeed:
        zero_settings(config, config.mixed_precision)
    folder = output_folder(config)
    try:
        if not checkpoint.continues_in(folder, config.resume_from) and (problem := folder_problem(folder)):
            raise ValueError(problem)
    # a name that no file system takes
    except OSError as error:
        raise ValueError(f"output_dir is {str(folder)!r}, which cannot be ({error.strerror}): choose another") from None
    check_can_write(folder, "output_dir")
    if config.push_to_hub and (problem := push_problem(folder.absolute().name)):
        raise ValueError(f"push_to_hub is True, but {problem}")
    return check_model(run.pretrained_model, run.pretrained_revision, config.sample_num_steps, config.sample_eta)


def check_can_write(folder: Path, option: str) -> None:
    """Tries to write where `folder` is or will be. Raises `ValueError` naming `option`."""
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
    reward_function: rewards.RewardFunction, shown: tuple[tuple[str, ...], tuple[Any, ...]], size: tuple[int, int]
) -> None:
    """Scores two gray images of the model's size. Raises `ValueError` for what cannot be trained on."""
    prompts, metadata = (part[:2] * (3 - len(part[:2])) for part in shown)
    try:
        rewards.score(reward_function, torch.full((2, 3, *size), 0.5), prompts[:2], metadata[:2])
    except RuntimeError as error:
        raise ValueError(f"{error} (when it was tried on two gray images of {size[0]} x {size[1]})") from error
