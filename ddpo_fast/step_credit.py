"""The credit of each denoising step: what the loss multiplies the step's log-ratio by.

If the model's output changes by u, the mean of a step changes by w u standard deviations, w = |c_m| / sigma (see
step_table.py), and the step's log-prob changes in proportion: its gradient is A z w du, with the step's noise z and the
advantage A. The noise table makes w several times its median in the last steps, whose gradients are then most of the
sum (SD1.5 with 20 steps: 5.4 against 0.70). With the mean of w over the sampled steps that have noise, and in 'layout'
also the mean of s, the credits are

    none:    1 (TRL)
    sqrt:    sqrt(mean(w) / w), half-way to equal
    equal:   mean(w) / w: the same change of the output counts the same in every step
    layout:  mean(w) / w * s / mean(s), where s is how much of the image's layout the step's noise decides

Why s: once w is divided out, the gradients of all steps have the same noise, as A and z have unit variance. Their
signal differs: it is the part of A that z explains, and with a reward that depends on what the image shows, that is in
proportion to the part of the final image that z explains. A sum of estimates with equal noise is best with weights in
proportion to their signals. For s take components of the latents with variance v, where the mean over all components is
1, as if they were Gaussian. The best estimates for latents x = a x_0 + b eps are linear in x:

    x_0 = a v / (a^2 v + b^2) x        eps = b / (a^2 v + b^2) x

so a step multiplies what came before it by j = c_x + c_m m / x, where m follows from them as it does from the image and
the noise (for DDIM's steps, j = a' x_0 / x + d eps / x). The noise of step t reaches the final image as s_t = sigma_t
times the product of j over all later steps. This holds for every prediction and sampler.
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


def step_credits(credit: str, c_m: Tensor, sigma: Tensor, sampled: Tensor, layout: Tensor) -> Tensor:
    """The credits of all K rows of a table, [K], by the formulas at the top of this module.

    Args:
        credit: one of `STEP_CREDITS`.
        c_m, sigma: of the rows, [K], see step_table.py.
        sampled: the rows that are sampled, in that order.
        layout: j above, for v = `LAYOUT_VARIANCE`, [K].

    Every credit is finite. It is 0 where c_m is 0, as such a step has no gradient, and 1 where w is not finite: steps
    without noise have no density and are not trained. Raises `ValueError` for an unknown `credit`.
    """
    if credit not in STEP_CREDITS:
        raise ValueError(f"step_credit is {credit!r} but must be one of {STEP_CREDITS}")
    weight = (c_m / sigma).abs()
    if credit == "none":
        return torch.ones_like(weight)
    noisy = sigma[sampled] > 0
    found = (weight[sampled][noisy].mean() / weight).pow(0.5 if credit == "sqrt" else 1.0)
    if credit == "layout":
        found = found * _influence(sigma, sampled, noisy, layout)
    found = torch.where(weight == 0, 0.0, found)
    return torch.where(weight.isfinite() & found.isfinite(), found, 1.0)


def of_window(credit: str, rows: Tensor) -> Tensor:
    """The credits of some `rows` [W, 4] of a table if no other steps have noise: means of w and s over these alone.

    In the formulas at the top of this module both means are constants. With the credits a of all steps' means, a w is
    in proportion to mean(w) for 'equal' and 'layout', and a^2 w is for 'sqrt', so that these give the constants.
    """
    c_m, sigma, found = rows[:, 1], rows[:, 2], rows[:, 3]
    noisy = sigma > 0
    weight, power = (c_m / sigma).abs()[noisy], 2 if credit == "sqrt" else 1
    if credit == "none" or not noisy.any() or not weight.any():
        return found
    return found * (weight.mean() / (found[noisy].pow(power) * weight).mean()) ** (1 / power)


def _influence(sigma: Tensor, sampled: Tensor, noisy: Tensor, layout: Tensor) -> Tensor:
    """s / mean(s) of each row, [K]; between sampled rows it is interpolated."""
    # the product over later steps: 1 for the last one
    steps = layout[sampled]
    later = torch.cat([steps.flip(0).cumprod(0).flip(0)[1:], steps.new_ones(1)])
    influence = sigma[sampled] * later
    influence = influence / influence[noisy].mean()
    rising = sampled.argsort()
    every = np.interp(np.arange(len(sigma)), sampled[rising].numpy(), influence[rising].numpy())
    return torch.from_numpy(every)
