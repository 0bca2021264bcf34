"""The table of step coefficients against diffusers' DDIM in fp64 and against TRL's step."""

from __future__ import annotations

import math
import statistics

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from ddpo_fast import ops
from ddpo_fast.ddim import PREDICTION_TYPES, DDIMCoefficients, check_steps, ddim_scheduler
from ddpo_fast.step_credit import step_credits
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
    for t in scheduler.timesteps[:-1]:  # in the last step TRL keeps the std above 0, and diffusers does not
        c_x, c_m, sigma = (c.double().expand(3) for c in schedule.at(t))
        theirs = scheduler.step(m, int(t), x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
        ours = ops.take_step(m, x, torch.zeros_like(x), c_x, c_m, sigma)
        # the table is in fp32: each coefficient is rounded once
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_step_equals_trls(prediction_type):
    from trl.models.modeling_sd_base import scheduler_step

    scheduler = make_scheduler(10, prediction_type=prediction_type)
    schedule = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu")
    generator = torch.Generator().manual_seed(0)
    x, m, following = torch.randn(3, 10, 4, 8, 8, generator=generator)
    t = scheduler.timesteps.clone()
    theirs = scheduler_step(scheduler, m, t, x, eta=1.0, prev_sample=following).log_probs
    ours = ops.score_step(m, x, following, *schedule.at(t))
    # TRL computes sigma from differences of fp32 numbers near 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_std_is_positive_at_every_step_including_the_last():
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
    """With the true noise as the model's output, a step leads from latents at one timestep to those at the next."""
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
    """All rows of the table are TRL's, also those of timesteps that are not sampled."""
    scheduler = make_scheduler(20)
    alpha = scheduler.alphas_cumprod.double()
    previous = alpha[(torch.arange(1000) - 50).clamp(min=0)]
    variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
    direction = (1 - previous - variance).clamp(min=0).sqrt()
    c_x = previous.sqrt() / alpha.sqrt()
    c_m = direction - previous.sqrt() * (1 - alpha).sqrt() / alpha.sqrt()
    table = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu").table
    assert torch.equal(table, torch.stack([c_x, c_m, variance.sqrt(), torch.ones(1000)], 1).float())


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (5, {"timestep_spacing": "linspace"}, "sample timestep 0"),
        (5, {"steps_offset": 0}, "sample timestep 0"),
        (1000, {"timestep_spacing": "trailing"}, "sample timestep 0"),
        # diffusers rounds so that there is one step more than was asked for
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


def test_a_table_is_computed_again_only_for_other_inputs():
    scheduler, cpu = make_scheduler(10), torch.device("cpu")
    first = DDIMCoefficients.of(scheduler, 1.0, cpu)
    scheduler.set_timesteps(10)
    assert DDIMCoefficients.of(scheduler, 1.0, cpu) is first
    scheduler.timesteps = scheduler.timesteps - 1
    scheduler.timesteps[-1] = 2
    moved = DDIMCoefficients.of(scheduler, 1.0, cpu)
    assert not torch.equal(moved.table, first.table)
    credited = DDIMCoefficients.of(scheduler, 1.0, cpu, "equal")
    assert torch.equal(credited.table[:, :3], moved.table[:, :3])
    assert not torch.equal(credited.table, moved.table)
    assert DDIMCoefficients.of(scheduler, 1.0, cpu) is moved
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    assert DDIMCoefficients.of(scheduler, 1.0, cpu) is not moved
    scheduler.register_to_config(clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample"):
        DDIMCoefficients.of(scheduler, 1.0, cpu)


def weight_of(a_t: float, a_s: float, eta: float, prediction_type: str) -> float:
    """By how many standard deviations a step's mean moves for each unit of the model's output."""
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    # how the estimates of the image and of the noise change with the output: at given latents, one follows from the
    # other by x_t = sqrt(a_t) image + sqrt(1 - a_t) noise
    image, noise = {
        "epsilon": (-math.sqrt((1 - a_t) / a_t), 1.0),
        "sample": (1.0, -math.sqrt(a_t / (1 - a_t))),
        "v_prediction": (-math.sqrt(1 - a_t), math.sqrt(a_t)),
    }[prediction_type]
    return abs(math.sqrt(a_s) * image + math.sqrt(1 - a_s - sigma**2) * noise) / sigma


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_credits_are_the_formula(prediction_type, spacing, steps, eta):
    scheduler = make_scheduler(steps, prediction_type=prediction_type, timestep_spacing=spacing)
    alphas = scheduler.alphas_cumprod.tolist()
    sampled = scheduler.timesteps.tolist()
    following = {**{t: t - 1000 // steps for t in range(1000)}, **dict(zip(sampled, [*sampled[1:], 0], strict=True))}
    weights = {t: weight_of(alphas[t], alphas[max(s, 0)], eta, prediction_type) for t, s in following.items() if t}
    mean = statistics.fmean(weights[t] for t in sampled)
    rows = list(weights)
    none, equal, sqrt = (
        DDIMCoefficients.from_scheduler(scheduler, eta, "cpu", credit).table[rows, 3].double()
        for credit in ("none", "equal", "sqrt")
    )
    expected = torch.tensor([mean / weight for weight in weights.values()], dtype=torch.float64)
    # the table is in fp32, and the weights are differences of nearly equal numbers in fp64
    torch.testing.assert_close(equal, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(sqrt, expected.sqrt(), rtol=1e-6, atol=0)
    assert (none == 1).all()
    # each step's weight times its credit is the mean: all say the same, and together what they said before
    said = torch.tensor([weights[t] for t in sampled]) * equal[[rows.index(t) for t in sampled]]
    assert said.tolist() == pytest.approx([mean] * steps, rel=1e-6)


@pytest.mark.parametrize(("steps", "largest", "median"), [(20, 5.4, 0.70), (50, 3.3, 0.42)])
def test_the_weights_that_docs_learning_states(steps, largest, median):
    scheduler = make_scheduler(steps)
    _, c_m, sigma = DDIMCoefficients.from_scheduler(scheduler, 1.0, "cpu").at(scheduler.timesteps)
    weights = (c_m.abs() / sigma).tolist()
    assert max(weights) == pytest.approx(largest, abs=0.05)
    assert statistics.median(weights) == pytest.approx(median, abs=0.005)


@pytest.mark.parametrize("credit", ["equal", "sqrt"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_credit_is_finite(credit, prediction_type, eta):
    """Also of timestep 0, whose step has no noise, of steps from pure noise, and without any noise."""
    zero_snr = prediction_type != "epsilon"
    scheduler = make_scheduler(
        20, prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr
    )
    credits = DDIMCoefficients.from_scheduler(scheduler, eta, "cpu", credit).table[:, 3]
    assert credits.isfinite().all()
    assert (credits == 1).all() if eta == 0 else (credits[1:] > 0).all()


def test_a_step_without_a_gradient_has_no_credit():
    c_m, sigma = torch.tensor([[0.0, 0.2, 0.4, 0.4, 0.0, 0.1], [0.1, 0.1, 0.1, 0.0, 0.0, 0.1]], dtype=torch.float64)
    sampled = torch.tensor([2, 1, 0])
    # weights of 0, 2 and 4 are sampled; a step without noise, or without anything, has TRL's credit
    expected = [0.0, 1.0, 0.5, 1.0, 1.0, 2.0]
    # what only 'layout' reads
    kept = torch.full((6,), 0.5, dtype=torch.float64)
    assert step_credits("equal", -c_m, sigma, sampled, kept).tolist() == pytest.approx(expected)
    roots = [v**0.5 for v in expected]
    assert step_credits("sqrt", c_m, sigma, sampled, kept).tolist() == pytest.approx(roots)
    layout = step_credits("layout", c_m, sigma, sampled, kept)
    assert layout.isfinite().all()
    assert layout[0] == 0
    with pytest.raises(ValueError, match="step_credit is 'half' but must be one of"):
        step_credits("half", c_m, sigma, sampled, kept)


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


def test_a_schedulers_missing_package_is_not_needed():
    scheduler = ddim_scheduler({"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "linspace", **BETAS})
    assert torch.equal(scheduler.alphas_cumprod, DDIMScheduler(**BETAS).alphas_cumprod)


def test_settings_of_the_model_are_taken_from_the_schedulers_config():
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
