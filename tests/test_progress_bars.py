"""The bars of an epoch's sampling and scoring."""

from __future__ import annotations

import io

from tqdm import tqdm


def test_a_bar_counts_all_steps_of_an_epochs_sampling_and_one_its_scored_batches(make_trainer, monkeypatch):
    bars = []

    class Shown(tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("ddpo_fast.rollout.tqdm", Shown)
    monkeypatch.setattr("ddpo_fast.scoring_mixin.tqdm", Shown)
    trainer = make_trainer(num_epochs=1, sample_num_batches_per_epoch=3, sample_merge_batches=1, sample_num_steps=2)
    trainer.train()
    # steps of 3 batches with 2 each, and the batches
    assert sorted((bar.desc.strip(": "), bar.n, bar.total) for bar in bars) == [("Sampling", 6, 6), ("Scoring", 3, 3)]
