"""One run on many processes: the accelerator, the settings that it was launched with, and collective calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object

from ddpo_fast import cuda_graphs
from ddpo_fast.config import DDPOConfig

T = TypeVar("T")


def make_accelerator(config: DDPOConfig, output_dir: Path) -> Accelerator:
    """The accelerator of a run, over the processes that torchrun, `deepspeed` or `accelerate launch` started.

    `accelerator_kwargs` take precedence over what is chosen here.
    """
    project: dict[str, Any] = {"project_dir": str(output_dir), "logging_dir": str(output_dir), **config.project_kwargs}
    # checkpoints are written by `run_folder.checkpoint`, not by accelerate
    project["automatic_checkpoint_naming"] = False
    # Without a GPU accelerate starts no process group by itself, and each process would train alone; with `cpu` it
    # starts one over gloo.
    many_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(
        log_with=config.log_with,
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(**project),
        # TRL's value, which counts a backward pass for each timestep of a batch
        gradient_accumulation_steps=config.train_gradient_accumulation_steps * config.num_train_timesteps,
        **{**({"cpu": True} if many_on_cpu else {}), **config.accelerator_kwargs},
    )


def with_launch_settings(config: DDPOConfig, accelerator: Accelerator) -> DDPOConfig:
    """`config` completed by the settings of `accelerate launch`: a copy, or `config` itself if nothing is missing.

    `mixed_precision` becomes the accelerator's, also where it is None in `config`. DeepSpeed trains if accelerate has
    settings for it and `config` has none. Raises `ValueError` if these settings contradict the config, or if a setting
    needs other processes or another device than were started.
    """
    with_deepspeed = not config.uses_deepspeed and getattr(accelerator.state, "deepspeed_plugin", None) is not None
    if config.mixed_precision != accelerator.mixed_precision or with_deepspeed:
        config = copy(config)
        config.mixed_precision = accelerator.mixed_precision
        config.launched_with_deepspeed = with_deepspeed
        config.check()
    if config.seed + accelerator.num_processes > 2**32:
        raise ValueError(
            f"seed is {config.seed}, and each process adds its index, after which it must be below 2**32: use a "
            "smaller seed"
        )
    if config.optimizer_in_backward and accelerator.num_processes > 1:
        raise ValueError("optimizer_in_backward is True, which is for one process: leave it out")
    if config.cuda_graphs:
        cuda_graphs.check(accelerator.device)
    # a copy, in which `BatchSizes.settle_graphs` decides
    return copy(config) if config.cuda_graphs is None else config


def check_launch() -> None:
    """Raises `ValueError` for distributed training that accelerate's config asks for and that is not supported."""
    for kind, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate's config asks for {kind}, which is not supported: choose MULTI_GPU there (or NO), or "
                "start with torchrun; --zero 2 or 3 splits a run's memory among its processes"
            )


def broadcast_from_main(accelerator: Accelerator | PartialState, value: T) -> T:
    """The main process's value, in every process; the value has to be picklable."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def all_reduce_min(accelerator: Accelerator, value: int) -> int:
    """The smallest of the processes' values, in every process."""
    if accelerator.num_processes == 1:
        return value
    smallest = torch.tensor(value, device=accelerator.device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def all_reduce_max(accelerator: Accelerator, value: int) -> int:
    """The largest of the processes' values, in every process."""
    return -all_reduce_min(accelerator, -value)


def run_or_raise_on_all(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Returns `work()`. Every process calls it, and if `work` raises in one of them, it raises in all.

    If only one process raised, the others would wait for ever in their next collective call. A process raises its own
    error, or else a `RuntimeError` that says which process stopped, and why.
    """
    if accelerator.num_processes == 1:
        return work()
    result, own = None, None
    try:
        result = work()
    except Exception as error:
        own = error
    problems = gather_object([f"{type(own).__name__}: {own}" if own is not None else ""])
    if own is not None:
        raise own
    for process, problem in enumerate(problems):
        if problem:
            raise RuntimeError(f"process {process} stopped: {problem}")
    return result  # type: ignore[return-value]
