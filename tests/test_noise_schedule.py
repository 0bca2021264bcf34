"""The coefficient table against diffusers' DDIM in fp64 and against TRL's step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from ddpo_fast import ops
from ddpo_fast.noise_schedule import PREDICTION_TYPES, NoiseSchedule
from ddpo_fast.tiny_sd.build import SCHEDULER


def make_scheduler(steps: int, **changes) -> DDIMScheduler:
    scheduler = DDIMScheduler(**{**SCHEDULER, **changes})
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (20, 0.5), (7, 0.0)])
def test_mean_is_diffusers_ddim_step(prediction_type, steps, eta):
    scheduler = make_scheduler(steps, prediction_type=prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = NoiseSchedule.from_scheduler(scheduler, eta, "cpu")
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps[:-1]:  # the last step differs on purpose: TRL keeps its std above 0
        c_x, c_m, sigma = (c.double().expand(3) for c in schedule.at(t))
        theirs = scheduler.step(m, int(t), x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
        ours = ops.take_step(m, x, torch.zeros_like(x), c_x, c_m, sigma)
        # the table is fp32: one rounding of each coefficient
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_trls(prediction_type):
    from trl.models.modeling_sd_base import scheduler_step

    scheduler = make_scheduler(10, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler, 1.0, "cpu")
    generator = torch.Generator().manual_seed(0)
    x, m, following = torch.randn(3, 10, 4, 8, 8, generator=generator)
    t = scheduler.timesteps.clone()
    theirs = scheduler_step(scheduler, m, t, x, eta=1.0, prev_sample=following).log_probs
    ours = ops.score_step(m, x, following, *schedule.at(t))
    # TRL's sigma comes from differences of fp32 numbers near 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_std_is_positive_at_every_step_and_last():
    for steps in (1, 2, 10, 50, 500):
        scheduler = make_scheduler(steps)
        _, _, sigma = NoiseSchedule.from_scheduler(scheduler, 1.0, "cpu").at(scheduler.timesteps)
        assert (sigma > 0).all()


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"thresholding": True}, {"prediction_type": "flow"}])
def test_steps_that_are_not_linear_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NoiseSchedule.from_scheduler(make_scheduler(5, **change), 1.0, "cpu")


def test_more_steps_than_the_model_knows_are_refused():
    with pytest.raises(ValueError, match="1000 sampling steps"):
        NoiseSchedule.from_scheduler(make_scheduler(1000), 1.0, "cpu")


def test_scheduler_without_timesteps_is_refused():
    with pytest.raises(ValueError, match="set_timesteps"):
        NoiseSchedule.from_scheduler(DDIMScheduler(**SCHEDULER), 1.0, "cpu")
