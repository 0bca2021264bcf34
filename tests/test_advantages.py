from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpo_fast.advantages import (
    PerPromptStatTracker,
    batch_advantages,
    compared_sets,
    distances,
    group_advantages,
    step_advantages,
    strongest,
)


def test_batch_advantages():
    rewards = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    expected = (rewards - 2.5) / np.sqrt(1.25)
    np.testing.assert_allclose(batch_advantages(rewards), expected, rtol=1e-6)
    assert (batch_advantages(np.ones(4, dtype=np.float32)) == 0).all()


def test_the_tracker_gives_trls_advantages():
    from trl.trainer.utils import PerPromptStatTracker as Theirs

    ours, theirs = PerPromptStatTracker(5, 3), Theirs(5, 3)
    generator = np.random.default_rng(0)
    for _ in range(6):
        prompts = generator.choice(["a", "b", "c"], 8).tolist()
        rewards = generator.normal(size=8).astype(np.float32)
        np.testing.assert_allclose(ours.update(prompts, rewards), theirs.update(prompts, rewards), rtol=1e-5, atol=1e-6)
    for prompt, stats in theirs.get_stats().items():
        assert ours.get_stats()[prompt] == pytest.approx(stats, rel=1e-5)


def test_whole_number_rewards_give_fractional_advantages():
    """TRL computes in the dtype of the rewards, and so rounds the advantages of [1, 2, 3, 4] to [-1, 0, 0, 1]."""
    advantages = PerPromptStatTracker(8, 8).update(["a"] * 4, np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(advantages, [-1.3416, -0.4472, 0.4472, 1.3416], rtol=1e-3)


def test_the_trackers_state_is_saved_and_loaded():
    tracker, other = PerPromptStatTracker(3, 2), PerPromptStatTracker(3, 2)
    rewards = np.array([0.1, 0.2, 0.7, 0.5], dtype=np.float32)
    tracker.update(["a", "a", "b", "a"], rewards)
    other.load_state_dict(tracker.state_dict())
    a, b = tracker.update(["a", "b"], rewards[:2]), other.update(["a", "b"], rewards[:2])
    np.testing.assert_array_equal(a, b)


KINDS = ["std", "robust", "rank"]
rewards_of = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12)


def test_robust_advantages():
    rewards = np.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    # the median is 3, and the median of |r - 3| = [2, 1, 0, 1, 997] is 1
    np.testing.assert_allclose(batch_advantages(rewards, "robust"), (rewards - 3) / 1.4826, rtol=1e-7)
    # more than half are equal: the median absolute deviation is 0, and the std takes its place
    rewards = np.array([5.0, 5.0, 5.0, 9.0])
    np.testing.assert_allclose(batch_advantages(rewards, "robust"), (rewards - 5) / rewards.std(), rtol=1e-7)


def test_rank_advantages():
    normal = NormalDist()
    rewards = np.array([7.0, -1.0, 7.0, 3.0])
    # ranks 3.5, 1, 3.5, 2
    expected = [normal.inv_cdf((rank - 0.5) / 4) for rank in (3.5, 1, 3.5, 2)]
    np.testing.assert_allclose(batch_advantages(rewards, "rank"), expected, rtol=0, atol=1e-12)


def test_a_reward_beyond_the_remembered_ones_has_a_finite_rank():
    assert distances(np.array([-9.0, 9.0]), np.array([0.0, 1.0]), "rank") == pytest.approx([-0.6745, 0.6745], abs=1e-4)
    tracker = PerPromptStatTracker(buffer_size=2, min_count=1, kind="rank")
    assert np.isfinite(tracker.update(["a"] * 4, [9.0, -9.0, 0.0, 1.0])).all()


@given(rewards_of, st.sampled_from(KINDS))
def test_advantages_are_finite(values, kind):
    rewards = np.array(values, dtype=np.float32)
    assert np.isfinite(batch_advantages(rewards, kind)).all()
    assert np.isfinite(group_advantages(rewards, len(rewards), kind)).all()


@given(rewards_of)
def test_ranks_depend_on_the_order_alone(values):
    rewards = np.array(values)
    ranked = batch_advantages(rewards, "rank")
    # exact in fp64, and so as monotone as the real numbers: a power of two times
    np.testing.assert_array_equal(ranked, batch_advantages(rewards * 1024, "rank"))
    order = np.unique(rewards, return_inverse=True)[1]
    np.testing.assert_array_equal(ranked, batch_advantages(np.exp2(order), "rank"))
    np.testing.assert_allclose(ranked, -batch_advantages(-rewards, "rank"), rtol=0, atol=1e-12)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9), st.sampled_from(KINDS))
def test_equal_rewards_have_advantages_of_exactly_zero(value, count, kind):
    rewards = np.full(count, value, dtype=np.float32)
    assert (group_advantages(np.tile(rewards, 2), count, kind) == 0).all()
    if kind != "std":
        assert (batch_advantages(rewards, kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_compared_within_themselves(kind):
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=12).astype(np.float32)
    found = group_advantages(rewards, 4, kind)
    for start in (0, 4, 8):
        np.testing.assert_array_equal(found[start : start + 4], batch_advantages(rewards[start : start + 4], kind))
    if kind == "std":
        first = rewards[:4].astype(np.float64)
        np.testing.assert_allclose(found[:4], (first - first.mean()) / (first.std() + 1e-8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_rewards_are_compared_with_its_last_ones(kind):
    tracker = PerPromptStatTracker(buffer_size=6, min_count=4, kind=kind)
    first, second = np.array([1.0, 5.0, 2.0, 8.0], np.float32), np.array([3.0, 4.0, 6.0, 0.5], np.float32)
    tracker.update(["a"] * 4, first)
    remembered = np.concatenate([first, second])[-6:]
    np.testing.assert_array_equal(tracker.update(["a"] * 4, second), distances(second, remembered, kind, 1e-6))


def test_steps_are_standardised_over_the_trained_steps_of_images_that_are_compared():
    generator = np.random.default_rng(0)
    advantages, credit = generator.normal(size=6).astype(np.float32), generator.uniform(size=(6, 5))
    advantages[4:] = 0
    sets = compared_sets(["a", "b", "a", "b", "a", "b"], group_size=2, min_count=None)
    found = step_advantages(advantages, credit, sets, steps=3)
    product = advantages[:, None].astype(np.float64) * credit
    for rows in (slice(0, 2), slice(2, 4)):
        trained = product[rows, :3]
        np.testing.assert_allclose(found[rows], (product[rows] - trained.mean()) / trained.std(), rtol=1e-5, atol=1e-6)
        assert found[rows, :3].mean() == pytest.approx(0, abs=1e-6)
    assert (found[4:] == 0).all(), "a group without spread"


def test_the_strongest_pairs_of_the_trained_steps_keep_their_advantages():
    advantages = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    given = advantages.copy()
    found = strongest(advantages, 0.25, range(1, 5))
    trained, kept = advantages[:, 1:5], found[:, 1:5] != 0
    assert kept.sum() == 40
    assert np.abs(trained[kept]).min() > np.abs(trained[~kept]).max()
    np.testing.assert_array_equal(found[:, 1:5][kept], trained[kept])
    np.testing.assert_array_equal(found[:, [0, 5]], advantages[:, [0, 5]])
    np.testing.assert_array_equal(advantages, given)
    assert strongest(advantages, 1.0, range(6)) is advantages


def test_the_strongest_images():
    found = strongest(np.array([0.5, -3.0, 0.0, 1.0, -1.0], dtype=np.float32), 0.2, range(1))
    assert found.tolist() == [0, -3, 0, 0, 0]
    # equal ones stay together, and one image always stays
    assert strongest(np.array([1.0, -1.0, 0.5]), 0.3, range(1)).tolist() == [1, -1, 0]
    assert strongest(np.array([0.5, 2.0]), 0.01, range(1)).tolist() == [0, 2]
    assert strongest(np.zeros(4), 0.5, range(1)).tolist() == [0] * 4


def test_half_of_normal_advantages_have_93_percent_of_their_squares():
    """With c the median of |A|, the integral of x^2 over |x| > c is 2 (c phi(c) + 1 - Phi(c)) = 0.9287."""
    normal = NormalDist()
    c = normal.inv_cdf(0.75)
    expected = 2 * (c * normal.pdf(c) + 1 - normal.cdf(c))
    assert expected == pytest.approx(0.9287, abs=5e-5)
    advantages = np.array([normal.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    kept = strongest(advantages, 0.5, range(1))
    assert np.square(kept).sum() / np.square(advantages).sum() == pytest.approx(expected, abs=1e-3)


def test_what_is_compared():
    prompts = ["a", "b", "a", "c", "a", "b"]
    (everything,) = compared_sets(prompts, 1, None)
    assert everything.all()
    assert [np.flatnonzero(mine).tolist() for mine in compared_sets(prompts, 3, None)] == [[0, 1, 2], [3, 4, 5]]
    assert [np.flatnonzero(mine).tolist() for mine in compared_sets(prompts, 1, 3)] == [[0, 2, 4], [1, 3, 5]]
    assert [np.flatnonzero(mine).tolist() for mine in compared_sets(prompts, 1, 1)] == [[0, 2, 4], [1, 5], [3]]
