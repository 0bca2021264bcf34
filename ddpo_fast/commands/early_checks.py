"""Checks of a run that are made before the model's weights are loaded and the run's folder exists."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from ddpo_fast import cuda_graphs, ops, rewards
from ddpo_fast.commands.options import RunArguments
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import zero_settings
from ddpo_fast.families import with_family
from ddpo_fast.lora import check_kohya
from ddpo_fast.model_configs import ModelConfigs, check_model
from ddpo_fast.processes import check_launch
from ddpo_fast.quantize_frozen import check_is_lora
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.hub import push_problem
from ddpo_fast.run_folder.run_log import folder_problem, output_folder
from ddpo_fast.unet import attention_problem


def check_before_loading(run: RunArguments, config: DDPOConfig, token: str = "") -> ModelConfigs:
    """Checks launch, device, folder, Hub and model, and returns what the model's config files say.

    Args:
        token: for the Hub, if one was given.

    Raises `ValueError` or `OSError` in one sentence.
    """
    # how this process was launched, and what its device can run
    check_launch()
    device = device_of(config)
    ops.require_backend(config.kernel_backend, device.type)
    if config.attention == "xformers" and (problem := attention_problem("xformers", (), device.type)):
        raise ValueError(f"attention is 'xformers', which cannot run: {problem}")
    if config.cuda_graphs:
        cuda_graphs.check(device)
    check_is_lora(config.quantize_frozen, not run.full_finetune)
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
    if config.push_to_hub and (problem := push_problem(config.hub_model_id or folder.absolute().name, token)):
        raise ValueError(f"push_to_hub is True, but {problem}")
    configs = check_model(
        run.pretrained_model,
        run.pretrained_revision,
        config.sample_num_steps,
        config.sample_eta,
        single_file_config=run.single_file_config,
    )
    configs.family.check_settings(configs.parts, config)
    if config.kohya_lora:
        check_kohya(configs.family.network, not run.full_finetune)
    with_family(config, configs.family)
    return configs


def device_of(config: DDPOConfig) -> torch.device:
    """The device that accelerate will give this process, before there is an accelerator."""
    uses_cpu = config.accelerator_kwargs.get("cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    if uses_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


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
    reward_function: rewards.RewardFunction,
    examples: tuple[tuple[str, ...], tuple[Any, ...]],
    size: tuple[int, int],
    device: torch.device,
) -> None:
    """Calls the reward function with two gray images of the model's size and the first two of (prompts, metadata).

    The images are on the run's device, as those of training will be.

    Raises `ValueError` for a function that fails or returns what cannot be trained on.
    """
    # two prompts, also where there is only one: it is then given twice
    prompts, metadata = (part[:2] * (3 - len(part[:2])) for part in examples)
    try:
        rewards.score(reward_function, torch.full((2, 3, *size), 0.5, device=device), prompts[:2], metadata[:2])
    except RuntimeError as error:
        raise ValueError(f"{error} (when it was tried on two gray images of {size[0]} x {size[1]})") from error
