"""Flow matching's steps as a table: for each step `c_x`, `c_m` and `sigma` (see step_table.py), and its credit.

The noise levels s of a chain are those that diffusers' `FlowMatchEulerDiscreteScheduler` has after `set_timesteps`, so
that the network sees what it sees in diffusers. With N steps and u falling evenly from 1, they are, and then 0,

    Stable Diffusion 3    s = shift u / (1 + (shift - 1) u), u down to shift / 1000 / (1 + (shift - 1) / 1000)
    FLUX.1 dev            s = e^mu / (e^mu + 1 / u - 1),     u down to 1 / N, mu linear in the number of image tokens
    FLUX.1 schnell        s = u,                             u down to 1 / N
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpo_fast.step_credit import LAYOUT_VARIANCE, step_credits
from ddpo_fast.step_table import FLOW_SAMPLERS, Prediction, Rows, ode


def flow_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Makes the scheduler for a flow-matching model whose `scheduler_config.json` is `config`.

    `stochastic_sampling` is off: noise is the sampler's part. Raises `ValueError` for a scheduler of another kind, and
    for settings that it cannot use.
    """
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if not (isinstance(name, str) and name.startswith("FlowMatch")):
        raise ValueError(
            f"its scheduler is {name!r}, which is not of flow matching: put a FlowMatchEulerDiscreteScheduler in its "
            "place"
        )
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known and key != "stochastic_sampling"}
    if settings.get("invert_sigmas"):
        raise ValueError("its scheduler's invert_sigmas is true, and its chain starts at an image: set it to false")
    shift = settings.get("shift", 1.0)
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < math.inf:
        raise ValueError(f"its scheduler's shift is {shift!r} but must be a number above 0")
    try:
        return FlowMatchEulerDiscreteScheduler(**settings)
    except (ImportError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"its scheduler's config cannot be used: {error}") from error


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu of a scheduler's `set_timesteps` for images of `tokens` tokens: linear, as in diffusers' pipelines."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    # diffusers' order of operations, for its bits
    slope = (most - least) / (many - few)
    return tokens * slope + (least - slope * few)


def noise_levels(scheduler: Any) -> Tensor:
    """The noise levels s of a scheduler after `set_timesteps`, from the first step's to 0: [N + 1] fp64 on the CPU.

    Raises `ValueError` for a scheduler of another kind, and for levels that do not fall from step to step.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"the pipeline's scheduler is a {type(scheduler).__name__}, and only FlowMatchEulerDiscreteScheduler has "
            "the steps of flow matching: leave that in its place"
        )
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("the scheduler has no timesteps yet: call scheduler.set_timesteps first")
    levels = scheduler.sigmas.to("cpu", torch.float64)
    # pure noise may be rounded to just above 1
    if not (levels[0] < 1 + 1e-6 and levels[-1] == 0 and (levels.diff() < 0).all()):
        raise ValueError(
            f"the scheduler's {scheduler.num_inference_steps} steps do not each lead to less noise, from 1 or less to "
            "0: use another number of steps (sample_num_steps), or repair the scheduler's config"
        )
    return levels.clamp(max=1)


def flow_table(levels: Tensor, sampler: str, level: float, credit: str = "none") -> Tensor:
    """(c_x, c_m, sigma, credit) of the N steps between `levels` [N + 1] fp64: [N, 4] fp32.

    Args:
        sampler: one of `FLOW_SAMPLERS`.
        level: of the sampler's noise, the setting `sample_eta`; 0 is the ODE for every sampler.
        credit: the setting `step_credit`.

    Raises `ValueError` for an unknown `credit`.
    """
    c_x, c_m, sigma = _rows(levels, sampler, level)
    s = levels[:-1]
    a = 1 - s
    # what a step leaves of latents whose components have the variance v, see step_credit.py
    best = (s - a * LAYOUT_VARIANCE) / (a**2 * LAYOUT_VARIANCE + s**2)
    credits = step_credits(credit, c_m, sigma, torch.arange(len(s)), c_x + c_m * best)
    return torch.stack([c_x, c_m, sigma, credits], dim=1).float()


def flow_predictions(levels: Tensor, sampler: str, level: float) -> list[Prediction]:
    """What each of the N steps between `levels` predicts of the final latents; the arguments are `flow_table`'s.

    x0 = x - s m, and a step's mean is c_x x + c_m m.
    """
    c_x, c_m, sigma = _rows(levels, sampler, level)
    of_mean = -levels[:-1] / c_m
    return [Prediction(*row) for row in torch.stack([1 - of_mean * c_x, of_mean, sigma], dim=1).tolist()]


def _rows(levels: Tensor, sampler: str, level: float) -> Rows:
    return FLOW_SAMPLERS[sampler](levels, level) if level > 0 else ode(levels)
