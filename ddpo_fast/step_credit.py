"""The credit of each denoising step: what the loss multiplies the step's log-ratio by.

If the model's output changes by u, the mean of a step changes by w u standard deviations, w = |c_m| / sigma (see
ddim.py), and the step's log-prob changes in proportion: its gradient is A z w du, with the step's noise z and the
advantage A. The noise table makes w several times its median in the last steps, whose gradients are then most of the
sum (SD1.5 with 20 steps: 5.4 against 0.70). With the mean of w over the sampled steps, and in 'layout' also the mean of
s, the credits are

    none:    1 (TRL)
    sqrt:    sqrt(mean(w) / w), half-way to equal
    equal:   mean(w) / w: the same change of the output counts the same in every step
    layout:  mean(w) / w * s / mean(s), where s is how much of the image's layout the step's noise decides

Why s: once w is divided out, the gradients of all steps have the same noise, as A and z have unit variance. Their
signal differs: it is the part of A that z explains, and with a reward that depends on what the image shows, that is in
proportion to the part of the final image that z explains. A sum of estimates with equal noise is best with weights in
proportion to their signals. For s take components of the latents with variance v, where the mean over all components is
1, as if they were Gaussian. The best estimates for them are linear in x_t:

    x_0 = sqrt(a_t) v / (a_t v + 1 - a_t) x_t        eps = sqrt(1 - a_t) / (a_t v + 1 - a_t) x_t

so a step multiplies what came before it by j_t = sqrt(a_s) x_0 / x_t + d eps / x_t, and the noise of step t reaches the
final image as s_t = sigma_t times the product of j over all later steps. This holds for every prediction type and eta.
Most of an image's variance is in its lowest frequencies, the colours and shapes of large parts, which early steps
decide: `LAYOUT_VARIANCE` is theirs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STEP_CREDITS = ("none", "equal", "sqrt", "layout")
# v above, in units of the mean variance of the latents' components
LAYOUT_VARIANCE = 30.0


def step_credits(
    credit: str, c_m: Tensor, sigma: Tensor, sampled: Tensor, a_t: Tensor, a_s: Tensor, direction: Tensor
) -> Tensor:
    """The credits of all K timesteps, [K], by the formulas at the top of this module.

    Args:
        credit: one of `STEP_CREDITS`.
        c_m, sigma, a_t, a_s, direction: of the step from each timestep, [K], see ddim.py; `direction` is d there.
        sampled: the timesteps that are sampled, falling.

    Every credit is finite. It is 0 where c_m is 0, as such a step has no gradient, and 1 where w is not finite: with
    eta = 0, and in steps that are not sampled and have no noise. Raises `ValueError` for an unknown `credit`.
    """
    if credit not in STEP_CREDITS:
        raise ValueError(f"step_credit is {credit!r} but must be one of {STEP_CREDITS}")
    weight = (c_m / sigma).abs()
    if credit == "none":
        return torch.ones_like(weight)
    found = (weight[sampled].mean() / weight).pow(0.5 if credit == "sqrt" else 1.0)
    if credit == "layout":
        found = found * _influence(sigma, sampled, a_t, a_s, direction)
    found = torch.where(weight == 0, 0.0, found)
    return torch.where(weight.isfinite() & found.isfinite(), found, 1.0)


def _influence(sigma: Tensor, sampled: Tensor, a_t: Tensor, a_s: Tensor, direction: Tensor) -> Tensor:
    """s / mean(s) of each timestep, [K]; between sampled timesteps it is interpolated."""
    total = a_t * LAYOUT_VARIANCE + 1 - a_t
    factor = (a_s.sqrt() * a_t.sqrt() * LAYOUT_VARIANCE + direction * (1 - a_t).sqrt()) / total
    steps = factor[sampled]
    # the product over later steps: 1 for the last one
    later = torch.cat([steps.flip(0).cumprod(0).flip(0)[1:], steps.new_ones(1)])
    influence = sigma[sampled] * later
    influence = influence / influence.mean()
    rising = np.interp(np.arange(len(sigma)), sampled.flip(0).numpy(), influence.flip(0).numpy())
    return torch.from_numpy(rising)
