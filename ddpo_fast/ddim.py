"""DDIM's steps as a table: for each timestep `c_x`, `c_m` and `sigma` (see step_table.py), and the step's credit.

`a_t` below is DDPM's cumulated product of (1 - beta), the scheduler's `alphas_cumprod[t]` (written alpha_t in the DDIM
paper, alpha-bar_t in DDPM, arXiv 2006.11239, eq. 4), with which the forward process is

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps,

so that DDIM (arXiv 2010.02502, eq. 12 and 16) steps from timestep t to an earlier timestep s with

    x_s   = sqrt(a_s) x_0 + d eps + sigma z,    d = sqrt(1 - a_s - sigma^2)
    sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)

where x_0 and eps are the model's estimates. eta = 1 gives DDPM's ancestral sampling, the stochastic policy that DDPO
(arXiv 2305.13301) trains; eta = 0 is deterministic and has no density.

The last step differs between libraries. diffusers' `DDIMScheduler` lets it end at `final_alpha_cumprod`, which is 1
with `set_alpha_to_one`; then sigma is 0 and the step has no density. TRL clamps the earlier timestep to 0 before it
decides between `alphas_cumprod` and `final_alpha_cumprod`, so it never uses the latter: its last step ends at
`alphas_cumprod[0]` and keeps a positive sigma. This module does the same.

The step's credit is what the loss multiplies its log-ratio by (see step_credit.py).
"""

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

from ddpo_fast import step_table
from ddpo_fast.step_credit import LAYOUT_VARIANCE, step_credits

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# The settings of the forward process and of the timesteps. Every diffusers scheduler with the forward process above has
# them under these names, and DDIM can sample the models that were made for it.
COPIED_SETTINGS = (
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
    """Makes a DDIM scheduler for a model whose `scheduler_config.json` is `config`, whatever scheduler that names.

    `clip_sample` is off and `steps_offset` is 1, as `StableDiffusionPipeline`'s constructor sets them in old configs.
    Thresholding, which is meant for pixels and not for latents, is off too. The spacing 'linspace' ends with a step at
    timestep 0, which has no noise and therefore no log-prob, so it is replaced by 'trailing': to within one timestep,
    'linspace' with n steps is 'trailing' with n - 1 steps and one more step at timestep 0.

    Raises `ValueError` for a scheduler whose forward process is not DDPM's (flow matching, for instance), and for
    settings that DDIM cannot use.
    """
    name = config.get("_class_name", "DDIMScheduler")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if kind is None:
        raise ValueError(f"its scheduler is {name!r}, which is none of diffusers'")
    defaults = {key: value.default for key, value in inspect.signature(kind.__init__).parameters.items()}
    given = {**defaults, **config}
    flow = name.startswith("FlowMatch") or given.get("use_flow_sigmas") or "flow" in str(given.get("prediction_type"))
    # Schedulers with another forward process lack `beta_start` or have a setting of their own. One that needs a package
    # which is not installed shows no defaults here, and its file holds every setting.
    other = "beta_start" not in given or "snr_shift_scale" in given or given.get("timestep_type") == "continuous"
    if flow or other:
        what = "of flow matching" if flow else "of another kind of noise than DDIM's"
        raise ValueError(f"its scheduler is {name}, which is {what}")
    settings = {key: given[key] for key in COPIED_SETTINGS if key in given}
    _check_choices(settings)
    if settings.get("timestep_spacing") == "linspace":
        _warn_once("timestep_spacing of the model is 'linspace', whose last step has no noise: 'trailing' is used")
        settings["timestep_spacing"] = "trailing"
    try:
        scheduler = DDIMScheduler(
            **settings,
            clip_sample=False,
            thresholding=False,
            steps_offset=1,
            # where diffusers' own last step ends; `DDIMCoefficients` does not use it
            set_alpha_to_one=config.get("set_alpha_to_one", False),
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its scheduler's config cannot be used: {error}") from error
    _check_alphas(scheduler)
    return scheduler


# cached, so that each sentence is logged once per process
@functools.cache
def _warn_once(sentence: str) -> None:
    logger.warning(sentence)


def _check_choices(settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a setting that `DDIMScheduler` would accept and only fail on while sampling."""
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


def _check_alphas(scheduler: Any) -> None:
    """Raises `ValueError` unless a_t falls from timestep to timestep, below 1 and at least 0 (above 0 for epsilon).

    At a_t = 0 the latents are pure noise, from which predicting epsilon says nothing about the image.
    """
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
    """Raises `ValueError` if a scheduler cannot take `steps` DDIM steps with `eta`, each with a density if eta > 0."""
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
    """(c_x, c_m, sigma, credit) of every timestep: `table` is [num_train_timesteps, 4], fp32, on the device.

    The table has a row for each training timestep and not only for those that are sampled, so that a timestep is its
    own row number and looking it up is a gather on the device, without a copy to the host.
    """

    table: torch.Tensor

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_x, c_m, sigma) for integer `timesteps`, each of their shape."""
        # `take` and not `[]`: indexing by a tensor without dimensions copies its value to the host, and so waits for
        # all work that is queued on the device
        c_x, c_m, sigma = (self.table[:, i].take(timesteps) for i in range(3))
        return c_x, c_m, sigma

    @classmethod
    def of(cls, scheduler: Any, eta: float, device: torch.device, credit: str = "none") -> DDIMCoefficients:
        """The same as `from_scheduler`, computed once for each eta, credit and state of a scheduler.

        A scheduler is mutable: `set_timesteps` and assignments to its config change its steps, so the key holds
        everything that the table depends on.
        """
        config = scheduler.config
        tables = _TABLES.setdefault(scheduler, {})
        key = (
            _sampled(scheduler),
            scheduler.num_inference_steps,
            scheduler.alphas_cumprod.cpu().numpy().tobytes(),
            (config.prediction_type, config.get("clip_sample"), config.get("thresholding")),
            eta,
            device,
            credit,
        )
        if key not in tables:
            tables[key] = cls.from_scheduler(scheduler, eta, device, credit)
        return tables[key]

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, eta: float, device: torch.device | str, credit: str = "none"
    ) -> DDIMCoefficients:
        """The steps (see the top of this module) of a diffusers scheduler after `set_timesteps`.

        A step leads from a sampled timestep to the next one that is sampled, and the last step leads to timestep 0.
        Timesteps that are not sampled have rows too, for callers of `scheduler_step` with a timestep of their own:
        their step is `num_train_timesteps // num_inference_steps` long, as all steps are in TRL.

        `credit` is the config's `step_credit`.

        Raises `ValueError` for a scheduler whose step is not linear in the latents and the model's output, where a
        sampled step has no noise although `eta` is above 0, and for an unknown `credit`.
        """
        _check_linear(scheduler)
        # fp64: c_m is a difference of two nearly equal numbers when steps are short
        a_t = scheduler.alphas_cumprod.to("cpu", torch.float64)
        sampled = torch.tensor(_sampled(scheduler))
        s = (torch.arange(len(a_t)) - len(a_t) // scheduler.num_inference_steps).clamp(min=0)
        s[sampled] = torch.cat([sampled[1:], sampled.new_zeros(1)])
        a_s = a_t[s]
        sigma, direction = sigma_and_direction(a_t, a_s, eta)
        root, deviation, next_root = a_t.sqrt(), (1 - a_t).sqrt(), a_s.sqrt()
        kind = scheduler.config.prediction_type
        c_x, c_m = step_table.mean_coefficients(kind, root, deviation, next_root, direction)
        # the image and the noise that the best estimates find in latents whose components have the variance v
        layout = next_root * root * LAYOUT_VARIANCE + direction * deviation
        credits = step_credits(credit, c_m, sigma, sampled, layout / (a_t * LAYOUT_VARIANCE + 1 - a_t))
        table = torch.stack([c_x, c_m, sigma, credits], dim=1)
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


# by scheduler; an entry goes when its scheduler does
_TABLES: WeakKeyDictionary[Any, dict[tuple, DDIMCoefficients]] = WeakKeyDictionary()
# by scheduler: the tensor of timesteps that `_sampled` has last read, and its values
_SAMPLED: WeakKeyDictionary[Any, tuple[torch.Tensor, tuple[int, ...]]] = WeakKeyDictionary()


def _sampled(scheduler: Any) -> tuple[int, ...]:
    """The timesteps that are sampled, in order.

    They are on the device, so reading them makes the host wait. They are read once after each `set_timesteps`, which
    assigns a new tensor, and for whose copy to the device the host waits in any case.
    """
    kept = _SAMPLED.get(scheduler)
    if kept is None or kept[0] is not scheduler.timesteps:
        kept = _SAMPLED[scheduler] = scheduler.timesteps, tuple(scheduler.timesteps.tolist())
    return kept[1]


def _check_linear(scheduler: Any) -> None:
    """Raises `ValueError` unless the scheduler's steps are DDIM's, linear, and lead from later to earlier timesteps."""
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


def sigma_and_direction(a_t: torch.Tensor, a_s: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma, d) of steps by the formulas at the top of this module; all tensors have one shape."""
    variance = step_table.ddim_variance(eta, 1 - a_t, 1 - a_s, 1 - a_t / a_s)
    return variance.sqrt(), step_table.direction(1 - a_s, variance)


def predictions(scheduler: Any, eta: float) -> list[step_table.Prediction]:
    """What each sampled step of a scheduler whose timesteps are set predicts of the final latents, in their order.

    A step's mean mu (top of this module) and the forward process's relation of x_t to x0 and eps are

        x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps,    mu = sqrt(a_s) x0 + d eps

    Solved for x0, the two give the same coefficients whatever the model predicts (epsilon, v or sample).
    """
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    t = scheduler.timesteps.cpu()
    # the last step leads to timestep 0
    a_t, a_s = alphas[t], alphas[torch.cat([t[1:], t.new_zeros(1)])]
    sigma, d = sigma_and_direction(a_t, a_s, eta)
    determinant = a_s.sqrt() * (1 - a_t).sqrt() - d * a_t.sqrt()
    rows = torch.stack([-d / determinant, (1 - a_t).sqrt() / determinant, sigma], dim=1)
    return [step_table.Prediction(*row) for row in rows.tolist()]
