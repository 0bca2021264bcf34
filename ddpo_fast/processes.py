"""One run on many processes: how they find each other, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object

from ddpo_fast.config import DDPOConfig

T = TypeVar("T")


def make_accelerator(config: DDPOConfig, output_dir: Path) -> Accelerator:
    """The processes that torchrun, `deepspeed` or `accelerate launch` started, over gloo where there is no GPU."""
    project: dict[str, Any] = {"project_dir": str(output_dir), "logging_dir": str(output_dir), **config.project_kwargs}
    project["automatic_checkpoint_naming"] = False
    many_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(
        log_with=config.log_with,
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(**project),
        # TRL's count: an update sums over images and timesteps
        gradient_accumulation_steps=config.train_gradient_accumulation_steps * config.num_train_timesteps,
        # accelerate would leave each of them alone
        **{**({"cpu": True} if many_on_cpu else {}), **config.accelerator_kwargs},
    )


def with_launch_settings(config: DDPOConfig, accelerator: Accelerator) -> DDPOConfig:
    """The settings as `accelerate launch` completes them: with its precision, and with DeepSpeed if it has settings
    for that and `config` has none. `config` itself where there is nothing to complete.

    Raises `ValueError` where they do not fit together.
    """
    with_deepspeed = not config.uses_deepspeed and getattr(accelerator.state, "deepspeed_plugin", None) is not None
    if config.mixed_precision == accelerator.mixed_precision and not with_deepspeed:
        return config
    completed = copy(config)
    completed.mixed_precision = accelerator.mixed_precision
    completed.launched_with_deepspeed = with_deepspeed
    completed.check()
    return completed


def launch_problem() -> str:
    """Why a run cannot be split as `accelerate launch` was told, or ''."""
    for kind, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            return (
                f"accelerate's config asks for {kind}, which is not supported: choose MULTI_GPU there (or NO), or "
                "start with torchrun; --zero 2 or 3 splits a run's memory among its processes"
            )
    return ""


def broadcast_from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def all_reduce_min(accelerator: Accelerator, value: int) -> int:
    """The smallest of all processes' values: they must not differ in how they split their work."""
    if accelerator.num_processes == 1:
        return value
    least = torch.tensor(value, device=accelerator.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def run_or_raise_on_all(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """`work()` in every process; if it raises in one, all raise, as the others would wait for that one for ever.

    Raises the process's own error, or a `RuntimeError` that says which process stopped, and why.
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
