"""A run stops at values that are not finite and says where they are; one that learns nothing warns once."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from compare_runs import same_bits, trained_weights
from tiny_run import brightness

from ddpo_fast import DDPOConfig
from ddpo_fast.health import Health, RunStopped, SampleHealth, check_weights
from ddpo_fast.rewards import jpeg_compressibility
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.trajectory import Trajectory

STEPS = 5
NAN, INF = float("nan"), float("inf")


def samples(prompts=("a cat", "a dog", "a bee")):
    generator = torch.Generator().manual_seed(0)
    count = len(prompts)
    trajectory = Trajectory(
        prompts=prompts,
        prompt_ids=torch.zeros(count, 2, dtype=torch.int64),
        prompt_embeds=torch.zeros(count, 2, 3),
        negative_prompt_embeds=torch.zeros(count, 2, 3),
        timesteps=torch.arange(STEPS).repeat(count, 1),
        trail=torch.randn(count, STEPS + 1, 4, 2, 2, generator=generator),
        log_probs=torch.randn(count, STEPS, generator=generator),
    )
    return trajectory, torch.rand(count, 3, 4, 4, generator=generator)


def found(trajectory, images):
    health = SampleHealth()
    health.add(*samples())
    health.add(trajectory, images)
    health.check()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_samples_that_are_not_finite_stop_the_run(value):
    trajectory, images = samples()
    found(trajectory, images)
    images[2, 0, 1, 1] = value
    with pytest.raises(RunStopped, match="the image of 'a bee' has pixels that are not finite"):
        found(trajectory, images)
    trajectory.log_probs[0, 3] = value
    with pytest.raises(RunStopped, match=r"log-probability of an image of 'a cat' .* step 4 of 5"):
        found(trajectory, images)
    trajectory.trail[1, 2:, 0, 0, 0] = value
    with pytest.raises(RunStopped, match=r"latents of an image of 'a dog' .* step 2 of 5"):
        found(trajectory, images)


def test_images_that_are_all_the_same_stop_the_run():
    trajectory, images = samples()
    health = SampleHealth()
    for _ in range(2):
        health.add(trajectory, torch.zeros_like(images))
    with pytest.raises(RunStopped, match="all 6 images of the epoch are the same"):
        health.check()


def update(**changes):
    return {"loss": 0.0, "approx_kl": 1e-9, "clipfrac": 0.2, "grad_norm": 1.0, **changes}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (update(loss=NAN), "loss of update 7 is nan"),
        (update(grad_norm=INF), "gradient of update 7 is inf"),
        (update(loss_scale=0.5), "loss scale of 0.5"),
        # the KL estimate is half the mean square of the log-ratios, here 201
        (update(approx_kl=0.5 * 201**2), "before update 7 the policy has diverged"),
        (update(approx_kl=NAN), "before update 7 the policy has diverged"),
    ],
)
def test_updates_that_stop_the_run(info, words):
    with pytest.raises(RunStopped, match=words) as stopped:
        Health(DDPOConfig()).update(7, info, "runs/a")
    assert "train_learning_rate" in str(stopped.value)
    assert "runs/a" in str(stopped.value)


@pytest.mark.parametrize(
    ("info", "word", "good"),
    [
        (update(), "", True),
        (update(grad_norm=INF, skipped_step=1.0), "", True),
        (update(approx_kl=1.0), "far from the one that sampled", False),
        (update(clipfrac=1.0), "raise train_clip_range", True),
    ],
)
def test_updates_that_are_warned_of_once(info, word, good, caplog):
    health = Health(DDPOConfig())
    for number in range(3):
        health.update(number, info, "runs/a")
    assert len(caplog.records) == bool(word)
    assert word in caplog.text
    assert health.good == good


def test_equal_rewards_are_warned_of_once(caplog):
    health = Health(DDPOConfig())
    health.rewards(0, np.array([1.0, 2.0]))
    health.rewards(0, np.array([1.0]))
    assert not caplog.records
    for epoch in range(3):
        health.rewards(epoch, np.full(4, 0.5, dtype=np.float32))
    assert len(caplog.records) == 1
    assert "all 4 rewards of epoch 1 are 0.5" in caplog.text


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_not_finite_stop_the_run(value):
    weights = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    check_weights(weights, 3)
    weights["b"][1, 1] = value
    with pytest.raises(RunStopped, match="weights of b are not finite after 3 epochs"):
        check_weights(weights, 3)


@pytest.mark.parametrize("reward", [jpeg_compressibility, brightness])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_vae_that_overflows_stops_the_run_before_it_learns(make_trainer, tmp_path, reward, share):
    trainer = make_trainer(reward=reward, num_epochs=1, sample_num_steps=2)
    vae = trainer.sd_pipeline.vae
    decode = vae.decode

    def overflowing(*arguments, **options):
        images = decode(*arguments, **options)[0]
        images[: int(len(images) * share)] = NAN
        return (images,)

    vae.decode = overflowing
    before = trained_weights(trainer)
    with pytest.raises(RunStopped, match="the VAE overflows"):
        trainer.train()
    assert same_bits(before, trained_weights(trainer))
    assert not checkpoint.list_in(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunStopped, match="the VAE overflows"):
        trainer.evaluate(("a cat",) * 2, ({},) * 2)


def test_a_broken_model_is_not_blamed_on_its_vae(make_trainer):
    trainer = make_trainer(sample_num_steps=2)
    next(trainer.sd_pipeline.unet.parameters()).data.fill_(NAN)
    with pytest.raises(RunStopped, match=r"the latents of the image of 'a cat' are not finite: the model's weights"):
        trainer.evaluate(("a cat",), ({},))


def test_broken_weights_are_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(num_epochs=1, sample_num_steps=2)
    trainer.train()
    step, updates = trainer.engine.step, []

    def step_and_break():
        metrics = step()
        updates.append(metrics)
        if len(updates) == 2:
            next(trainer.sd_pipeline.unet.parameters()).data[0] = INF
        return metrics

    trainer.engine.step = step_and_break
    with pytest.raises(RunStopped, match=r"weights of .* are not finite"):
        trainer.train(1)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_1"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_diverged_run_is_stopped(make_trainer, use_lora):
    trainer = make_trainer(
        reward=jpeg_compressibility, train_learning_rate=100.0, num_epochs=6, use_lora=use_lora, sample_num_steps=3
    )
    with pytest.raises(RunStopped, match="train_learning_rate"):
        trainer.train()


def test_the_last_healthy_checkpoint_is_kept_beyond_the_limit(make_trainer, tmp_path, caplog):
    scored = []

    def reward(images, prompts, metadata):
        scored.append(1)
        varied, info = brightness(images, prompts, metadata)
        return varied if len(scored) <= 4 else torch.zeros(len(images)), info

    settings = {"sample_num_steps": 2, "num_checkpoint_limit": 1, "reward_overlap": False, "train_learning_rate": 1e-6}
    make_trainer(reward=reward, num_epochs=5, **settings).train()
    kept = sorted(path.name for path in checkpoint.list_in(tmp_path / "run" / "checkpoints"))
    # an epoch has two batches, so the rewards of the first two epochs differ
    assert kept == ["checkpoint_2", "checkpoint_5"]
    assert checkpoint.newest_healthy(tmp_path / "run" / "checkpoints").name == "checkpoint_2"
    assert caplog.text.count("without spread") == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_29_a_reward_that_seeds_does_not_repeat_the_noise(make_trainer, caplog, overlap):
    caplog.set_level(logging.WARNING)
    images = []

    def reward(batch, prompts, metadata):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        return brightness(batch, prompts, metadata)

    def hook(batches, *_):
        images.append(batches[0][0].clone())

    settings = {"train_learning_rate": 0.0, "sample_num_steps": 2, "num_epochs": 3, "reward_overlap": overlap}

    def prompts():
        random.random()
        return "a cat", {}

    make_trainer(reward=reward, hook=hook, prompts=prompts, **settings).train()
    assert not any(torch.equal(one, other) for one, other in [images[:2], images[1:], images[::2]])
    assert caplog.text.count("seeds Python's or NumPy's") == 1
