"""How varied rewards and images are, and the warning when that is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_runs import metrics_of

from ddpo_fast import DDPOConfig
from ddpo_fast.health import Health
from ddpo_fast.run_folder.checkpoint import read_state
from ddpo_fast.variety import image_spread, reward_spread


def test_reward_spread():
    rewards = np.array([1.0, 5.0, 3.0, 7.0, 9.0])
    # 'a' has 1 and 3, 'b' has 5 and 9: standard deviations 1 and 2; 'c' has one
    assert reward_spread(["a", "b", "a", "c", "b"], rewards) == pytest.approx(1.5)
    assert reward_spread(list("abcde"), rewards) == pytest.approx(rewards.std())


def by_pairs(images: torch.Tensor, prompts: list[str] | None) -> float:
    found = []
    for i in range(len(images)):
        for j in range(i):
            if prompts is None or prompts[i] == prompts[j]:
                found.append(float((images[i] - images[j]).double().square().mean().sqrt()))
    return sum(found) / len(found)


def test_image_spread():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b", "a", "a", "c"]
    parts = list(images.split([2, 3]))
    assert float(image_spread(prompts, parts)) == pytest.approx(by_pairs(images, prompts), rel=1e-5)
    assert float(image_spread(list("abcde"), parts)) == pytest.approx(by_pairs(images, None), rel=1e-5)


def test_images_are_compared_at_a_small_size():
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    small = images.reshape(3, 3, 32, 2, 32, 3).mean((3, 5))
    assert float(image_spread(["a"] * 3, [images])) == pytest.approx(by_pairs(small, None), rel=1e-5)


def test_nearly_equal_images_have_a_small_spread():
    images = torch.full((4, 3, 32, 32), 0.5)
    assert float(image_spread(["a"] * 4, [images])) == 0
    images[0] += 1e-5
    # half of the pairs differ, by 1e-5
    assert float(image_spread(["a"] * 4, [images])) == pytest.approx(5e-6, rel=0.01)


def test_what_has_no_image_spread():
    assert image_spread(["a"], [torch.rand(1, 3, 8, 8)]) is None
    assert image_spread(["a", "a"], [["an image", "another"]]) is None


def test_lost_variety_is_warned_of_once(caplog):
    health = Health(DDPOConfig())
    for epoch, spread in enumerate([2.0, 4.0, 1.1]):
        health.variety(epoch, {"reward_spread": spread, "image_spread": 0.1})
    assert not caplog.records
    assert health.good
    for epoch in (3, 4):
        health.variety(epoch, {"reward_spread": 0.9, "image_spread": 0.1})
    assert len(caplog.records) == 1
    assert "rewards of a prompt differ by 0.9 in epoch 4" in caplog.text
    assert "a smaller train_learning_rate, or with train_kl_weight" in caplog.text
    assert not health.good
    health.variety(5, {"reward_spread": 0.9, "image_spread": 0.01})
    assert "images of a prompt differ by 0.01 in epoch 6" in caplog.text


def test_the_remedy_is_the_setting_that_is_on(caplog):
    health = Health(DDPOConfig(train_target_update=0.1))
    for epoch, spread in enumerate([1.0, 1.0, 0.1]):
        health.variety(epoch, {"image_spread": spread})
    assert "with a smaller train_target_update, or" in caplog.text


def test_variety_is_logged_and_its_baseline_resumed(make_trainer, tmp_path):
    first = make_trainer(num_epochs=2, sample_num_steps=2)
    first.train()
    records = metrics_of(first, "epoch")
    spreads = {name: [record[name] for record in records] for name in ("reward_spread", "image_spread")}
    assert all(value > 0 for values in spreads.values() for value in values)
    assert read_state(tmp_path / "run" / "checkpoints" / "checkpoint_2")["first_spreads"] == spreads
    second = make_trainer(num_epochs=3, sample_num_steps=2, resume_from=str(tmp_path / "run"))
    assert second.run_log.health.first_spreads == spreads
    second.train()
    assert second.run_log.health.first_spreads == spreads
