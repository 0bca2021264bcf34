"""What an update minimises, as a function of the UNet's output: DDPO's two losses, and reward-weighted regression.

- `ddpo_is`: the clipped ratio of DDPO with importance sampling (arXiv 2305.13301, section 4.3), by `ops.ppo_loss`.
- `ddpo_sf`: its score function, the mean of -A log_prob. It holds for samples of the present policy only, and so for
  the first update of an epoch.
- `rwr`: the denoising loss of diffusion models on the epoch's own images, each weighted by its reward (rwr.py).

Each says the loss of N (image, timestep) pairs, its gradient by the UNet's output in closed form, from which the
backward pass starts, and which pairs have no gradient.

Shapes: N pairs of a UNet call, C H W latent of D elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpo_fast import ops, rwr
from ddpo_fast.config import DDPOConfig
from ddpo_fast.metrics import approx_kl, clip_fraction
from ddpo_fast.ops.gaussian import guided, guided_backward, log_density, per_image, step_mean, table_rows
from ddpo_fast.ops.operands import laid_out_as
from ddpo_fast.policy import Policy
from ddpo_fast.reference import Reference
from ddpo_fast.trajectory import Pairs, TrainingBatch, Trajectory, training_batches


class Scored(NamedTuple):
    """The loss of the N pairs of a UNet call.

    `gradient` is d loss / d output times the scale that was asked for, with the output's shape, dtype and layout.
    """

    gradient: Tensor
    loss: Tensor  # []
    log_probs: Tensor  # [N]; with rwr, which has none, those of `Pairs`
    metrics: dict[str, Tensor]  # [] each, by the names of `Objective.metrics`


class Objective:
    """The interface of an objective.

    Args:
        reference: the model before training, if `train_kl_weight` holds the policy to it.
    """

    # metrics besides the loss: means over the pairs of a call, but for `ratio_drift`, a maximum
    metrics: tuple[str, ...] = ()

    def __init__(self, config: DDPOConfig, policy: Policy, reference: Reference | None = None) -> None:
        self.config = config
        self.policy = policy
        self.reference = reference
        if reference is not None:
            self.metrics = (*self.metrics, "reference_kl")

    @property
    def skips(self) -> bool:
        """Whether pairs may be left out of UNet calls: those of images whose advantage is 0, and those clipped.

        The divergence from the reference has a gradient at every pair.
        """
        return self.config.train_skip_dead_pairs and self.reference is None

    @property
    def guidance_scale(self) -> float | None:
        """The scale of guidance in training, or None for none."""
        return self.config.sample_guidance_scale if self.config.guides_training else None

    def training_batches(self, trajectory: Trajectory) -> Iterator[Iterator[TrainingBatch]]:
        """For each inner epoch, its training batches; random numbers are drawn as the batches are asked for."""
        return training_batches(trajectory, self.config.train_batch_size, self.config.train_num_inner_epochs)

    def score(self, output: Tensor, reference: Tensor | None, pairs: Pairs, scale: Tensor | None) -> Scored:
        """The mean loss of N pairs.

        A CUDA graph may record it, so it must not make the host wait.

        Args:
            output: the UNet's, [N, C, H, W], or [2N, C, H, W] with guidance, unconditional rows first; without a graph.
            reference: the output of `self.reference`, of the same shape.
            scale: [], what the gradient is multiplied by; None for 1.
        """
        raise NotImplementedError

    def without_gradient(self, pairs: Pairs, log_probs: Tensor) -> Tensor:
        """Which pairs have no gradient, [N] bool."""
        return (pairs.advantages == 0) & (self.reference is None)

    def means_of(self, pairs: Pairs, log_probs: Tensor) -> dict[str, Tensor]:
        """Those of `metrics` that are means, of some pairs of a call: the rest of it is padding."""
        return {}


class ImportanceSampling(Objective):
    """`ddpo_is`: the clipped loss of PPO, `ops.ppo_loss`."""

    metrics = ("approx_kl", "clipfrac", "ratio_drift")

    def score(self, output: Tensor, reference: Tensor | None, pairs: Pairs, scale: Tensor | None) -> Scored:
        found = ops.ppo_loss(
            output,
            pairs.latents,
            pairs.next_latents,
            pairs.log_probs,
            pairs.advantages,
            self.policy.loss_table,
            pairs.timesteps,
            self.guidance_scale,
            clip_range=self.policy.clip_range,
            advantage_limit=self.config.train_adv_clip_max,
            reference_output=reference,
            reference_weight=self.config.train_kl_weight,
            grad_scale=scale,
        )
        metrics = {
            "approx_kl": found.approx_kl,
            "clipfrac": found.clip_fraction,
            "ratio_drift": found.ratio_drift,
            "reference_kl": found.reference_kl,
        }
        return Scored(found.gradient, found.loss, found.log_probs, {name: metrics[name] for name in self.metrics})

    def without_gradient(self, pairs: Pairs, log_probs: Tensor) -> Tensor:
        clipped = ops.is_clipped(pairs.advantages, self.policy.clip_range, self._ratio(pairs, log_probs))
        return (clipped | (pairs.advantages == 0)) & (self.reference is None)

    def means_of(self, pairs: Pairs, log_probs: Tensor) -> dict[str, Tensor]:
        return {
            "approx_kl": approx_kl(log_probs, pairs.log_probs),
            "clipfrac": clip_fraction(self._ratio(pairs, log_probs), self.policy.clip_range),
        }

    def _ratio(self, pairs: Pairs, log_probs: Tensor) -> Tensor:
        return torch.exp(self.policy.credited(log_probs - pairs.log_probs, pairs.timesteps))


class ScoreFunction(Objective):
    """`ddpo_sf`: `mean(-A k log_prob)` with the step's credit k, and `train_kl_weight` times KL.

    With the step's mean `mu = c_x x + c_m g` of the (guided) output g, and the distance `e = x' - mu`,

        log_prob = mean_d(-e^2 / (2 sigma^2)) + const        so  d log_prob / d g = c_m e / (sigma^2 D)
        KL = k^2 mean_d((mu - mu_ref)^2) / (2 sigma^2)       so  d KL / d g = k^2 c_m (mu - mu_ref) / (sigma^2 D)

    as in `ops.ppo_loss`, whose gradient this is where every ratio is 1. There is no ratio, so nothing is clipped.
    """

    metrics = ("approx_kl",)

    def score(self, output: Tensor, reference: Tensor | None, pairs: Pairs, scale: Tensor | None) -> Scored:
        latents, guidance = pairs.latents, self.guidance_scale
        c_x, c_m, sigma, credit = table_rows(self.policy.loss_table, pairs.timesteps, latents)
        combined = _combined(output, guidance, latents)
        difference = pairs.next_latents.to(latents.dtype) - step_mean(combined, latents, c_x, c_m)
        log_probs = log_density(difference, sigma)
        limit = self.config.train_adv_clip_max
        pull = pairs.advantages.to(latents.dtype).clamp(-limit, limit) * credit
        terms = -pull * log_probs
        slope = c_m / sigma.square()
        gradient = per_image(-pull * slope, latents) * difference
        metrics = {"approx_kl": approx_kl(log_probs, pairs.log_probs)}
        if reference is not None:
            apart = per_image(c_m, latents) * (combined - _combined(reference, guidance, latents))
            kl = credit.square() * (apart.square() / per_image(2 * sigma.square(), latents)).flatten(1).mean(1)
            weight = self.config.train_kl_weight
            terms = terms + weight * kl
            gradient = gradient + per_image(weight * credit.square() * slope, latents) * apart
            metrics["reference_kl"] = kl.mean()
        return Scored(_by_output(gradient, output, guidance, scale), terms.mean(), log_probs, metrics)

    def means_of(self, pairs: Pairs, log_probs: Tensor) -> dict[str, Tensor]:
        return {"approx_kl": approx_kl(log_probs, pairs.log_probs)}


class RewardWeightedRegression(Objective):
    """`rwr`: `mean(w mean_d((target - g)^2))` of the (guided) output g at noised images (see rwr.py).

    A pair's `advantages` are the weights w of its image, its `latents` the noised image, and its `next_latents` what
    the UNet should predict there. The gradient is `2 w (g - target) / (N D)`.
    """

    def training_batches(self, trajectory: Trajectory) -> Iterator[Iterator[TrainingBatch]]:
        return rwr.noised_batches(trajectory, self.policy.pipeline.scheduler, self.config)

    def score(self, output: Tensor, reference: Tensor | None, pairs: Pairs, scale: Tensor | None) -> Scored:
        latents, guidance = pairs.latents, self.guidance_scale
        weights = pairs.advantages.to(latents.dtype)
        apart = _combined(output, guidance, latents) - pairs.next_latents
        loss = (weights * apart.square().flatten(1).mean(1)).mean()
        gradient = _by_output(per_image(2 * weights, latents) * apart, output, guidance, scale)
        return Scored(gradient, loss, pairs.log_probs, {})


def _combined(output: Tensor, guidance_scale: float | None, like: Tensor) -> Tensor:
    """The output with guidance, [N, C, H, W] in the dtype of `like`, fp32 or fp64."""
    return (output if guidance_scale is None else guided(output, guidance_scale)).to(like.dtype)


def _by_output(gradient: Tensor, output: Tensor, guidance_scale: float | None, scale: Tensor | None) -> Tensor:
    """The gradient of a mean over N pairs and D elements by the UNet's output, from that of their sum by the guided
    output, [N, C, H, W]."""
    gradient = gradient / gradient.numel()
    if scale is not None:
        gradient = gradient * scale
    return laid_out_as(output, guided_backward(gradient, guidance_scale))


OBJECTIVES: dict[str, type[Objective]] = {
    "ddpo_is": ImportanceSampling,
    "ddpo_sf": ScoreFunction,
    "rwr": RewardWeightedRegression,
}


def make_objective(config: DDPOConfig, policy: Policy, trained: Sequence[torch.nn.Parameter]) -> Objective:
    """The objective that the settings ask for, of the `trained` parameters as they are before training."""
    reference = Reference(policy, trained) if config.train_kl_weight > 0 else None
    return OBJECTIVES[config.objective](config, policy, reference)


def refuse_own_loss(config: DDPOConfig) -> None:
    """Raises `ValueError` if settings ask for more than a loss of the user's own does."""
    for name, default in (("objective", "ddpo_is"), ("train_kl_weight", 0), ("spatial_credit", 0)):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, but the loss or the pipeline's scheduler_step is overridden, "
                f"and training would use that: leave out {name}, or the override"
            )
