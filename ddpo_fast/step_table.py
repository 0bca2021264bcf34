"""A denoising step as three numbers, `c_x`, `c_m` and `sigma`: the formulas of every sampler, in fp64.

A noised image is x = a x_0 + s eps, with eps ~ N(0, 1). A step leads from (a, s) to (a', s'), which has less noise:

    x' = c_x x + c_m m + sigma z,    z ~ N(0, 1),

where m is the network's output. This is all that sampling, the log-prob and the loss know about a sampler. The forward
process of diffusion (DDPM, arXiv 2006.11239) has a^2 + s^2 = 1; flow matching (arXiv 2403.03206) has a = 1 - s.

**Steps like DDIM's** (arXiv 2010.02502, eq. 12) go through the model's estimates of the image and of the noise,
x' = a' x_0 + d eps + n z, with noise of a deviation n of their own choice, and d = sqrt(s'^2 - n^2) so that x' has the
noise of its place on the way. x and m give both estimates, so that sigma = n and

    prediction                               c_x           c_m
    epsilon     m = eps                      a' / a        d - a' s / a
    sample      m = x_0                      d / s         a' - d a / s
    v           m = a eps - s x_0            a' a + d s    d a - a' s      arXiv 2202.00512, with a^2 + s^2 = 1
    flow        m = eps - x_0, a = 1 - s     a' + d        d a - a' s

    DDIM, flow-DDIM    n = eta (s' / s) sqrt(s^2 - (a / a')^2 s'^2)    DDIM's eq. 16; the root is what the forward
                                                                       process adds on its way from s' to s
    CPS                n = s' sin(level pi / 2)                        arXiv 2509.05952

CPS (coefficients-preserving sampling) is published with a "log-prob" that is no density. Here it has its density.

**Steps of a stochastic differential equation.** Flow matching's ODE is dx/ds = m. The score of x is -eps / s, where
eps = x + (1 - s) m, so that for any g the SDE with noise g and a drift of m - (g^2 / 2) times the score goes backwards
through the same distributions. Its Euler-Maruyama step, with D = s' - s below 0, is

    c_x = 1 + g^2 D / (2 s)    c_m = D (1 + g^2 (1 - s) / (2 s))    sigma = g sqrt(-D)

    flow-SDE    g = level sqrt(s / (1 - s))    Flow-GRPO, arXiv 2505.05470; where s = 1, the 1 - s is that of the second
                                               step, so that the first is (1 - level^2 / 2, s' - 1, level) there
    dance       g = level                      DanceGRPO, arXiv 2505.07818

Noise of a step to s' = 0 would stay in the image, and it has no place in its distribution: that step is the ODE's,
(1, D, 0), in every sampler. Rows with sigma = 0 have no density and are not trained, so that windows of noisy steps
(MixGRPO, arXiv 2507.21802; Flow-GRPO-Fast) need nothing but rows of the ODE outside them.

With data that is Gaussian, the deviation of the images comes as near to the truth as wanted with more steps, for all
samplers but CPS: at level 0.8 its images have 0.80 of it, however many steps are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The three numbers of K steps, each [K] in fp64."""

    c_x: Tensor
    c_m: Tensor
    sigma: Tensor


class Prediction(NamedTuple):
    """The prediction of the final latent from a step's latents x_t and mean mu: `of_latents x_t + of_mean mu`."""

    of_latents: float
    of_mean: float
    sigma: float  # of the step, with which its mean follows from its noise

    def of(self, latents: Tensor, next_latents: Tensor, noise: Tensor) -> Tensor:
        """The predicted final latents of the step `next_latents = mu + sigma noise` from `latents`, [B, C, H, W]."""
        mean = next_latents - self.sigma * noise
        return self.of_latents * latents + self.of_mean * mean


def ddim_variance(eta: float, variance: Tensor, next_variance: Tensor, added: Tensor) -> Tensor:
    """n^2 of DDIM's steps, [K].

    Args:
        variance, next_variance: s^2 and s'^2.
        added: s^2 - (a / a')^2 s'^2, which is 1 - (a / a')^2 where a^2 + s^2 = 1.
    """
    return eta**2 * next_variance / variance * added


def direction(next_variance: Tensor, variance: Tensor) -> Tensor:
    """d of steps from s'^2 and n^2, [K]."""
    # 0 where the step's noise is all that there is (a = 0 and eta = 1): rounding may make it negative there
    return (next_variance - variance).clamp(min=0).sqrt()


def mean_coefficients(prediction: str, a: Tensor, s: Tensor, next_a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(c_x, c_m) of steps like DDIM's, [K] each, for `prediction` 'epsilon', 'sample', 'v_prediction' or 'flow'."""
    if prediction == "epsilon":
        return next_a / a, d - next_a * s / a
    if prediction == "sample":
        return d / s, next_a - d * a / s
    c_x = next_a + d if prediction == "flow" else next_a * a + d * s
    return c_x, d * a - next_a * s


# flow matching: `s` is [N + 1] in fp64, the sigmas of a chain from noise to image, falling to 0


def ode(s: Tensor) -> Rows:
    """The steps of flow matching's ODE, as diffusers' `FlowMatchEulerDiscreteScheduler` takes them."""
    step = s.diff()
    return Rows(torch.ones_like(step), step, torch.zeros_like(step))


def flow_ddim(s: Tensor, level: float) -> Rows:
    """DDIM's steps; `level` is eta."""
    s, next_s = s[:-1], s[1:]
    added = s**2 - ((1 - s) / (1 - next_s) * next_s) ** 2
    return _through_estimates(s, next_s, ddim_variance(level, s**2, next_s**2, added))


def cps(s: Tensor, level: float) -> Rows:
    """Coefficients-preserving sampling; `level` is from 0 (the ODE) to 1 (all noise of a step is new)."""
    s, next_s = s[:-1], s[1:]
    return _through_estimates(s, next_s, (next_s * math.sin(level * math.pi / 2)) ** 2)


def _through_estimates(s: Tensor, next_s: Tensor, variance: Tensor) -> Rows:
    d = direction(next_s**2, variance)
    return Rows(*mean_coefficients("flow", 1 - s, s, 1 - next_s, d), variance.sqrt())


def flow_sde(s: Tensor, level: float) -> Rows:
    """Flow-GRPO's SDE."""
    start = s[:-1]
    # rounding to fp32 may leave the level of pure noise just below 1
    below_1 = torch.where(start > 1 - 1e-6, s[1], start)
    return _euler_maruyama(s, level * (start / (1 - below_1)).sqrt())


def dance(s: Tensor, level: float) -> Rows:
    """DanceGRPO's SDE."""
    return _euler_maruyama(s, torch.full_like(s[:-1], level))


def _euler_maruyama(s: Tensor, g: Tensor) -> Rows:
    # the last step is the ODE's
    g = torch.where(s[1:] == 0, 0.0, g)
    start, step = s[:-1], s.diff()
    pull = g**2 / (2 * start)
    return Rows(1 + pull * step, step * (1 + pull * (1 - start)), g * (-step).sqrt())


FLOW_SAMPLERS: dict[str, Callable[[Tensor, float], Rows]] = {
    "flow_sde": flow_sde,
    "cps": cps,
    "dance": dance,
    "flow_ddim": flow_ddim,
}
