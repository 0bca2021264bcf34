"""The clipped PPO loss of (image, timestep) pairs and its gradient, computed in one pass.

The loss is equation 7 of PPO (arXiv 1707.06347) with the step's log-prob of DDPO (arXiv 2305.13301). Its gradient with
respect to the UNet's output has a closed form, so no autograd graph is recorded for what follows the UNet. For a pair
with the guided output g, `mu = c_x x + c_m g`, `e = x' - mu`, D elements, the step's credit k, and the ratio
`r = exp(k (log_prob - old_log_prob))`:

    log_prob = mean_d(-e^2 / (2 sigma^2)) + const        so  d log_prob / d g = c_m e / (sigma^2 D)
    term = max(-A r, -A clip(r, 1 - c, 1 + c))           so  d term / d log_prob = -A r k, and 0 where clipped
    KL = k^2 mean_d((mu - mu_ref)^2) / (2 sigma^2)       so  d KL / d g = k^2 c_m (mu - mu_ref) / (sigma^2 D)

The credit is the table's fourth column (step_credit.py says which there are); 1 gives PPO's loss. If the
mean moves by `delta` standard deviations of the step (root mean square over d), then to first order in delta the
log-ratio is normal with a standard deviation of `k delta / sqrt(D)`, as `e / sigma` is standard normal, and the KL is
`(k delta)^2 / 2`. So the ratio, its clip and the KL see a step of credit k as one that moved k times as far. Stored
log-probs are those of the step, without credit.

The second argument of the maximum is the larger one, and does not depend on r, where A > 0 and r > 1 + c, or A < 0 and
r < 1 - c. With guidance, `g = u + s (t - u)`: the gradient for u is (1 - s) times that for g, and that for t is s
times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpo_fast.ops.backend import Op, csrc_kernel, triton_kernel
from ddpo_fast.ops.gaussian import (
    check_step,
    check_table,
    guided,
    guided_backward,
    log_density,
    per_image,
    step_mean,
    table_rows,
)
from ddpo_fast.ops.operands import dense_rows, laid_out_as


class PPOLoss(NamedTuple):
    """What `ppo_loss` returns: scalars, `log_probs` [N] and `gradient`. Only `loss` has an autograd graph.

    `gradient` is d loss / d model_output times `grad_scale`, with the output's shape, dtype and layout.
    `model_output.backward(gradient)` saves one kernel launch against `loss.backward()`, which first multiplies the
    gradient by 1.
    """

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio_drift: Tensor
    reference_kl: Tensor
    log_probs: Tensor
    gradient: Tensor


def ppo_loss(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    table: Tensor,
    timesteps: Tensor,
    guidance_scale: float | None = None,
    *,
    clip_range: float,
    advantage_limit: float,
    reference_output: Tensor | None = None,
    reference_weight: float = 0.0,
    grad_scale: Tensor | None = None,
) -> PPOLoss:
    """The mean over N pairs of `max(-A r, -A clip(r, 1 - c, 1 + c)) + w KL`, `r = exp(k (log_prob - old_log_prob))`.

    Args:
        model_output: [N, C, H, W], or [2N, C, H, W] with guidance, unconditional rows first; fp16, bf16 or fp32,
            contiguous or channels_last. Its gradient is computed in the forward pass.
        latents, next_latents: [N, C, H, W] fp32 (fp64: everything is fp64), without gradient.
        old_log_probs, advantages: [N]; advantages are clipped to +- `advantage_limit`.
        table, timesteps, guidance_scale: as for `step_logprob`; timesteps are [N]. The table's last column is the
            credit k.
        clip_range: c, in units of the ratio.
        reference_output: a frozen reference UNet's output for the same pairs, of the shape of `model_output`. It adds
            `reference_weight` times the KL divergence between the two steps, divided by D, times k^2:
            `k^2 mean_d((mu - mu_ref)^2) / (2 sigma^2)`.
        grad_scale: [] fp32, the loss scale of fp16 training. The gradient is multiplied by this scale before it is
            stored in the output's dtype, so that small values do not underflow; `loss.backward()` divides by the scale
            again.

    `approx_kl` is `mean((log_prob - old_log_prob)^2) / 2` without credit, as in TRL, `clip_fraction` the share of pairs
    with |r - 1| > c, `ratio_drift` the largest |r - 1|, `reference_kl` the mean KL.

    Raises `ValueError` for shapes and dtypes that do not fit.
    """
    # long by its operands and what each may be; what follows are the checks of them and one call
    check_step("model_output", model_output, latents, guidance_scale)
    check_table(table, timesteps, latents)
    if next_latents.shape != latents.shape:
        raise ValueError(f"next_latents have shape {tuple(next_latents.shape)} but latents have {tuple(latents.shape)}")
    for name, value in (("old_log_probs", old_log_probs), ("advantages", advantages)):
        if value.shape != (len(latents),):
            raise ValueError(f"{name} have shape {tuple(value.shape)} but must have ({len(latents)},)")
    if reference_output is not None:
        check_step("reference_output", reference_output, latents, guidance_scale)
    wide = torch.float64 in (model_output.dtype, latents.dtype)
    model_output = dense_rows(model_output.to(latents.dtype) if wide else model_output)
    loss, metrics, log_probs, gradient = FORWARD(
        model_output,
        None if reference_output is None else laid_out_as(model_output, reference_output.detach()),
        latents.detach().contiguous(),
        next_latents.detach().to(latents.dtype).contiguous(),
        old_log_probs.detach().to(latents.dtype).contiguous(),
        advantages.detach().to(latents.dtype).contiguous(),
        table.to(latents.dtype).contiguous(),
        timesteps.expand(len(latents)).contiguous(),
        grad_scale,
        guidance_scale,
        clip_range,
        advantage_limit,
        reference_weight,
    )
    approx_kl, clip_fraction, ratio_drift, reference_kl = metrics.detach().unbind()
    return PPOLoss(loss, approx_kl, clip_fraction, ratio_drift, reference_kl, log_probs.detach(), gradient.detach())


def clipped_surrogate(advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
    """`mean(max(-A r, -A clip(r, 1 - c, 1 + c)))`; advantages and ratio are [N], the loss is a scalar."""
    return _clipped(advantages, clip_range, ratio).mean()


def _clipped(advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def is_clipped(advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
    """Which pairs [N] have no gradient because their ratio has left the clip range.

    Only leaving it in the direction that the advantage favours counts: upwards for a positive advantage.
    """
    return ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))


# the definition


def _reference(
    model_output: Tensor,
    reference_output: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    table: Tensor,
    timesteps: Tensor,
    grad_scale: Tensor | None,
    guidance_scale: float | None,
    clip_range: float,
    advantage_limit: float,
    reference_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c_x, c_m, sigma, credit = table_rows(table, timesteps, latents)
    combined = model_output if guidance_scale is None else guided(model_output, guidance_scale)
    difference = next_latents - step_mean(combined, latents, c_x, c_m)
    # the same function that sampling uses, so that a policy that has not changed has ratios of 1
    log_probs = log_density(difference, sigma)
    advantages = advantages.clamp(-advantage_limit, advantage_limit)
    ratio = torch.exp(credit * (log_probs - old_log_probs))
    terms = _clipped(advantages, clip_range, ratio)
    slope = torch.where(is_clipped(advantages, clip_range, ratio), 0.0, -advantages * ratio * credit)
    variance = sigma.square()
    # the closed form at the top of this module; the division by D and by N follows for all terms at once
    grad = per_image(slope * c_m / variance, latents) * difference
    reference_kl = torch.zeros_like(log_probs)
    if reference_output is not None:
        other = reference_output if guidance_scale is None else guided(reference_output, guidance_scale)
        apart = per_image(c_m, latents) * (combined.to(latents.dtype) - other.to(latents.dtype))
        reference_kl = credit.square() * (apart.square() / per_image(2 * variance, latents)).flatten(1).mean(1)
        terms = terms + reference_weight * reference_kl
        grad = grad + per_image(reference_weight * credit.square() * c_m / variance, latents) * apart
    # N D elements: the mean over d in each log-prob and the mean over pairs in the loss
    grad = grad / latents.numel()
    if grad_scale is not None:
        grad = grad * grad_scale
    grad = guided_backward(grad, guidance_scale)
    moved = (ratio - 1).abs()
    drift = moved.max() if len(moved) else moved.sum()
    metrics = torch.stack(
        [
            0.5 * (log_probs - old_log_probs).square().mean(),
            (moved > clip_range).to(moved.dtype).mean(),
            drift,
            reference_kl.mean(),
        ]
    )
    return terms.mean(), metrics, log_probs, laid_out_as(model_output, grad)


# allocates the kernels' outputs; also the op's fake implementation


def _empty(
    model_output: Tensor, reference_output: Tensor | None, latents: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar, four, each = (
        torch.empty(shape, dtype=latents.dtype, device=latents.device) for shape in ((), (4,), latents.shape[:1])
    )
    return scalar, four, each, torch.empty_like(model_output)


FORWARD = Op("ppo_loss", _reference, _empty, triton_kernel("ppo_loss", _empty), csrc_kernel("ppo_loss", _empty))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_scale = inputs[8]
    # without this, autograd would allocate zeros for the unused outputs' gradients, one as large as the UNet's output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *([] if grad_scale is None else [grad_scale]))


def _differentiate(ctx: Any, grad_loss: Tensor | None, *others: None) -> Any:
    if grad_loss is None:
        return (None,) * 13
    grad, *scale = ctx.saved_tensors
    # The stored gradient is already multiplied by the scale. If the caller has multiplied the loss by the scale too,
    # `grad_loss` is the scale and the factor is 1.
    factor = grad_loss / scale[0] if scale else grad_loss
    return grad * factor, *[None] * 12


FORWARD.register_autograd(_differentiate, setup_context=_save)
