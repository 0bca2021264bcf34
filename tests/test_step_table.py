"""The formulas of all samplers against their published forms in fp64, and flow matching's schedules and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from op_checks import DEVICE
from torch.distributions import Normal

from ddpo_fast import ops, step_table
from ddpo_fast.ddim import PREDICTION_TYPES, DDIMCoefficients
from ddpo_fast.flow_matching import dynamic_shift, flow_scheduler, flow_table, noise_levels
from ddpo_fast.ops import force_backend
from ddpo_fast.step_credit import LAYOUT_VARIANCE, STEP_CREDITS
from ddpo_fast.step_table import FLOW_SAMPLERS
from ddpo_fast.tiny_sd.build import SCHEDULER

LEVELS = {"flow_sde": 0.7, "cps": 0.8, "dance": 0.3, "flow_ddim": 1.0}


def sd3_levels(steps: int, shift: float = 3.0) -> torch.Tensor:
    """Stable Diffusion 3's noise levels in closed form, see flow_matching.py."""
    least = shift / 1000 / (1 + (shift - 1) / 1000)
    u = torch.linspace(1, least, steps, dtype=torch.float64)
    return torch.cat([shift * u / (1 + (shift - 1) * u), u.new_zeros(1)])


def flux_levels(steps: int, tokens: int | None = None) -> torch.Tensor:
    """FLUX's noise levels in closed form: dev's for images of `tokens` tokens, or schnell's."""
    u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if tokens is not None:
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        u = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    return torch.cat([u, u.new_zeros(1)])


@pytest.mark.parametrize("steps", [4, 10, 28])
def test_schedules_are_the_closed_forms(steps):
    """Of the scheduler configs that the models are published with, set as diffusers' pipelines set them."""
    sd3 = flow_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000})
    sd3.set_timesteps(steps)
    # a level takes a handful of roundings in fp32
    torch.testing.assert_close(noise_levels(sd3), sd3_levels(steps), rtol=4e-7, atol=0)
    for tokens in (256, 1024, 4096):
        dev = flow_scheduler({"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15})
        mu = dynamic_shift(dev.config, tokens)
        dev.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        torch.testing.assert_close(noise_levels(dev), flux_levels(steps, tokens), rtol=4e-7, atol=0)
    schnell = flow_scheduler({"shift": 1.0})
    schnell.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    torch.testing.assert_close(noise_levels(schnell), flux_levels(steps), rtol=4e-7, atol=0)


def published_step(sampler, x, m, s, next_s, second_s, level):
    """(mean, deviation) of a step as the sampler's authors compute it, from the latents and the output."""
    step = next_s - s
    image, noise = x - s * m, x + (1 - s) * m
    if sampler == "cps":
        deviation = next_s * math.sin(level * math.pi / 2)
        return (1 - next_s) * image + math.sqrt(next_s**2 - deviation**2) * noise, deviation
    if sampler == "flow_ddim":
        # DDIM's equation 16 in units in which the signal is 1: x / a has noise of deviation s / a
        rise, before = (next_s / (1 - next_s)) ** 2, math.inf if s == 1 else (s / (1 - s)) ** 2
        deviation = level * (1 - next_s) * math.sqrt(rise * (1 - rise / before))
        return (1 - next_s) * image + math.sqrt(max(next_s**2 - deviation**2, 0)) * noise, deviation
    if sampler == "dance":
        score = -(x - image * (1 - s)) / s**2
        return x + m * step - 0.5 * level**2 * score * step, level * math.sqrt(-step)
    g = math.sqrt(s / (1 - (second_s if s == 1 else s))) * level
    mean = x * (1 + g**2 / (2 * s) * step) + m * (1 + g**2 * (1 - s) / (2 * s)) * step
    return mean, g * math.sqrt(-step)


SCHEDULES = [(sd3_levels, 4), (sd3_levels, 10), (sd3_levels, 28), (lambda n: flux_levels(n, 1024), 28)]


@pytest.mark.parametrize("backend", ["reference", "csrc"])
@pytest.mark.parametrize(("levels_of", "steps"), SCHEDULES, ids=["sd3-4", "sd3-10", "sd3-28", "flux-28"])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_steps_and_log_probs_are_the_published_ones(sampler, levels_of, steps, backend):
    s = levels_of(steps)
    level = LEVELS[sampler]
    table = flow_table(s, sampler, level).to(DEVICE)
    x, m, z = torch.randn(3, steps - 1, 2, 6, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    keys = torch.arange(steps - 1, device=DEVICE)
    with force_backend(backend):
        made = ops.step_logprob(m, x, z, table, keys)
        scored = ops.score_step(m, x, made.latents, *(table[keys, i] for i in range(3)))
    for i in range(steps - 1):
        x_i, m_i, z_i, next_i = (v[i].double().cpu() for v in (x, m, z, made.latents))
        mean, deviation = published_step(sampler, x_i, m_i, float(s[i]), float(s[i + 1]), float(s[1]), level)
        # coefficients, products and sums are rounded once each: five roundings of values of the size of the terms
        rounding = 5 * 2**-24 * (table[i, :2].abs().max().item() * (x_i.abs() + m_i.abs()).max().item() + deviation * 4)
        torch.testing.assert_close(next_i, mean + deviation * z_i, rtol=0, atol=rounding)
        expected = Normal(mean, deviation).log_prob(next_i).mean().item()
        # by how much such a difference changes (x' - mean)^2 / (2 sigma^2); the log of sigma is rounded too
        tolerance = rounding / deviation * z_i.abs().mean().item() + 1e-6
        assert made.log_probs[i].item() == pytest.approx(expected, abs=tolerance)
        assert scored[i].item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_the_last_step_and_level_0_are_the_ode(sampler):
    """To the bit: the difference of two fp32 noise levels is the step that diffusers takes."""
    scheduler = flow_scheduler({"shift": 3.0})
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler)
    steps = scheduler.sigmas.diff()
    still = flow_table(levels, sampler, 0.0)
    assert torch.equal(still[:, :3], torch.stack([torch.ones(10), steps, torch.zeros(10)], 1))
    x, m = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(m[i], t, x[i]).prev_sample
        assert torch.equal(still[i, 0] * x[i] + still[i, 1] * m[i], theirs)
    # the formulas themselves lead to the ODE without noise
    for own, ode in zip(FLOW_SAMPLERS[sampler](levels, 0.0), step_table.ode(levels), strict=True):
        torch.testing.assert_close(own, ode, rtol=1e-12, atol=1e-15)
    table = flow_table(levels, sampler, LEVELS[sampler])
    torch.testing.assert_close(table[-1, :3], still[-1, :3], rtol=1e-6, atol=0)
    assert table[-1, 2] == 0
    assert (table[:-1, 2] > 0).all()


def test_flow_sdes_first_step():
    """From pure noise, where Flow-GRPO's g is infinite but for the 1 - s of the second step."""
    first = flow_table(sd3_levels(10), "flow_sde", 0.7)[0]
    assert first[:3].tolist() == pytest.approx([1 - 0.7**2 / 2, sd3_levels(10)[1].item() - 1, 0.7], rel=1e-6)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_tables_are_finite_for_any_number_of_steps(sampler, steps):
    for credit in STEP_CREDITS:
        table = flow_table(sd3_levels(steps), sampler, LEVELS[sampler], credit)
        assert table.isfinite().all()


def share_of_deviation(sampler: str, steps: int, variance: float) -> float:
    """The images' deviation over the data's, if the data is Gaussian and the network is the best there is."""
    levels = sd3_levels(steps)
    s, a = levels[:-1], 1 - levels[:-1]
    c_x, c_m, sigma = FLOW_SAMPLERS[sampler](levels, LEVELS[sampler])
    # the best output is the expectation of eps - x_0, which is linear in x
    kept = c_x + c_m * (s - a * variance) / (a**2 * variance + s**2)
    found = 1.0
    for k, n in zip(kept.tolist(), sigma.tolist(), strict=True):
        found = k**2 * found + n**2
    return math.sqrt(found / variance)


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_gaussian_data_is_sampled_as_it_is(sampler, variance):
    few, more, many = (share_of_deviation(sampler, steps, variance) for steps in (10, 100, 1000))
    if sampler == "cps":
        # as docs/models.md says: at level 0.8 the images keep 0.8 of the deviation
        assert many == pytest.approx(0.80, abs=0.01)
        assert share_of_deviation(sampler, 10000, variance) == pytest.approx(many, abs=0.01)
    else:
        assert abs(many - 1) < 0.01
        assert abs(many - 1) < abs(more - 1) < abs(few - 1)


# steps like DDIM's


@pytest.mark.parametrize("prediction", [*PREDICTION_TYPES, "flow"])
def test_the_mean_is_made_of_the_image_and_the_noise(prediction):
    a, next_a = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.6))
    s, next_s = (1 - a, 1 - next_a) if prediction == "flow" else ((1 - a**2).sqrt(), (1 - next_a**2).sqrt())
    d = step_table.direction(next_s**2, torch.tensor(0.04))
    image, noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = {"epsilon": noise, "sample": image, "v_prediction": a * noise - s * image, "flow": noise - image}
    c_x, c_m = step_table.mean_coefficients(prediction, a, s, next_a, d)
    mean = c_x * (a * image + s * noise) + c_m * output[prediction]
    torch.testing.assert_close(mean, next_a * image + d * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [1.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddims_tables_keep_their_bits(prediction, eta, spacing):
    """Those of the first release, whose formulas were written for diffusion alone."""
    scheduler = DDIMScheduler(**{**SCHEDULER, "prediction_type": prediction, "timestep_spacing": spacing})
    scheduler.set_timesteps(20)
    a_t = scheduler.alphas_cumprod.double()
    following = (torch.arange(1000) - 50).clamp(min=0)
    following[scheduler.timesteps] = torch.cat([scheduler.timesteps[1:], torch.zeros(1, dtype=torch.int64)])
    a_s = a_t[following]
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    d = (1 - a_s - variance).clamp(min=0).sqrt()
    signal, noise = a_t.sqrt(), (1 - a_t).sqrt()
    c_x, c_m = {
        "epsilon": (a_s.sqrt() / signal, d - a_s.sqrt() * noise / signal),
        "sample": (d / noise, a_s.sqrt() - d * signal / noise),
        "v_prediction": (a_s.sqrt() * signal + d * noise, d * signal - a_s.sqrt() * noise),
    }[prediction]
    table = DDIMCoefficients.from_scheduler(scheduler, eta, "cpu").table
    assert torch.equal(table[:, :3], torch.stack([c_x, c_m, variance.sqrt()], 1).float())


def test_from_pure_noise_a_v_prediction_is_the_image():
    """a = 0: the step's noise is all new, and the output is minus the image. Epsilon says nothing of the image there:
    `ddim_scheduler` refuses it (tests/test_ddim.py)."""
    zero, one, next_a = (torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0, 0.4))
    next_variance = 1 - next_a**2
    variance = step_table.ddim_variance(1.0, one, next_variance, 1 - (zero / next_a) ** 2)
    d = step_table.direction(next_variance, variance)
    c_x, c_m = step_table.mean_coefficients("v_prediction", zero, one, next_a, d)
    assert (c_x.item(), c_m.item(), variance.item()) == (0.0, -next_a.item(), next_variance.item())
    c_x, c_m = step_table.mean_coefficients("epsilon", zero, one, next_a, d)
    assert not c_x.isfinite().any()
    assert not c_m.isfinite().any()


# credits


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_credits_of_flow_tables(sampler):
    """Each noisy step says the same, the mean of what they said before; the step without noise is not counted."""
    levels = sd3_levels(10)
    _, c_m, sigma = (c[:-1] for c in FLOW_SAMPLERS[sampler](levels, LEVELS[sampler]))
    weight = c_m.abs() / sigma
    equal, root = (flow_table(levels, sampler, LEVELS[sampler], credit)[:, 3].double() for credit in ("equal", "sqrt"))
    # the table is in fp32
    torch.testing.assert_close(equal[:-1], weight.mean() / weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(root[:-1], (weight.mean() / weight).sqrt(), rtol=1e-6, atol=0)
    assert equal[-1] == root[-1] == 1


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_layout_is_how_much_a_steps_noise_changes_the_image(sampler):
    """Against a chain of one number with the best estimates for Gaussian data, one step of which gets other noise."""
    levels = sd3_levels(10)
    c_x, c_m, sigma = FLOW_SAMPLERS[sampler](levels, LEVELS[sampler])

    def image(noise: torch.Tensor) -> torch.Tensor:
        x = torch.zeros((), dtype=torch.float64)
        for i, z in enumerate(noise):
            s, a = levels[i], 1 - levels[i]
            total = a**2 * LAYOUT_VARIANCE + s**2
            x_0, eps = a * LAYOUT_VARIANCE * x / total, s * x / total
            x = c_x[i] * x + c_m[i] * (eps - x_0) + sigma[i] * z
        return x

    influence = torch.stack([image(row) for row in torch.eye(10, dtype=torch.float64)])[:-1]
    weight = (c_m.abs() / sigma)[:-1]
    expected = weight.mean() / weight * influence / influence.mean()
    credit = flow_table(levels, sampler, LEVELS[sampler], "layout")[:-1, 3].double()
    torch.testing.assert_close(credit, expected, rtol=1e-5, atol=1e-6)


# schedulers


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler', which is not of flow matching"),
        ({"_class_name": ["my", "Scheduler"]}, "not of flow matching"),
        ({"invert_sigmas": True}, "invert_sigmas is true"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": "a"}, "shift is 'a'"),
        ({"num_train_timesteps": 0}, "cannot be used"),
        ({"time_shift_type": "log"}, "cannot be used"),
    ],
)
def test_schedulers_of_another_kind_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        flow_scheduler(config)


def test_a_scheduler_without_falling_noise_is_refused():
    with pytest.raises(ValueError, match="DDIMScheduler"):
        noise_levels(DDIMScheduler())
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        noise_levels(scheduler)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="3 steps do not each lead to less noise"):
        noise_levels(scheduler)


def test_noise_of_diffusers_own_is_left_out():
    scheduler = flow_scheduler({"stochastic_sampling": True, "shift": 2.0, "unknown": 3})
    assert not scheduler.config.stochastic_sampling
    assert scheduler.shift == 2.0
