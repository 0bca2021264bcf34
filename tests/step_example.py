"""Inputs of a denoising step for the tests of all ops that compute one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from op_checks import DEVICE, in_layout

from ddpo_fast.ddim import DDIMCoefficients
from ddpo_fast.tiny_sd.build import SCHEDULER

GUIDANCE = 5.0
SHAPES = [(1, 4, 1, 1), (2, 4, 9, 7), (3, 1, 3, 41), (5, 4, 16, 16)]


@dataclass
class StepExample:
    model_output: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    table: torch.Tensor
    timesteps: torch.Tensor
    guidance_scale: float | None

    @property
    def guided(self) -> bool:
        return self.guidance_scale is not None

    def in_double(self) -> StepExample:
        doubles = [v.double() for v in (self.model_output, self.latents, self.noise, self.table)]
        return StepExample(*doubles, self.timesteps, self.guidance_scale)

    def arguments(self) -> tuple:
        return self.model_output, self.latents, self.noise, self.table, self.timesteps, self.guidance_scale


def scheduler_table(
    prediction_type: str = "epsilon", steps: int = 50, credit: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable Diffusion's coefficients, and the timesteps of a chain from noise to image."""
    scheduler = DDIMScheduler(**{**SCHEDULER, "prediction_type": prediction_type})
    scheduler.set_timesteps(steps)
    return DDIMCoefficients.from_scheduler(scheduler, 1.0, DEVICE, credit).table, scheduler.timesteps.to(DEVICE)


def step_example(
    shape=(2, 4, 9, 7),
    dtype=torch.float32,
    guided=True,
    channels_last=False,
    seed=0,
    prediction_type="epsilon",
    credit="none",
) -> StepExample:
    """Random latents at timesteps that include the first and the last of the chain."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0]
    table, chain = scheduler_table(prediction_type, credit=credit)
    output = torch.randn(count * (2 if guided else 1), *shape[1:], generator=generator).to(DEVICE, dtype)
    latents, noise = torch.randn(2, *shape, generator=generator).to(DEVICE)
    timesteps = chain[torch.linspace(0, len(chain) - 1, max(count, 1)).long()[:count].to(DEVICE)]
    if output.ndim == 4:
        output = in_layout(output, channels_last)
    return StepExample(output, latents, noise, table, timesteps, GUIDANCE if guided else None)
