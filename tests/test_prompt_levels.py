"""Levels of epochs are a mixed model's best linear unbiased estimates, and plain means where prompts say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from ddpo_fast.prompt_levels import REMEMBERED_EPOCHS, PromptLevels

# three epochs of unequal mixtures, with a prompt that occurs once
DRAWN = [["a"] * 5 + ["b"] * 3, ["a"] * 2 + ["b"] * 4 + ["c"] * 2, ["c"] * 6 + ["d"]]
EFFECTS = {"a": 0.0, "b": 3.0, "c": -2.0, "d": 1.0}


def rewards_of(drawn, levels, noise=0.3):
    draw = np.random.default_rng(0).normal
    return [
        np.array([level + EFFECTS[prompt] + noise * draw() for prompt in prompts])
        for prompts, level in zip(drawn, levels, strict=True)
    ]


def fitted(drawn, rewards):
    levels = PromptLevels()
    numbers = [levels.add(prompts, values, keep=()) for prompts, values in zip(drawn, rewards, strict=True)]
    assert numbers == list(range(len(drawn)))
    return levels.fit()


def test_levels_are_generalised_least_squares():
    """b = (X' V^-1 X)^-1 X' V^-1 y with V = sigma^2 I + tau^2 Z Z', from the images themselves."""
    rewards = rewards_of(DRAWN, [0.0, 1.0, 0.5])
    y = np.concatenate(rewards)
    epoch = np.repeat(range(3), [len(prompts) for prompts in DRAWN])
    prompt = np.array(["abcd".index(name) for prompts in DRAWN for name in prompts])
    x, z = np.eye(3)[epoch], np.eye(4)[prompt]
    cells = np.eye(12)[4 * epoch + prompt][:, np.unique(4 * epoch + prompt)]

    def variance(design):
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return residual @ residual / (len(y) - design.shape[1])

    sigma2, tau2 = variance(cells), variance(x) - variance(cells)
    inverse = np.linalg.inv(sigma2 * np.eye(len(y)) + tau2 * z @ z.T)
    covariance = np.linalg.inv(x.T @ inverse @ x)
    expected = covariance @ x.T @ inverse @ y

    fit = fitted(DRAWN, rewards)
    assert [fit.level([i]) for i in range(3)] == pytest.approx(expected)
    assert fit.level([0, 2]) == pytest.approx((expected[0] + expected[2]) / 2)
    # of the plain means, as if all images were drawn anew
    plain = variance(x) / np.array([len(prompts) for prompts in DRAWN])
    assert fit.error([0, 1], [2]) == pytest.approx(np.sqrt((plain[0] + plain[1]) / 4 + plain[2]))
    # the plain means say 1.3, 0.7 and -1.8: nothing but the mixtures
    assert expected - expected[0] == pytest.approx([0.0, 1.0, 0.5], abs=0.5)


@pytest.mark.parametrize(
    "drawn", [[["a"] * 4, ["a"] * 6], [["a", "b", "c", "d"], ["e", "f", "g", "h"]]], ids=["one prompt", "all different"]
)
def test_plain_means_where_prompts_tell_nothing(drawn):
    rewards = [np.arange(len(prompts)) + 5.0 * i for i, prompts in enumerate(drawn)]
    fit = fitted(drawn, rewards)
    assert [fit.level([i]) for i in range(2)] == pytest.approx([values.mean() for values in rewards])
    freedom = sum(map(len, rewards)) - 2
    pooled = sum(((values - values.mean()) ** 2).sum() for values in rewards) / freedom
    assert fit.error([0], [1]) == pytest.approx(np.sqrt(pooled * sum(1 / len(values) for values in rewards)))


def test_equal_rewards_have_no_error():
    fit = fitted(DRAWN, [np.full(len(prompts), 2.0) for prompts in DRAWN])
    assert fit.level([0, 1]) == 2.0
    assert fit.error([0, 1], [1, 2]) == 0.0


def test_old_epochs_are_forgotten_but_for_those_to_keep():
    levels = PromptLevels()
    for i in range(REMEMBERED_EPOCHS + 5):
        levels.add(["a", "a"], np.array([i, i + 1.0]), keep=[2, 3])
    again = PromptLevels()
    again.load_state_dict(levels.state_dict())
    for one in (levels, again):
        fit = one.fit()
        assert fit.level([2, 3]) == 3.0
        assert fit.level([5]) == 5.5
        with pytest.raises(KeyError):
            fit.level([4])
