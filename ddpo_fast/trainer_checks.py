"""What can be wrong with a trainer's arguments, checked in three moments: each as early as it can be known.

All raise `ValueError` in one sentence with the setting, its value and the remedy.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from ddpo_fast import cuda_graphs
from ddpo_fast.batch_sizes import BatchSizes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.pipeline import check_sampling
from ddpo_fast.processes import launch_problem
from ddpo_fast.rollout import PipelineRollout, Rollout
from ddpo_fast.user_functions import require_function


def before_launch(config: DDPOConfig, reward_function: Any, prompt_function: Any, pipeline: Any) -> None:
    """Before anything else: the settings, the functions, and the sampler's steps."""
    config.check()
    if problem := launch_problem():
        raise ValueError(problem)
    require_function("reward_function", reward_function)
    require_function("prompt_function", prompt_function)
    check_sampling(pipeline, config.sample_num_steps, config.sample_eta)


def after_launch(settings: DDPOConfig, accelerator: Accelerator, pipeline: Any) -> None:
    """Once the number of processes and the device are known."""
    if settings.seed + accelerator.num_processes > 2**32:
        raise ValueError(f"seed is {settings.seed}, and every process adds its number: use a smaller one")
    if settings.optimizer_in_backward and accelerator.num_processes > 1:
        raise ValueError("optimizer_in_backward is True, which is for one process: leave it out")
    if settings.cuda_graphs:
        problem = cuda_graphs.problem(accelerator.device)
        if pipeline.autocast is not None:
            problem = "this pipeline has an autocast, whose casts are forgotten before a graph reads them"
        if problem:
            raise ValueError(f"cuda_graphs is True, but {problem}: leave it out")


def before_training(settings: DDPOConfig, rollout: Rollout | PipelineRollout, sizes: BatchSizes) -> None:
    """Once the networks are on the device, as how many pairs fit a UNet call is known only then."""
    if settings.offload_frozen and isinstance(rollout, PipelineRollout):
        raise ValueError("offload_frozen is True, but the pipeline's own __call__ wants its networks on the device")
    if not settings.optimizer_in_backward:
        return
    calls = -(-settings.pairs_per_update // sizes.micro_batch_size)
    if calls > 1:
        raise ValueError(
            f"optimizer_in_backward is True, but an update takes {calls} UNet calls, and it must be one: leave it out, "
            "or make updates smaller"
        )
