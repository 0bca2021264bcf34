"""Values of denoising steps: their features, the regression without an image, and the advantages that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpo_fast.ddim import DDIMCoefficients, predictions
from ddpo_fast.flow_matching import flow_predictions, flow_table
from ddpo_fast.run_folder.plain_data import pack, unpack
from ddpo_fast.step_table import FLOW_SAMPLERS
from ddpo_fast.step_values import (
    OWN,
    REMEMBERED,
    RIDGES,
    ComparedSet,
    StepValues,
    _fitted,
    _parts,
    _terms,
    _values,
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


def refitted(features: torch.Tensor, rewards: torch.Tensor, same: torch.Tensor, sets: torch.Tensor, own, ridge):
    """(targets [M], predicted [M], weights [M, F]) by a regression for each image on the others, one after the other.

    `rewards` are as given: an image's are compared with the mean of the others of its set.
    """
    count, width = features.shape
    shared = 1 + own * same
    kernel = features @ features.T / width * shared
    ridge = ridge * kernel.diagonal().mean() + 1e-12
    found = []
    for image in range(count):
        others = torch.arange(count) != image
        mine = sets == sets[image]
        # the distances from means that this image may know of
        means = {int(k): rewards[(sets == k) & (others | ~mine)].mean() for k in sets.unique()}
        seen = rewards - torch.stack([means[int(k)] for k in sets])
        inner = kernel[others][:, others] + ridge * torch.eye(count - 1, dtype=torch.float64)
        dual = torch.linalg.solve(inner, seen[others])
        weights = (shared[image, others] * dual) @ features[others] / width
        found.append((seen[image], kernel[image, others] @ dual, weights))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


def in_sets(values: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Distances from the mean of each one's set."""
    return values - torch.stack([values[sets == k].mean(0) for k in sets])


@pytest.mark.parametrize(("noise", "scale"), [(0.1, 1.0), (3.0, 1e3), (3.0, 0.0)])
def test_an_image_is_foretold_by_the_others_alone(noise, scale):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([2, 3, 2, 2, 8, 7])
    sets = torch.arange(6).repeat_interleave(sizes)
    features = in_sets(scale * torch.randn(24, 5, generator=generator, dtype=torch.float64), sets)
    rewards = features.sum(1) + noise * torch.randn(24, generator=generator, dtype=torch.float64)
    names = np.array(list("aabbbaccaabbbaccaabbbacc"))
    same = torch.from_numpy(1.0 * (names[:, None] == names[None]))
    targets, weights = _fitted(features, in_sets(rewards, sets), same, sets)
    each = [refitted(features, rewards, same, sets, own, ridge) for own in OWN for ridge in RIDGES]
    torch.testing.assert_close(targets, each[0][0])
    errors = [float((targets - predicted).square().mean()) for _, predicted, _ in each]
    assert (min(errors) < float(targets.square().mean())) == (scale > 0)
    if scale > 0:
        _, predicted, expected = each[int(np.argmin(errors))]
        torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-7 * (1 + noise) / scale)
        torch.testing.assert_close((features * weights).sum(1), predicted, rtol=1e-7, atol=1e-7 * (1 + noise))
    else:
        assert not weights.any()


def test_an_images_own_reward_has_no_part_in_its_model():
    """But for the choice of the ridge and the slope of each step, which all images share."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    rewards = features.sum(1) + torch.randn(16, generator=generator, dtype=torch.float64)
    sets = torch.arange(4).repeat_interleave(4)
    same = torch.ones(16, 16, dtype=torch.float64)
    _, before = _fitted(features, in_sets(rewards, sets), same, sets)
    rewards[5] += 0.01
    _, after = _fitted(features, in_sets(rewards, sets), same, sets)
    torch.testing.assert_close(after[5], before[5], rtol=1e-9, atol=1e-9)
    others = torch.arange(16) != 5
    assert ((after - before)[others].abs().amax(1) > 1e-6).all()


def test_an_early_step_foretells_as_much_as_it_knows():
    """V_t is E[R | the walk before step t]: the slope of a step's values is that of the rewards."""
    features, rewards, _ = walk(64)
    sets = [ComparedSet(features[mine], torch.from_numpy(rewards[mine]), ["a lion"] * GROUP) for mine in groups(64)]
    values = _values([], sets)[1]
    expected = features.double().sum(2)
    expected -= (expected.reshape(64, GROUP, -1).sum(1).repeat_interleave(GROUP, 0) - expected) / (GROUP - 1)
    for step in range(1, 6):
        # 256 images know a slope to about sqrt((6 - step) / (256 step)); a set's mean is of 4
        assert np.polyfit(expected[:, step].numpy(), values[:, step].numpy(), 1)[0] == pytest.approx(0.75, abs=0.25)
        assert np.corrcoef(expected[:, step], values[:, step])[0, 1] > 0.95


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
    targets, values = _values([], sets)
    grouped = rewards.reshape(-1, GROUP)
    others = (grouped.sum(1, keepdims=True) - grouped) / (GROUP - 1)
    torch.testing.assert_close(targets, torch.from_numpy((grouped - others).ravel()).double(), rtol=1e-5, atol=1e-5)
    # before the first step all images are in one place: nothing is foretold
    assert not values[:, 0].any()
    torch.testing.assert_close(_terms(targets, values).sum(1), targets)


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


def test_one_set_of_two_images_has_advantages():
    """Each image has one other to learn from, whose reward is all that is known: no model predicts better than 0."""
    features, rewards, _ = walk(1)
    values = StepValues()
    found = advantages(values, features[:2], rewards[:2], [np.array([True, True])])
    assert np.isfinite(found).all()
    assert found.any()
    assert 0 <= values.explained <= 1


@pytest.mark.parametrize("images", [4, 100, 128, 300])
def test_an_epoch_of_many_images_is_learned_from_in_parts(images):
    features, rewards, _ = walk(images)
    sets = [ComparedSet(features[mine], torch.from_numpy(rewards[mine]), ["a lion"] * GROUP) for mine in groups(images)]
    parts = _parts(sets, 256)
    assert [one for part in parts for one in part] == sets
    assert max(len(part) for part in parts) * GROUP <= 256
    assert max(map(len, parts)) - min(map(len, parts)) <= len(parts)
    found = advantages(StepValues(), features, rewards, groups(images))
    assert found.shape == (images * GROUP, 6)
    assert (np.abs(found).max(1) > 0).all()


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
    values, with_earlier, alone = StepValues(), [], []
    for seed in range(32):
        features, rewards, _ = walk(2, seed=seed)
        # eight images cannot tell which of 42 features matter
        noise = torch.randn(*features.shape[:2], 40, generator=torch.Generator().manual_seed(seed))
        for kept, found in ((values, with_earlier), (StepValues(), alone)):
            advantages(kept, torch.cat([features, noise], dim=2), rewards, groups(2))
            found.append(kept.explained)
    # 0.42 is what can be known
    assert np.mean(with_earlier[12:]) > np.mean(alone[12:]) + 0.15


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
