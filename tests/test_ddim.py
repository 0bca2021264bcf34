"""The coefficient table against diffusers' DDIM in fp64 and against TRL's step."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from ddpo_fast import ops
from ddpo_fast.ddim import PREDICTION_TYPES, DDIMCoefficients, check_steps, ddim_scheduler
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
    schedule = DDIMCoefficients.from_scheduler(scheduler, eta, "cpu")
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
    schedule = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu")
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
        _, _, sigma = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu").at(scheduler.timesteps)
        assert (sigma > 0).all()


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"thresholding": True}, {"prediction_type": "flow"}])
def test_steps_that_are_not_linear_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DDIMCoefficients.from_scheduler(make_scheduler(5, **change), 1.0, "cpu")


def test_more_steps_than_the_model_knows_are_refused():
    with pytest.raises(ValueError, match="1000 sampling steps"):
        DDIMCoefficients.from_scheduler(make_scheduler(1000), 1.0, "cpu")


def test_scheduler_without_timesteps_is_refused():
    with pytest.raises(ValueError, match="set_timesteps"):
        DDIMCoefficients.from_scheduler(DDIMScheduler(**SCHEDULER), 1.0, "cpu")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "steps", "zero_snr"), [("trailing", 7, False), ("trailing", 50, True), ("leading", 7, False)]
)
def test_a_step_leads_to_the_next_sampled_timestep(prediction_type, spacing, steps, zero_snr):
    """From latents of one timestep's noise, a model that is right leads to those of the next one's."""
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("latents without a signal do not say what an image is")
    scheduler = make_scheduler(
        steps, prediction_type=prediction_type, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr
    )
    schedule = DDIMCoefficients.from_scheduler(scheduler, 0.7, "cpu")
    image, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = scheduler.timesteps.tolist()
    for t, following in zip(sampled, [*sampled[1:], 0], strict=True):
        alpha, next_alpha = (scheduler.alphas_cumprod[i].double() for i in (t, following))
        latents = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * image
        output = {"epsilon": noise, "sample": image, "v_prediction": velocity}[prediction_type]
        c_x, c_m, sigma = (c.double() for c in schedule.at(torch.tensor(t)))
        expected = next_alpha.sqrt() * image + (1 - next_alpha - sigma**2).sqrt() * noise
        # fp32 coefficients: one rounding each (6e-8) of terms up to 15 times the result where the signal is weak
        torch.testing.assert_close(c_x * latents + c_m * output, expected, rtol=0, atol=2e-5)
        assert sigma > 0


def test_leading_steps_are_trls_to_the_bit():
    """Every row, of timesteps that are not sampled too, as TRL's stride gives it."""
    scheduler = make_scheduler(20)
    alpha = scheduler.alphas_cumprod.double()
    previous = alpha[(torch.arange(1000) - 50).clamp(min=0)]
    variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
    direction = (1 - previous - variance).clamp(min=0).sqrt()
    c_x = previous.sqrt() / alpha.sqrt()
    c_m = direction - previous.sqrt() * (1 - alpha).sqrt() / alpha.sqrt()
    table = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu").table
    assert torch.equal(table, torch.stack([c_x, c_m, variance.sqrt()], 1).float())


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (5, {"timestep_spacing": "linspace"}, "sample timestep 0"),
        (5, {"steps_offset": 0}, "sample timestep 0"),
        (1000, {"timestep_spacing": "trailing"}, "sample timestep 0"),
        # one more step than was asked for, by a rounding of diffusers'
        (61, {"timestep_spacing": "trailing"}, "use another number of steps"),
        (5, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "pure noise"),
        (1001, {}, "1001 sampling steps reach past"),
    ],
)
def test_steps_without_a_density_are_refused(steps, changes, words):
    with pytest.raises(ValueError, match=words):
        check_steps(DDIMScheduler(**{**SCHEDULER, **changes}), steps, 1.0)


def test_another_scheduler_is_not_stepped_as_ddim():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        DDIMCoefficients.of(scheduler, 1.0, torch.device("cpu"))


def test_a_table_is_kept_for_what_it_was_made_of():
    scheduler, cpu = make_scheduler(10), torch.device("cpu")
    first = DDIMCoefficients.of(scheduler, 1.0, cpu)
    scheduler.set_timesteps(10)
    assert DDIMCoefficients.of(scheduler, 1.0, cpu) is first
    scheduler.timesteps = scheduler.timesteps - 1
    scheduler.timesteps[-1] = 2
    moved = DDIMCoefficients.of(scheduler, 1.0, cpu)
    assert not torch.equal(moved.table, first.table)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    assert DDIMCoefficients.of(scheduler, 1.0, cpu) is not moved
    scheduler.register_to_config(clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample"):
        DDIMCoefficients.of(scheduler, 1.0, cpu)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPPED = (
    "DDIM DDPM PNDM EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete DPMSolverMultistep "
    "DPMSolverSinglestep DEISMultistep UniPCMultistep LCM TCD"
)


@pytest.mark.parametrize("name", STEPPED.split())
def test_a_model_made_for_any_scheduler_is_sampled_by_ddim(name):
    made_for = getattr(diffusers, f"{name}Scheduler")(**BETAS)
    scheduler = ddim_scheduler({**made_for.config, "_class_name": f"{name}Scheduler"})
    torch.testing.assert_close(scheduler.alphas_cumprod, made_for.alphas_cumprod, rtol=0, atol=0)
    assert not scheduler.config.clip_sample
    check_steps(scheduler, 5, 1.0)
    kept = made_for.config.get("timestep_spacing", "leading")
    assert scheduler.config.timestep_spacing == ("trailing" if kept == "linspace" else kept)


def test_a_scheduler_whose_package_is_missing_here_is_not_needed():
    scheduler = ddim_scheduler({"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "linspace", **BETAS})
    assert torch.equal(scheduler.alphas_cumprod, DDIMScheduler(**BETAS).alphas_cumprod)


def test_what_a_schedulers_config_says_of_the_model_is_carried():
    betas = torch.linspace(0.001, 0.5, 100).tolist()
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "trained_betas": betas,
        "num_train_timesteps": 100,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    scheduler = ddim_scheduler(config)
    assert (scheduler.config.prediction_type, len(scheduler.alphas_cumprod)) == ("v_prediction", 100)
    assert scheduler.alphas_cumprod[-1] == 0
    check_steps(scheduler, 10, 1.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "flow matching"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "EDMEulerScheduler"}, "another kind of noise"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "another kind of noise"),
        ({"_class_name": "MyScheduler"}, "none of diffusers'"),
        ({"_class_name": ["my", "Scheduler"]}, "none of diffusers'"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "prediction_type is 'score'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "log"}, "timestep_spacing is 'log'"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas are 2"),
        ({"_class_name": "DDIMScheduler", "beta_end": 3.0}, "betas must lie between 0 and 1"),
        ({"_class_name": "DDIMScheduler", "beta_end": "a"}, "cannot be used"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_a_scheduler_of_another_kind_of_noise_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        ddim_scheduler(config)
