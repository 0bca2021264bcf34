"""Where scoring beside sampling pays: on a CPU whose operators have several threads, only for a reward that waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_run import brightness

from ddpo_fast import scoring_mixin


class Clocks(SimpleNamespace):
    """Clocks of the wall and of the process, which sampling and the reward turn; the reward waits or computes."""

    def __init__(self, waits: float, computes: float) -> None:
        super().__init__(wall=0.0, process=0.0, waits=waits, computes=computes)

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.process

    def prompt(self) -> tuple[str, dict[str, int]]:
        self.wall += 1.0
        self.process += 1.0
        return "a lion", {}

    def reward(self, images, prompts, metadata):
        self.wall += self.waits + self.computes
        self.process += self.computes
        return brightness(images, prompts, metadata)


# an epoch draws 8 prompts, which take 8 s of sampling, and scores 2 batches
@pytest.mark.parametrize(("waits", "computes", "overlaps"), [(0, 0, False), (0, 9, False), (1, 9, False), (3, 0, True)])
def test_with_two_threads_only_a_reward_that_waits_is_overlapped(make_trainer, monkeypatch, waits, computes, overlaps):
    clocks = Clocks(waits, computes)
    monkeypatch.setattr(scoring_mixin, "time", clocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trainer = make_trainer(prompts=clocks.prompt, reward=clocks.reward)
    assert trainer.config.sample_batch_size * trainer.config.sample_num_batches_per_epoch == 8
    assert not trainer._overlaps_rewards
    trainer.train(1)
    assert trainer._overlaps_rewards == overlaps


def test_with_one_thread_every_reward_is_overlapped(make_trainer):
    assert torch.get_num_threads() == 1
    assert make_trainer()._overlaps_rewards
    assert not make_trainer(reward_overlap=False)._overlaps_rewards
