"""Diffusion schedulers as a table: each step's mean is `c_x * latents + c_m * model_output`, its std is `sigma`."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import DDIMScheduler

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# what a DDIM scheduler takes from the config of any scheduler that adds the noise that DDIM takes away
CARRIED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "rescale_betas_zero_snr",
)


def ddim_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """A DDIM scheduler for a model that was made for the diffusers scheduler with this `scheduler_config.json`.

    As `StableDiffusionPipeline`'s constructor repairs old configs, `clip_sample` is off and `steps_offset` is 1;
    thresholding, which is for pixels, is off too. 'linspace' would end with a step without noise at timestep 0, whose
    log-prob does not exist: it becomes 'trailing', which is the same to within one timestep a step without that one.
    Raises `ValueError` for a scheduler of another kind of noise.
    """
    name = config.get("_class_name", "DDIMScheduler")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if kind is None:
        raise ValueError(f"its scheduler is {name!r}, which is none of diffusers'")
    defaults = {key: value.default for key, value in inspect.signature(kind.__init__).parameters.items()}
    given = {**defaults, **config}
    flow = name.startswith("FlowMatch") or given.get("use_flow_sigmas") or "flow" in str(given.get("prediction_type"))
    # a scheduler whose package is missing here has no defaults, and its file says all
    other = "beta_start" not in given or "snr_shift_scale" in given or given.get("timestep_type") == "continuous"
    if flow or other:
        what = "of flow matching" if flow else "of another kind of noise than DDIM's"
        raise ValueError(f"its scheduler is {name}, which is {what}")
    settings = {key: given[key] for key in CARRIED if key in given}
    _check_choices(settings)
    if settings.get("timestep_spacing") == "linspace":
        _say_once("timestep_spacing of the model is 'linspace', whose last step has no noise: 'trailing' is used")
        settings["timestep_spacing"] = "trailing"
    try:
        scheduler = DDIMScheduler(
            **settings,
            clip_sample=False,
            thresholding=False,
            steps_offset=1,
            # the last step ends at the first timestep, as in `DDIMCoefficients`
            set_alpha_to_one=config.get("set_alpha_to_one", False),
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its scheduler's config cannot be used: {error}") from error
    _check_noise(scheduler)
    return scheduler


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


def _check_choices(settings: Mapping[str, Any]) -> None:
    for key, choices in (
        ("prediction_type", PREDICTION_TYPES),
        ("timestep_spacing", SPACINGS),
        ("beta_schedule", BETA_SCHEDULES),
    ):
        value = settings.get(key, choices[0])
        if value not in choices and not (key == "beta_schedule" and settings.get("trained_betas") is not None):
            raise ValueError(f"its scheduler's {key} is {value!r} but must be one of {choices}")
    steps = settings.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"its scheduler's num_train_timesteps is {steps!r} but must be a whole number of at least 1")


def _check_noise(scheduler: Any) -> None:
    alphas, config = scheduler.alphas_cumprod, scheduler.config
    if len(alphas) != config.num_train_timesteps:
        raise ValueError(
            f"its scheduler's trained_betas are {len(alphas)} but num_train_timesteps is {config.num_train_timesteps}"
        )
    if not (torch.isfinite(alphas).all() and (alphas >= 0).all() and (alphas < 1).all() and (alphas.diff() < 0).all()):
        raise ValueError("its scheduler's betas must lie between 0 and 1, so that every timestep has more noise")
    if config.prediction_type == "epsilon" and alphas[-1] == 0:
        raise ValueError(
            "its scheduler ends in pure noise (zero terminal SNR), from which a model that predicts 'epsilon' can tell "
            "nothing: set rescale_betas_zero_snr to false, or prediction_type to 'v_prediction' if it was trained so"
        )


def check_steps(scheduler: Any, steps: int, eta: float) -> None:
    """Raises `ValueError` where `steps` stochastic DDIM steps of a scheduler have no density."""
    _check_ddim(scheduler)
    if steps > scheduler.config.num_train_timesteps:
        raise ValueError(_too_many(steps, scheduler.config.num_train_timesteps))
    trial = copy.copy(scheduler)
    trial.set_timesteps(steps)
    DDIMCoefficients.from_scheduler(trial, eta, "cpu")


def _check_ddim(scheduler: Any) -> None:
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"the pipeline's scheduler is a {type(scheduler).__name__}, and only DDIM's steps have the log-probs that "
            "training needs: leave the DDIMScheduler in its place, or use "
            "DDIMScheduler.from_config(scheduler.config, clip_sample=False)"
        )


def _too_many(steps: int, most: int) -> str:
    return f"{steps} sampling steps reach past the last of {most} timesteps: use fewer (sample_num_steps)"


@dataclass(frozen=True)
class DDIMCoefficients:
    """(c_x, c_m, sigma) of every timestep, [num_train_timesteps, 3] fp32 on the device: lookups never wait."""

    table: torch.Tensor

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_x, c_m, sigma) for integer `timesteps`, each of their shape."""
        # `take`, as indexing by a tensor without dimensions would wait for its value
        c_x, c_m, sigma = (self.table[:, i].take(timesteps) for i in range(3))
        return c_x, c_m, sigma

    @classmethod
    def of(cls, scheduler: Any, eta: float, device: torch.device) -> DDIMCoefficients:
        """`from_scheduler`, made once for each eta and for each state that a scheduler comes in."""
        config = scheduler.config
        tables = _TABLES.setdefault(scheduler, {})
        key = (
            _sampled(scheduler),
            scheduler.num_inference_steps,
            scheduler.alphas_cumprod.cpu().numpy().tobytes(),
            (config.prediction_type, config.get("clip_sample"), config.get("thresholding")),
            eta,
            device,
        )
        if key not in tables:
            tables[key] = cls.from_scheduler(scheduler, eta, device)
        return tables[key]

    @classmethod
    def from_scheduler(cls, scheduler: Any, eta: float, device: torch.device | str) -> DDIMCoefficients:
        """The stochastic DDIM steps (arXiv 2010.02502, eq. 12 and 16) of a diffusers scheduler after `set_timesteps`.

        Computed in fp64. A step leads from a sampled timestep to the next one that is sampled, the last step to
        timestep 0, where as in TRL it keeps a positive std: `final_alpha_cumprod` is not used. The rows of other
        timesteps are TRL's, `num_train_timesteps // num_inference_steps` apart.

        Raises `ValueError` for a scheduler whose step is not linear, and where a step with `eta` has no noise.
        """
        _check_linear(scheduler)
        alpha = scheduler.alphas_cumprod.to("cpu", torch.float64)
        sampled = torch.tensor(_sampled(scheduler))
        before = (torch.arange(len(alpha)) - len(alpha) // scheduler.num_inference_steps).clamp(min=0)
        before[sampled] = torch.cat([sampled[1:], sampled.new_zeros(1)])
        previous = alpha[before]
        variance = eta**2 * (1 - previous) / (1 - alpha) * (1 - alpha / previous)
        direction = (1 - previous - variance).clamp(min=0).sqrt()
        c_x, c_m = _mean_coefficients(scheduler.config.prediction_type, alpha, previous, direction)
        table = torch.stack([c_x, c_m, variance.sqrt()], dim=1)
        if not torch.isfinite(table[sampled]).all():
            at = int(sampled[~torch.isfinite(table[sampled]).all(dim=1)][0])
            raise ValueError(f"the step from timestep {at} is undefined: the latents there are pure noise")
        if eta > 0 and (table[sampled, 2] == 0).any():
            raise ValueError(
                f"{scheduler.num_inference_steps} steps with timestep_spacing {scheduler.config.timestep_spacing!r} "
                "and steps_offset "
                f"{scheduler.config.steps_offset} sample timestep 0, where a step has no noise and no log-prob: use "
                "'leading' with steps_offset 1, or 'trailing', and fewer steps (sample_num_steps)"
            )
        return cls(table.to(device, torch.float32))


_TABLES: WeakKeyDictionary[Any, dict[tuple, DDIMCoefficients]] = WeakKeyDictionary()
# a scheduler's tensor of timesteps and its values, which are on the device
_SAMPLED: WeakKeyDictionary[Any, tuple[torch.Tensor, tuple[int, ...]]] = WeakKeyDictionary()


def _sampled(scheduler: Any) -> tuple[int, ...]:
    """The timesteps that are sampled; the host waits for them once after `set_timesteps`, which waits too."""
    kept = _SAMPLED.get(scheduler)
    if kept is None or kept[0] is not scheduler.timesteps:
        kept = _SAMPLED[scheduler] = scheduler.timesteps, tuple(scheduler.timesteps.tolist())
    return kept[1]


def _check_linear(scheduler: Any) -> None:
    _check_ddim(scheduler)
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no timesteps yet: call scheduler.set_timesteps first")
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {config.prediction_type!r} but must be one of {PREDICTION_TYPES}")
    for name in ("clip_sample", "thresholding"):
        if config.get(name):
            raise ValueError(f"the scheduler's {name} is on, which makes its step not Gaussian: turn it off")
    sampled = _sampled(scheduler)
    if max(sampled) >= config.num_train_timesteps:
        raise ValueError(_too_many(scheduler.num_inference_steps, config.num_train_timesteps))
    falling = all(earlier > later for earlier, later in itertools.pairwise(sampled))
    if len(sampled) != scheduler.num_inference_steps or min(sampled) < 0 or not falling:
        raise ValueError(
            f"timestep_spacing {config.timestep_spacing!r} has no {scheduler.num_inference_steps} timesteps that fall "
            f"from step to step ({len(sampled)} from {sampled[0]} to {sampled[-1]}): use another number of steps"
        )


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
