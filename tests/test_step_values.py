"""Values of denoising steps: their features, the regression with a set left out, and the advantages that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpo_fast.ddim import DDIMCoefficients, predictions
from ddpo_fast.flow_matching import flow_predictions, flow_table
from ddpo_fast.run_folder.plain_data import pack, unpack
from ddpo_fast.step_table import FLOW_SAMPLERS
from ddpo_fast.step_values import (
    REMEMBERED,
    RIDGES,
    ComparedSet,
    StepValues,
    _predicted_when_left_out,
    _terms,
    predicted_features,
)

GROUP = 4


def groups(count: int) -> list[np.ndarray]:
    numbers = np.arange(count * GROUP)
    return [numbers // GROUP == group for group in range(count)]


def walk(count: int, steps: int = 6, seed: int = 0) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """(features [B, T, 2], rewards [B], what each step's noise did to the reward [B, T]) of a walk in two dimensions.

    The reward is the sum of both coordinates at the end; the features before a step are where the walk is.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count * GROUP, steps, 2, generator=generator)
    before = torch.cat([torch.zeros_like(noise[:, :1]), noise.cumsum(1)[:, :-1]], dim=1)
    return before, noise.sum((1, 2)).numpy(), noise.sum(2)


def advantages(values: StepValues, features, rewards, sets, trained=None, prompts=None) -> np.ndarray:
    prompts = prompts or ["a lion"] * len(rewards)
    return values.advantages(features, rewards, prompts, sets, trained or range(features.shape[1]))


# features


def test_features_are_means_differences_and_variances_at_several_scales():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = predicted_features(x)
    assert found.dtype == torch.float32
    for image, row in zip(x.numpy(), found.double().numpy(), strict=True):
        expected = [image.mean((1, 2)), image.reshape(3, 4, 4, 4, 4).mean((2, 4)).ravel()]
        across, down = np.diff(image, axis=2), np.diff(image, axis=1)
        expected += [np.abs(across).mean((1, 2)), np.abs(down).mean((1, 2))]
        expected.append(np.log((across**2).mean((1, 2)) + (down**2).mean((1, 2)) + 1e-6))
        for side in (1, 2, 4, 8):
            means = image.reshape(3, 16 // side, side, 16 // side, side).mean((2, 4))
            expected.append(np.log(means.var((1, 2)) + 1e-6))
        # means and variances of at most 256 numbers of about 1, in fp32
        np.testing.assert_allclose(row, np.concatenate(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 2, 3), (4, 8, 8), (4, 13, 21), (16, 64, 96)])
def test_features_of_any_size_are_finite(shape):
    x = torch.randn(3, *shape)
    found = predicted_features(torch.stack([*x, torch.zeros(shape), torch.full(shape, 1e3)]))
    assert len(found) == 5
    assert found.isfinite().all()
    # those of an image do not depend on the others of its batch
    torch.testing.assert_close(found[:1], predicted_features(x[:1]))


# the regression


def refitted(features: torch.Tensor, rewards: torch.Tensor, shared: torch.Tensor, sizes: list[int], ridge: float):
    """Predictions of each set by a regression on the others, one after the other."""
    scaled = features / (features.square().mean(0).sqrt() + 1e-6)
    kernel = scaled @ scaled.T / features.shape[1] * shared
    ridge = ridge * kernel.diagonal().mean() + 1e-12
    found, start = [], 0
    for size in sizes:
        left_out = torch.zeros(len(rewards), dtype=torch.bool)
        left_out[start : start + size] = True
        start += size
        others = kernel[~left_out][:, ~left_out]
        weights = torch.linalg.solve(others + ridge * torch.eye(len(others), dtype=torch.float64), rewards[~left_out])
        found.append(kernel[left_out][:, ~left_out] @ weights)
    return torch.cat(found)


@pytest.mark.parametrize(("noise", "scale"), [(0.1, 1.0), (3.0, 1e3), (3.0, 0.0)])
def test_a_set_is_predicted_by_the_others_alone(noise, scale):
    generator = torch.Generator().manual_seed(1)
    features = scale * torch.randn(24, 5, generator=generator, dtype=torch.float64)
    rewards = features.sum(1) + noise * torch.randn(24, generator=generator, dtype=torch.float64)
    names = np.array(list("aabbbaccaabbbaccaabbbacc"))
    shared = torch.from_numpy(1.0 + (names[:, None] == names[None]))
    sizes = [2, 3, 1, 2, 8, 8]
    each = [refitted(features, rewards, shared, sizes, ridge) for ridge in RIDGES]
    errors = [float((rewards - one).square().mean()) for one in each]
    total = float(rewards.square().mean())
    found, share = _predicted_when_left_out(features, rewards, shared, sizes)
    if min(errors) < total:
        torch.testing.assert_close(found, each[int(np.argmin(errors))], rtol=1e-8, atol=1e-8 * (1 + noise))
        assert float(share) == pytest.approx(1 - min(errors) / total)
    else:
        assert not found.any()
        assert float(share) == 0
    assert (min(errors) < total) == (scale > 0)


def test_prompts_that_want_the_opposite_are_told_apart():
    """What prompts share is nothing here, so only the kernel's part within a prompt can foretell."""
    features, rewards, _ = walk(16)
    prompts = ["left"] * 32 + ["right"] * 32
    rewards[32:] *= -1
    values = StepValues()
    advantages(values, features, rewards, groups(16), prompts=prompts)
    alike = StepValues()
    advantages(alike, features, rewards, groups(16))
    # the reward of a walk of 6 steps is known to (0 + 1 + ... + 5) / 36 = 0.42 of its variance, the mean over the steps
    assert values.explained > 0.3 > 0.1 > alike.explained


# advantages


def test_the_terms_of_an_image_add_up_to_what_the_first_value_did_not_know():
    features, rewards, _ = walk(8)
    sets = [ComparedSet(features[mine], torch.from_numpy(rewards[mine]), ["a lion"] * GROUP) for mine in groups(8)]
    terms, explained = _terms(sets)
    centred = rewards - rewards.reshape(-1, GROUP).mean(1).repeat(GROUP)
    # before the first step all images are in one place: nothing is foretold
    assert float(explained[0]) == 0
    torch.testing.assert_close(terms.sum(1), torch.from_numpy(centred).double(), rtol=1e-5, atol=1e-5)


def test_a_step_has_the_advantage_of_its_own_noise():
    features, rewards, own = walk(32)
    found = advantages(StepValues(), features, rewards, groups(32))
    own = (own.reshape(32, GROUP, -1) - own.reshape(32, GROUP, -1).mean(1, keepdim=True)).reshape(128, -1).numpy()
    for step in range(own.shape[1] - 1):
        # an image's whole advantage has 1 / sqrt(6) = 0.41 with one of its six steps
        assert np.corrcoef(found[:, step], own[:, step])[0, 1] > 0.9


def test_without_anything_to_learn_from_advantages_are_those_of_images():
    _, rewards, _ = walk(8)
    found = advantages(StepValues(), torch.ones(32, 6, 3), rewards, groups(8))
    centred = rewards - rewards.reshape(-1, GROUP).mean(1).repeat(GROUP)
    expected = np.repeat((centred / np.sqrt((centred**2).mean()))[:, None], 6, axis=1)
    # rewards in fp32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_one_set_has_no_others_to_learn_from():
    features, rewards, _ = walk(1)
    values = StepValues()
    found = advantages(values, features, rewards, groups(1))
    assert values.explained == 0
    assert np.ptp(found, axis=1) == pytest.approx(0, abs=1e-6)


def test_the_size_of_advantages_is_that_of_trained_steps():
    features, rewards, _ = walk(8)
    found = advantages(StepValues(), features, rewards, groups(8), trained=range(1, 4))
    assert np.square(found[:, 1:4]).mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_advantages_do_not_depend_on_the_rewards_unit(scale):
    features, rewards, _ = walk(8)
    one, other = (advantages(StepValues(), features, given, groups(8)) for given in (rewards, rewards * scale))
    np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3)


def test_a_set_of_equal_rewards_has_no_advantages():
    features, rewards, _ = walk(8)
    rewards[:GROUP] = 3.1
    found = advantages(StepValues(), features, rewards, groups(8))
    assert not found[:GROUP].any()
    assert found[GROUP:].all()
    rewards[:] = 3.1
    assert not advantages(StepValues(), features, rewards, groups(8)).any()


# what is remembered


def test_values_are_learned_from_earlier_images_too():
    values, found = StepValues(), []
    for seed in range(6):
        advantages(values, *walk(1, seed=seed)[:2], groups(1))
        found.append(values.explained)
    # a set has no others in the first epoch; 0.42 is what can be known
    assert found[0] == 0
    assert found[-1] > 0.2


def test_what_is_remembered_is_bounded_and_the_latest():
    values = StepValues()
    for seed in range(5):
        features, rewards, _ = walk(20, seed=seed)
        advantages(values, features, rewards, groups(20))
    kept = values._by_size.now
    assert sum(len(one.prompts) for one in kept) == REMEMBERED
    torch.testing.assert_close(kept[-1].rewards, torch.from_numpy(rewards[-GROUP:]))


def test_a_checkpoint_gives_the_same_bits():
    values, again = StepValues(), StepValues()
    advantages(values, *walk(8)[:2], groups(8))
    again.load_state_dict(unpack(pack(values.state_dict(), "step_values")))
    features, rewards, _ = walk(8, seed=1)
    one, other = (advantages(each, features, rewards, groups(8)) for each in (values, again))
    assert np.array_equal(one, other)


def test_images_of_another_size_are_not_learned_from():
    values = StepValues()
    values.use_size("64x64")
    advantages(values, *walk(8)[:2], groups(8))
    values.use_size("64x96")
    features, rewards, _ = walk(8, seed=1)
    wider = torch.cat([features, features], dim=2)
    found = advantages(values, wider, rewards, groups(8))
    assert np.array_equal(found, advantages(StepValues(), wider, rewards, groups(8)))


# what steps predict


@pytest.mark.parametrize("level", [0.0, 0.4])
@pytest.mark.parametrize("sampler", list(FLOW_SAMPLERS))
def test_what_steps_of_flow_matching_predict(sampler, level):
    levels = torch.linspace(1, 0, 8, dtype=torch.float64) ** 0.7
    generator = torch.Generator().manual_seed(0)
    for s, row, prediction in zip(
        levels[:-1], flow_table(levels, sampler, level).double(), flow_predictions(levels, sampler, level), strict=True
    ):
        latents, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
        following = row[0] * latents + row[1] * output + row[2] * noise
        # the table is in fp32
        found = prediction.of(latents, following, noise)
        torch.testing.assert_close(found, latents - s * output, rtol=1e-5, atol=1e-5)


def test_steps_outside_a_window_predict_too(make_trainer):
    trainer = make_trainer(train_image_credit="value", sde_window=[1, 2])
    trainer.policy.set_steps()
    family = trainer.policy.family
    scheduler = family.pipe.scheduler
    noisy, silent = predictions(scheduler, 1.0), predictions(scheduler, 0.0)
    assert family.predictions(1.0) == [silent[0], *noisy[1:3], *silent[3:]]
    assert all(p.sigma == 0 for p in silent)
    assert all(p.sigma > 0 for p in noisy)
    # the steps themselves are those of the table
    table = family.table(1.0, torch.device("cpu"))[scheduler.timesteps]
    torch.testing.assert_close(torch.tensor([p.sigma for p in family.predictions(1.0)]), table[:, 2])
    assert torch.equal(table[1:3], DDIMCoefficients.of(scheduler, 1.0, "cpu").table[scheduler.timesteps][1:3])


def test_predictions_are_found_once(make_trainer):
    """They are read from the scheduler on the host, which must not wait for the device in each rollout."""
    trainer = make_trainer(train_image_credit="value")
    asked, predictions_of = [], trainer.policy.family.predictions
    trainer.policy.family.predictions = lambda level: asked.append(level) or predictions_of(level)
    for _ in range(3):
        trainer._generate_samples(2, 4)
    assert asked == [1.0]


# runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_group_size": 2, "train_skip_last_steps": 0.2},
        {"sample_group_size": 4, "sde_window": [1, 3]},
        {"sample_group_size": 4, "sample_redraws": 1, "ema_decay": 0.9, "ema_sampling": True},
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2},
        {"objective": "ddpo_sf", "sample_group_size": 2, "train_gradient_accumulation_steps": 4},
    ],
    ids=["all", "groups", "window", "redraws", "prompts", "ddpo_sf"],
)
def test_a_run_with_values_trains(make_trainer, settings):
    trainer = make_trainer(train_image_credit="value", num_epochs=2, **settings)
    kept = []
    train_on = trainer._train_on
    trainer._train_on = lambda trajectory, *args: kept.append(trajectory) or train_on(trajectory, *args)
    trainer.train()
    trained = trainer.policy.config.trainable_steps
    for trajectory in kept:
        assert trajectory.advantages.shape == (8, 5)
        # a prompt that is drawn once is compared with nothing, so its image has no advantages
        used = trajectory.advantages[(trajectory.advantages != 0).any(1), trained.start : trained.stop]
        assert float(used.square().mean()) == pytest.approx(1, abs=1e-4)
    epochs = [line for line in trainer.run_log.metrics.read() if line["kind"] == "epoch"]
    assert [0 <= line["value_explained"] <= 1 for line in epochs] == [True, True]
