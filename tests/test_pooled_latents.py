"""`train_pool_latents`: the loss sees the exact density of pooled steps, in sampling and in training alike."""

from __future__ import annotations

import math

import pytest
import torch
from compare_runs import metrics_of, relative_distance, trained_weights
from rounding import drift_limit, drift_limits

from ddpo_fast.ddim import DDIMCoefficients
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.trainer import DDPOTrainer

ONE_UPDATE = {"num_epochs": 1, "train_batch_size": 4, "train_gradient_accumulation_steps": 2}


def squares(latents: torch.Tensor, k: int) -> torch.Tensor:
    """Means over k x k squares by indexing, [..., H, W] -> [..., H // k, W // k]; rows that fill no square are left."""
    rows, columns = latents.shape[-2] // k, latents.shape[-1] // k
    parts = latents[..., : rows * k, : columns * k].unflatten(-1, (columns, k)).unflatten(-3, (rows, k))
    return parts.mean((-3, -1))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_log_probs_are_those_of_the_pooled_step(make_trainer, prediction, k):
    """Against the density of the pooled latents in fp64, with the output that the UNet has for the stored latents."""
    trainer = make_trainer(train_pool_latents=k, sample_guidance_scale=1.0)
    trainer.sd_pipeline.scheduler.register_to_config(prediction_type=prediction)
    (sample, *_), _ = trainer._generate_samples(1, 4)
    rounding = drift_limit(trainer, sample)
    steps = trainer.sd_pipeline.scheduler.timesteps
    table = DDIMCoefficients.of(trainer.sd_pipeline.scheduler, 1.0, torch.device("cpu")).table.double()
    for i, t in enumerate(steps):
        before, after = sample.trail[:, i], sample.trail[:, i + 1]
        with torch.no_grad():
            output = trainer.policy.output(before, t.expand(4), sample.prompt_embeds)
        c_x, c_m, sigma, _ = table[t]
        mean, std = c_x * squares(before.double(), k) + c_m * squares(output.double(), k), sigma / k
        z = (squares(after.double(), k) - mean) / std
        expected = -z.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2
        # Latents are stored in fp32, of size up to 10 and with steps of sigma down to 0.06: z is known to 1e-5 of a
        # value of about 1. On some processors training's call of the UNet adds up in another order than sampling's.
        torch.testing.assert_close(sample.log_probs[:, i].double(), expected, rtol=0, atol=1e-4 + rounding)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("rescored", [False, True])
def test_the_ratio_before_the_first_update_is_one(make_trainer, rescored, precision):
    settings = {"train_recompute_log_probs": rescored, "mixed_precision": precision, **ONE_UPDATE}
    trainer = make_trainer(train_pool_latents=4, **settings)
    limits = drift_limits(trainer)
    trainer.train()
    (update,) = metrics_of(trainer, "update")
    # sampling's log-probs are of the noise, training's of latents that were rounded to fp32: see the test above
    assert update["ratio_drift"] < limits[0] + 1e-4
    assert update["grad_norm"] > 0


def test_half_precision_is_pooled_without_rounding(make_trainer):
    """A mean of 16 numbers that is rounded to bf16 would be 2^-9 of itself away, and that is most of a drift."""
    output = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pooled = make_trainer(train_pool_latents=4).policy.pooled(output)
    # a sum of 16 numbers of size 1 in fp32 is rounded 16 times, by 2^-24 each
    torch.testing.assert_close(pooled, squares(output.double(), 4).float(), rtol=0, atol=16 * 2**-24)


class OwnLoss(DDPOTrainer):
    """The same loss, but by autograd, as a user's override is."""

    def loss(self, advantages, clip_range, ratio):
        return super().loss(advantages, clip_range, ratio)


@pytest.mark.parametrize("credit", ["none", "layout"])
def test_autograd_gives_the_same_update(make_trainer, tmp_path, credit):
    settings = {"train_pool_latents": 2, "step_credit": credit, "train_clip_range": 0.1, **ONE_UPDATE}
    fused = make_trainer(output_dir=tmp_path / "fused", **settings)
    start = {name: value.clone() for name, value in trained_weights(fused).items()}
    fused.train()
    plain = make_trainer(output_dir=tmp_path / "plain", trainer_class=OwnLoss, **settings)
    plain.train()
    # Gradients agree to 1e-6, and Adam's first steps are their signs: 2 sqrt(1e-6) = 0.2 % of the way, see rounding.py
    assert relative_distance(trained_weights(fused), trained_weights(plain), start) < 3e-3
    unpooled = make_trainer(output_dir=tmp_path / "unpooled", **{**settings, "train_pool_latents": 1})
    unpooled.train()
    assert relative_distance(trained_weights(fused), trained_weights(unpooled), start) > 0.1


class OwnCall(DefaultDDPOStableDiffusionPipeline):
    """A pipeline with a `__call__` of its own, whose noise the trainer does not see."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_pipeline_of_the_users_is_scored_again(make_trainer, model_dir):
    trainer = make_trainer(pipeline=OwnCall(model_dir, use_lora=False), train_pool_latents=2, **ONE_UPDATE)
    limits = drift_limits(trainer)
    trainer.train()
    (update,) = metrics_of(trainer, "update")
    assert update["ratio_drift"] < limits[0]


def test_squares_larger_than_the_latents_are_refused(make_trainer):
    with pytest.raises(ValueError, match="train_pool_latents is 9, but the model's latents have 8 x 8 pixels"):
        make_trainer(train_pool_latents=9)


def test_the_clip_range_in_steps_is_of_the_pooled_elements(make_trainer):
    trainer = make_trainer(train_pool_latents=4, train_clip_unit="step", train_clip_range=0.8)
    # latents of 4 x 8 x 8
    assert trainer.policy.clip_range == pytest.approx(0.8 / math.sqrt(4 * 2 * 2))
