from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from tiny_run import forget_accelerate_state
from torch import nn

from ddpo_fast import batch_sizes
from ddpo_fast.measured import Measured
from ddpo_fast.prompts import load_prompts
from ddpo_fast.run_folder import checkpoint


def test_kept_bytes_are_the_activations():
    """A linear layer keeps its input for its weight, GELU its input; parameters were there before."""
    network = nn.Sequential(nn.Linear(16, 32), nn.GELU())
    there = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = batch_sizes.kept_bytes(lambda: network(torch.zeros(10, 16)), there)
    assert kept == 4 * 10 * (16 + 32)


def test_nothing_of_the_forward_pass_stays():
    """The look at what is kept must not keep it: a tensor that a hook returns as it is holds its own graph."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    made = []

    def forward():
        y = network(torch.zeros(2, 4))
        made.append(weakref.ref(y))
        return y

    batch_sizes.kept_bytes(forward, set())
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize(
    ("free", "rows_per_pair", "expected"), [(0, 2, 1), (999, 2, 4), (10**6, 2, 32), (10**6, 1, 64), (1700, 1, 8)]
)
def test_pairs_that_fit(free, rows_per_pair, expected):
    pairs = batch_sizes.pairs_that_fit(100, free, rows_per_pair)
    assert pairs == expected
    assert pairs == 1 or pairs * 100 <= free


@pytest.mark.parametrize(
    ("batch_size", "rows", "fit", "expected"),
    [(6, 2, 99, 2), (1, 2, 99, 12), (16, 2, 99, 1), (1, 1, 7, 7), (6, 2, 3, 1)],
)
def test_batches_to_merge(batch_size, rows, fit, expected):
    assert batch_sizes.batches_to_merge(batch_size, rows, fit) == expected


def test_a_machines_memory_is_shared_by_its_processes():
    alone, shared = (batch_sizes.free_bytes(torch.device("cpu"), n) for n in (1, 4))
    assert 0 < shared < alone


@pytest.fixture
def weights_after(make_trainer, tmp_path, monkeypatch):
    """`weights_after(name, free, epochs, **settings)`: of a run, with so many bytes of free memory; and its sizes."""

    def train(name, free, epochs, **settings):
        forget_accelerate_state()
        monkeypatch.setattr(batch_sizes, "free_bytes", lambda *_: free)
        prompts = load_prompts("animals")
        trainer = make_trainer(output_dir=str(tmp_path / name), prompts=prompts, **settings)
        trainer.train(epochs)
        weights = [p.detach().clone() for p in trainer.engine.parameters]
        return weights, (trainer.sizes.merged_batches, trainer.sizes.micro_batch_size)

    return train


def test_a_run_that_is_resumed_with_less_memory_ends_with_the_same_bits(weights_after, tmp_path):
    whole, sizes = weights_after("whole", 10**10, 2)
    cut, _ = weights_after("cut", 10**10, 1)
    after, kept = weights_after("cut", 10**6, 2, resume_from=str(tmp_path / "cut"), num_epochs=7)
    assert kept == sizes == (3, 20)
    assert all(map(torch.equal, whole, after))
    assert not any(map(torch.equal, cut, after))
    settings = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert settings["measured"] == {"merged_batches": 3, "micro_batch_size": 20}


@pytest.mark.parametrize(
    ("settings", "device"), [({"gradient_checkpointing": "blocks"}, None), ({}, "another device")], ids=str
)
def test_what_was_measured_elsewhere_is_measured_again(weights_after, tmp_path, monkeypatch, settings, device):
    weights_after("cut", 10**10, 1)
    if device:
        monkeypatch.setattr("ddpo_fast.run_folder.resume_checks.device_name", lambda _: device)
    _, sizes = weights_after("cut", 10**6, 2, resume_from=str(tmp_path / "cut"), **settings)
    assert sizes == (1, 1)


def test_a_micro_batch_that_ran_out_of_memory_stays_small(weights_after, make_trainer, tmp_path):
    weights_after("cut", 10**10, 1)
    forget_accelerate_state()
    trainer = make_trainer(output_dir=str(tmp_path / "cut"), resume_from=str(tmp_path / "cut"))
    assert trainer.sizes.halve()
    trainer.train(2)
    assert checkpoint.read_state(checkpoint.find(tmp_path / "cut"))["measured"]["micro_batch_size"] == 10


def test_threads_are_kept(monkeypatch):
    """As many as the environment says, else those that the run began with."""
    now = torch.get_num_threads()
    kept = Measured(threads=now + 1)
    kept.keep_threads()
    assert torch.get_num_threads() == now
    monkeypatch.delenv("OMP_NUM_THREADS")
    kept.keep_threads()
    assert torch.get_num_threads() == now + 1
    torch.set_num_threads(now)
    new = Measured()
    new.keep_threads()
    assert new == {"threads": now}


def test_a_value_is_measured_once():
    measured = Measured(kind="sdpa")
    assert measured.once("kind", lambda: pytest.fail("it is known")) == "sdpa"
    assert [measured.once("rows", lambda value=value: value) for value in (4, 8)] == [4, 4]
