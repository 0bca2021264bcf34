from __future__ import annotations

import numpy as np
import pytest

from ddpo_fast.advantages import PerPromptStatTracker, batch_advantages


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
