"""Diffusion schedulers as a table: each step's mean is `c_x * latents + c_m * model_output`, its std is `sigma`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """(c_x, c_m, sigma) of every timestep, [num_train_timesteps, 3] fp32 on the device: lookups never wait."""

    table: torch.Tensor

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_x, c_m, sigma) for integer `timesteps`, each of their shape."""
        # `take`, as indexing by a tensor without dimensions would wait for its value
        c_x, c_m, sigma = (self.table[:, i].take(timesteps) for i in range(3))
        return c_x, c_m, sigma

    @classmethod
    def of(cls, scheduler: Any, eta: float, device: torch.device) -> NoiseSchedule:
        """`from_scheduler`, made once for each scheduler, step count and eta."""
        tables = _TABLES.setdefault(scheduler, {})
        key = (scheduler.num_inference_steps, scheduler.config.prediction_type, eta, device)
        if key not in tables:
            tables[key] = cls.from_scheduler(scheduler, eta, device)
        return tables[key]

    @classmethod
    def from_scheduler(cls, scheduler: Any, eta: float, device: torch.device | str) -> NoiseSchedule:
        """The stochastic DDIM steps (arXiv 2010.02502, eq. 12 and 16) of a diffusers scheduler after `set_timesteps`.

        Computed in fp64. The previous timestep is at least 0, as in TRL: the last step keeps a positive std and
        `final_alpha_cumprod` is not used. Raises `ValueError` for a scheduler whose step is not linear.
        """
        config = scheduler.config
        if scheduler.num_inference_steps is None:
            raise ValueError("the scheduler has no timesteps yet: call scheduler.set_timesteps first")
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {config.prediction_type!r} but must be one of {PREDICTION_TYPES}")
        for name in ("clip_sample", "thresholding"):
            if config.get(name):
                raise ValueError(f"the scheduler's {name} is on, which makes its step not Gaussian: turn it off")
        if int(scheduler.timesteps.max()) >= config.num_train_timesteps:
            raise ValueError(
                f"{scheduler.num_inference_steps} sampling steps reach past the last of {config.num_train_timesteps} "
                "timesteps: use fewer"
            )
        alpha = scheduler.alphas_cumprod.to("cpu", torch.float64)
        stride = config.num_train_timesteps // scheduler.num_inference_steps
        previous = alpha[(torch.arange(len(alpha)) - stride).clamp(min=0)]
        variance = eta**2 * (1 - previous) / (1 - alpha) * (1 - alpha / previous)
        direction = (1 - previous - variance).clamp(min=0).sqrt()
        c_x, c_m = _mean_coefficients(config.prediction_type, alpha, previous, direction)
        return cls(torch.stack([c_x, c_m, variance.sqrt()], dim=1).to(device, torch.float32))


_TABLES: WeakKeyDictionary[Any, dict[tuple, NoiseSchedule]] = WeakKeyDictionary()


def _mean_coefficients(
    prediction_type: str, alpha: torch.Tensor, previous: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sqrt(previous) * x0 + direction * eps` with x0 and eps written in the latents and the model's output."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return previous.sqrt() / signal, direction - previous.sqrt() * noise / signal
    if prediction_type == "sample":
        return direction / noise, previous.sqrt() - direction * signal / noise
    return previous.sqrt() * signal + direction * noise, direction * signal - previous.sqrt() * noise
