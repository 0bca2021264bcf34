"""What can be found wrong with a run before its model is loaded and its folder is made."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, whoami

from ddpo_fast import checkpoint, cuda_graphs, ops, rewards
from ddpo_fast.attention import attention_problem
from ddpo_fast.command_options import RunArguments
from ddpo_fast.config import DDPOConfig
from ddpo_fast.pipeline import model_folder
from ddpo_fast.run_log import folder_problem
from ddpo_fast.zero_settings import zero_settings


def check_before_loading(run: RunArguments, config: DDPOConfig) -> None:
    """Raises `ValueError` or `OSError` in one sentence."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.require_backend(config.kernel_backend, device)
    if config.attention == "xformers" and (problem := attention_problem("xformers", (), device)):
        raise ValueError(f"attention is 'xformers', which cannot run: {problem}")
    if config.cuda_graphs and (problem := cuda_graphs.problem(torch.device(device))):
        raise ValueError(f"cuda_graphs is True, but {problem}: leave it out")
    if config.uses_deepspeed:
        zero_settings(config, config.mixed_precision)
    folder = Path(config.output_dir or "").expanduser()
    if not checkpoint.goes_on_in(folder, config.resume_from) and (problem := folder_problem(folder)):
        raise ValueError(problem)
    check_can_write(folder, "output_dir")
    if config.push_to_hub:
        check_hub()


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


def check_hub() -> None:
    """Raises `ValueError` if the trained model could not be pushed."""
    try:
        whoami()
    except errors.LocalTokenNotFoundError:
        problem = "nobody is logged in here: run `hf auth login`, or set HF_TOKEN"
    except errors.OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set: unset it"
    except OSError as error:
        # of HTTP and of the network
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"the Hub does not answer or refuses the token ({said})"
    else:
        return
    raise ValueError(f"push_to_hub is True, but {problem}; or leave it out, and push the folder final/ later")


def image_size(model: str) -> tuple[int, int]:
    """(height, width) in pixels of a model's images, from its configs; 512 x 512 where they are not here yet."""
    folder = model_folder(model)
    if folder is None:
        return 512, 512
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
        size, scale = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
        height, width = (size, size) if isinstance(size, int) else size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"pretrained_model is {model!r}, whose configs cannot be read: {error!r}") from None
    return height * scale, width * scale


def try_reward(
    reward_function: rewards.RewardFunction, shown: tuple[tuple[str, ...], tuple[Any, ...]], size: tuple[int, int]
) -> None:
    """Scores two gray images of the model's size. Raises `ValueError` for what cannot be trained on."""
    prompts, metadata = (part[:2] * (3 - len(part[:2])) for part in shown)
    try:
        rewards.score(reward_function, torch.full((2, 3, *size), 0.5), prompts[:2], metadata[:2])
    except RuntimeError as error:
        raise ValueError(f"{error} (when it was tried on two gray images of {size[0]} x {size[1]})") from error
