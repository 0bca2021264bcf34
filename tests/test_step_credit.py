"""Step credit, clip units and steps that are left out, in whole runs of the trainer."""

from __future__ import annotations

import math

import pytest
import torch
from compare_runs import metrics_of, relative_distance, same_bits, trained_weights
from diffusers import DDIMScheduler
from rounding import RUNS_APART_IN_FP64, in_fp64
from test_ppo import ONE_UPDATE, REWARDS, Watched, with_ratios
from tiny_run import build_pipeline

from ddpo_fast import DDPOTrainer, ops
from ddpo_fast.ddim import PREDICTION_TYPES, DDIMCoefficients
from ddpo_fast.policy import ratio_clip_range
from ddpo_fast.step_credit import LAYOUT_VARIANCE, of_window, step_credits
from ddpo_fast.tiny_sd.build import SCHEDULER


class OwnLoss(DDPOTrainer):
    """A user's loss, which is computed by autograd and not by the fused op."""

    def loss(self, advantages, clip_range, ratio):
        return super().loss(advantages, clip_range, ratio)


class TRLsLoss(DDPOTrainer):
    """TRL's objective, which knows of no credit."""

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds):
        log_prob = self.policy.log_prob(latents, timesteps, next_latents, embeds)
        limit, clip_range = self.config.train_adv_clip_max, self.config.train_clip_range
        ratio = torch.exp(log_prob - log_probs)
        loss = self.loss(advantages.clamp(-limit, limit), clip_range, ratio)
        return loss, 0.5 * (log_prob - log_probs).square().mean(), ((ratio - 1).abs() > clip_range).float().mean()


TRAINED = {"num_epochs": 1, "train_num_inner_epochs": 2, "train_learning_rate": 1e-4, "train_clip_range": 2e-3}


@pytest.mark.parametrize(("credit", "use_lora"), [("equal", False), ("sqrt", True)])
def test_the_fused_loss_and_autograd_train_alike(make_trainer, tmp_path, credit, use_lora):
    """In fp64, with and without guidance; the credit moves the weights to another place than TRL's weighting."""
    ends, metrics = {}, {}
    for name, kind, own in (("fused", DDPOTrainer, credit), ("plain", OwnLoss, credit), ("none", DDPOTrainer, "none")):
        settings = {"step_credit": own, "use_lora": use_lora, "train_cfg": not use_lora, "trainer_class": kind}
        trainer = in_fp64(make_trainer(output_dir=tmp_path / name, **TRAINED | settings))
        before = trained_weights(trainer)
        trainer.train()
        ends[name], metrics[name] = trained_weights(trainer), metrics_of(trainer, "update")
    assert relative_distance(ends["fused"], ends["plain"], before) < RUNS_APART_IN_FP64
    assert relative_distance(ends["fused"], ends["none"], before) > 0.02
    for fused, plain in zip(metrics["fused"], metrics["plain"], strict=True):
        for name in ("loss", "approx_kl", "clipfrac"):
            # logged in fp32
            assert fused[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-9), name


def test_without_credit_the_loss_has_trls_bits(make_trainer, tmp_path):
    ends = []
    for name, kind in (("ours", OwnLoss), ("theirs", TRLsLoss)):
        trainer = make_trainer(output_dir=tmp_path / name, trainer_class=kind, **TRAINED)
        before = trained_weights(trainer)
        trainer.train()
        assert (trainer.policy.noise_table[:, 3] == 1).all()
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)
    assert not same_bits(before, ends[0])


def test_skipping_sees_the_credited_ratio(make_trainer, tmp_path):
    """Pairs are left out by their credited ratio, and the gradient stays that of all pairs.

    The log-ratios are 1.5 clip ranges: those of steps with a credit below 2/3, and no others, are not clipped.
    """
    rewards = torch.tensor(REWARDS)
    beyond = 1.5e-3 * rewards.sign()[:, None].expand(6, 5)
    far = 0.5 * rewards.sign()[:, None].expand(6, 5)
    found = {}
    for skips in (False, True):
        trainer = make_trainer(
            step_credit="equal", train_skip_dead_pairs=skips, output_dir=tmp_path / f"{skips}", **ONE_UPDATE
        )
        watched = Watched(with_ratios(in_fp64(trainer), [far, beyond]))
        trainer.train(2)
        trained = sum(size for size, has_graph in watched.updates[-1] if has_graph)
        found[skips] = watched.gradient, metrics_of(trainer, "update")[-1], trained
    scheduler = trainer.sd_pipeline.scheduler
    credits = trainer.policy.noise_table[scheduler.timesteps, 3]
    live = int((1.5 * credits <= 1).sum())
    assert 0 < live < 5
    (every, all_metrics, _), (some, metrics, trained) = found[False], found[True]
    # four of the six images have an advantage
    assert trained == 4 * live
    assert metrics["zero_gradient"] == pytest.approx(1 - live / 5)
    assert metrics["clipfrac"] == pytest.approx(1 - live / 5)
    assert metrics["approx_kl"] == pytest.approx(0.5 * 1.5e-3**2, rel=1e-6), "approx_kl is TRL's, without credit"
    assert every.norm() > 0
    assert (some - every).norm() < 1e-12 * every.norm()
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], rel=1e-6)


# the unit of the clip range


def sized_trainer(make_trainer, tmp_path, size: int, **settings):
    pipeline = build_pipeline()
    pipeline.unet.register_to_config(sample_size=size)
    pipeline.save_pretrained(tmp_path / f"model-{size}")
    return make_trainer(model=str(tmp_path / f"model-{size}"), output_dir=tmp_path / f"{size}", **settings)


@pytest.mark.parametrize("unit", ["step", "ratio"])
def test_a_clip_range_in_steps_clips_latents_of_every_size_alike(make_trainer, tmp_path, unit):
    """The mean of each step has moved as many standard deviations in latents of 256 as in latents of 1024 elements."""
    generator = torch.Generator().manual_seed(0)
    # in standard deviations of a log-ratio when the mean has moved by one standard deviation of the step
    moved = torch.randn(6, 5, generator=generator)
    fractions, skipped = [], []
    for size in (8, 16):
        settings = ONE_UPDATE | {"train_clip_unit": unit, "train_clip_range": 0.5 if unit == "step" else 0.5 / 16}
        trainer = in_fp64(sized_trainer(make_trainer, tmp_path, size, **settings))
        elements = math.prod(trainer.policy.latent_shape)
        assert elements == 4 * size**2
        watched = Watched(with_ratios(trainer, [moved / math.sqrt(elements)]))
        trainer.train(1)
        assert len(watched.updates) == 1
        (update,) = metrics_of(trainer, "update")
        fractions.append(update["clipfrac"])
        skipped.append(update["zero_gradient"])
    # pairs whose image has no advantage are not counted
    has_advantage = torch.tensor(REWARDS) != 0
    expected = float((moved[has_advantage].abs() > 0.5).double().mean())
    assert fractions[0] == pytest.approx(expected)
    assert 0 < skipped[0] < 1
    if unit == "step":
        assert fractions[1] == pytest.approx(expected)
        assert skipped[1] == skipped[0]
    else:
        assert fractions[1] < expected


def test_what_moves_a_step_as_far_is_clipped_as_often():
    """The share of steps that is clipped after their means moved by `delta` standard deviations depends on the range
    and on delta, and not on the latent's size, as long as delta is small (see `ratio_clip_range`)."""
    generator = torch.Generator().manual_seed(0)
    delta, clip_range, count = 0.01, 0.015, 1500
    expected = math.erfc(clip_range / delta / math.sqrt(2))
    table = torch.tensor([[1.0, -0.2, 0.4, 1.0]], dtype=torch.float64)
    for shape in ((4, 8, 8), (4, 16, 16)):
        output, latents, noise, push = torch.randn(4, count, *shape, generator=generator, dtype=torch.float64)
        rows = torch.zeros(count, dtype=torch.int64)
        sampled = ops.step_logprob(output, latents, noise, table, rows)
        # c_m / sigma is -1/2
        moved = output + 2 * delta * push
        elements = math.prod(shape)
        scored = ops.ppo_loss(
            moved,
            latents,
            sampled.latents,
            sampled.log_probs,
            torch.ones(count, dtype=torch.float64),
            table,
            rows,
            clip_range=clip_range / math.sqrt(elements),
            advantage_limit=5.0,
        )
        # three standard deviations of a share of 1,500
        assert scored.clip_fraction.item() == pytest.approx(expected, abs=3 * math.sqrt(expected / count))


def test_the_clip_range_in_units_of_the_ratio(make_trainer):
    trainer = make_trainer(train_clip_unit="step", train_clip_range=0.4)
    assert trainer.policy.clip_range == trainer.run_log.clip_range == trainer.run_log.health.clip_range == 0.4 / 16
    trainer.config.train_clip_unit = "ratio"
    assert ratio_clip_range(trainer.config, object()) == 0.4


# steps that are left out


def watch_timesteps(trainer) -> list[int]:
    """The timesteps of every pair that is trained on or scored again; sampling calls the UNet in another way."""
    seen, output = [], trainer.policy.output

    def watched(latents, timesteps, embeds):
        seen.extend(timesteps.tolist())
        return output(latents, timesteps, embeds)

    trainer.policy.output = watched
    return seen


@pytest.mark.parametrize("rescores", [False, True])
@pytest.mark.parametrize(("fraction", "trained_steps"), [(1.0, 3), (0.7, 2)])
def test_the_last_steps_are_not_trained(make_trainer, rescores, fraction, trained_steps):
    """Of five steps, 0.4 leaves out the last two: no UNet call in training has them, and pairs are fewer."""
    trainer = make_trainer(
        train_skip_last_steps=0.4,
        train_timestep_fraction=fraction,
        train_recompute_log_probs=rescores,
        # otherwise the trainer measures sizes by calls at timestep 0
        train_micro_batch_size=4,
        sample_merge_batches=1,
        num_epochs=1,
    )
    seen = watch_timesteps(trainer)
    watched = Watched(trainer)
    trainer.train()
    steps = trainer.sd_pipeline.scheduler.timesteps.tolist()
    assert len(steps) == 5
    # each image has its own order of steps, so with a fraction, too, every trainable step is trained
    assert set(seen) == set(steps[:3])
    pairs = [sum(size for size, _ in update) for update in watched.updates]
    # an update has 2 batches of 2 images
    assert pairs == [4 * trained_steps] * 2
    assert len(seen) == sum(pairs) + (8 * 3 if rescores else 0)
    assert trainer.config.pairs_per_update == 4 * trained_steps
    (first, *_) = metrics_of(trainer, "update")
    assert first["ratio_drift"] < 1e-4


def test_the_arithmetic_names_the_pairs_that_are_left(make_trainer):
    config = make_trainer(train_skip_last_steps=0.4, train_timestep_fraction=0.7).config
    told = config.batch_arithmetic()
    assert "5 denoising steps each" in told
    assert "8 (image, timestep) pairs per update (4 images x 2 timesteps)" in told
    assert "20 (image, timestep) pairs per update (4 images x 5 timesteps)" in make_trainer().config.batch_arithmetic()


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_layout_is_how_much_a_steps_noise_changes_the_image(prediction, eta, steps):
    """Against a chain of one number with the best estimates for Gaussian data, one step of which gets other noise."""
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    table = DDIMCoefficients.of(scheduler, eta, torch.device("cpu"), "layout").table.double()
    a = scheduler.alphas_cumprod.double()

    def output(x: torch.Tensor, t: int) -> torch.Tensor:
        total = LAYOUT_VARIANCE * a[t] + 1 - a[t]
        x_0, eps = LAYOUT_VARIANCE * a[t].sqrt() * x / total, (1 - a[t]).sqrt() * x / total
        v = a[t].sqrt() * eps - (1 - a[t]).sqrt() * x_0
        return {"epsilon": eps, "sample": x_0, "v_prediction": v}[prediction]

    def image(noise: torch.Tensor) -> torch.Tensor:
        x = torch.zeros((), dtype=torch.float64)
        for z, t in zip(noise, scheduler.timesteps.tolist(), strict=True):
            c_x, c_m, sigma, _ = table[t]
            x = c_x * x + c_m * output(x, t) + sigma * z
        return x

    # the chain is linear, so the image's change by a unit of one step's noise is that noise's share of it
    influence = torch.stack([image(row) for row in torch.eye(steps, dtype=torch.float64)])
    _, c_m, sigma, credit = table[scheduler.timesteps].unbind(1)
    weight = c_m.abs() / sigma
    expected = weight.mean() / weight * influence / influence.mean()
    # the table is in fp32
    torch.testing.assert_close(credit, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("credit", ["none", "equal", "sqrt", "layout"])
def test_a_windows_credits_are_those_of_its_steps_alone(credit):
    """As in a table of these steps only; for layout, whose means are over the steps with noise, in proportion."""
    generator = torch.Generator().manual_seed(0)
    c_m, sigma, layout = torch.rand(3, 12, generator=generator, dtype=torch.float64) + 0.1
    sampled = torch.arange(12)
    whole = torch.stack([c_m, c_m, sigma, step_credits(credit, c_m, sigma, sampled, layout)], dim=1)
    found = of_window(credit, whole[2:6])
    weight = (c_m / sigma)[2:6]
    if credit == "layout":
        assert torch.allclose((found * weight).mean(), weight.mean())
        assert torch.allclose(found / found[0], whole[2:6, 3] / whole[2, 3])
    else:
        alone = step_credits(credit, c_m[2:6], sigma[2:6], sampled[:4], layout[2:6])
        assert torch.allclose(found, alone)
