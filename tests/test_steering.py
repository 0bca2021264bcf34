"""A run ends when it is asked to, or no longer improves; its best checkpoint stays, and can be what it exports."""

from __future__ import annotations

import pytest
import torch
from compare_runs import same_bits, trained_weights

from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.epoch_scores import EpochScores

SETTINGS = {
    "sample_num_steps": 2,
    "sample_batch_size": 2,
    "train_batch_size": 2,
    "sample_num_batches_per_epoch": 1,
    "train_gradient_accumulation_steps": 1,
    "keep_best_checkpoint": True,
}


class Script:
    """A reward whose mean in each epoch is given."""

    def __init__(self, means, folder=None, stops_at=None):
        self.means, self.folder, self.stops_at, self.calls = means, folder, stops_at, 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls == self.stops_at:
            (self.folder / "stop").touch()
        return self.means[self.calls - 1] + 0.1 * torch.linspace(-1, 1, len(images)), {}


def kept(trainer):
    return [checkpoint.epochs_of(path) for path in checkpoint.list_in(trainer.progress.checkpoints)]


def test_scores_are_those_of_the_weights_and_the_earliest_best_wins():
    scores = EpochScores(held_out=True)
    assert (scores.best(), scores.epochs_without_gain()) == (None, 0)
    for epochs, score in ((0, 1.0), (10, 3.0), (20, 3.0), (30, 2.0)):
        scores.add(epochs, score)
    assert (scores.best(), scores.best([0, 30, 40]), scores.best([40]), scores.epochs_without_gain()) == (
        10,
        30,
        None,
        20,
    )
    again = EpochScores(held_out=True)
    again.load_state_dict(scores.state_dict())
    assert (again.best(), again.score(30)) == (10, 2.0)


def test_the_best_checkpoint_stays_and_can_be_exported(make_trainer):
    """The reward of epoch 1, the second, is that of the weights after one epoch, which checkpoint_1 has."""
    trainer = make_trainer(
        reward=Script([0.0, 3.0, 2.0, 2.5]), num_epochs=4, num_checkpoint_limit=1, keep_checkpoint_every=3, **SETTINGS
    )
    best, step = {}, trainer.step

    def stepped(epoch, global_step):
        if epoch == 1:
            best.update({name: value.clone() for name, value in trained_weights(trainer).items()})
        return step(epoch, global_step)

    trainer.step = stepped
    trainer.train()
    assert kept(trainer) == [1, 3, 4]
    assert not same_bits(trained_weights(trainer), best)
    trainer.save_model()
    assert "| epochs trained | 4 |" in (trainer.output_dir / "final" / "README.md").read_text()
    assert trainer.load_best_checkpoint() == 1
    assert same_bits(trained_weights(trainer), best)
    trainer.save_model()
    card = (trainer.output_dir / "final" / "README.md").read_text()
    assert "| epochs trained | 1 (the best training reward, 3) |" in card


def test_evaluations_decide_where_there_are_any(make_trainer, tmp_path):
    trainer = make_trainer(
        reward=Script([0.0, 5.0, 0.0, 0.0]),
        eval_reward=Script([1.0, 2.0, 4.0, 3.0, 2.0]),
        eval_freq=1,
        eval_num_images=2,
        num_epochs=4,
        num_checkpoint_limit=1,
        **SETTINGS,
    )
    trainer.train()
    assert trainer.progress.scores.kind == "held-out reward"
    assert (trainer.progress.scores.best(), kept(trainer)) == (2, [2, 4])
    # a run that goes on knows the scores
    again = make_trainer(
        reward=Script([0.0]), eval_reward=Script([1.0]), resume_from=str(tmp_path / "run"), num_epochs=5, **SETTINGS
    )
    assert again.progress.scores.state_dict() == trainer.progress.scores.state_dict()


def test_a_file_ends_the_run_after_the_epoch(make_trainer, tmp_path, capsys):
    reward = Script([0.0] * 4, tmp_path / "run", stops_at=2)
    trainer = make_trainer(reward=reward, num_epochs=4, save_freq=10, **SETTINGS)
    # a file from before the run ends nothing
    (tmp_path / "run" / "stop").touch()
    trainer.train()
    assert (trainer.first_epoch, kept(trainer)) == (2, [2])
    assert not (tmp_path / "run" / "stop").exists()
    said = capsys.readouterr().err
    assert f"stopped after epoch 2 as there was a file {tmp_path / 'run' / 'stop'}" in said
    assert f"go on with --resume_from {tmp_path / 'run'}" in said


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (2, 4), (3, 5)])
def test_a_run_that_no_longer_improves_ends(patience, epochs, make_trainer, capsys):
    """The weights after one epoch are the best, and those after three the first that are two epochs later."""
    trainer = make_trainer(
        reward=Script([0.0, 3.0, 1.0, 2.0, 2.0, 2.0]), num_epochs=6, early_stopping_patience=patience, **SETTINGS
    )
    trainer.train()
    assert trainer.first_epoch == epochs
    if patience:
        assert f"the best training reward was that after epoch 1, {patience} epochs ago" in capsys.readouterr().err
