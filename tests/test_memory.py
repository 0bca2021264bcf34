from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from ddpo_fast import memory


def test_kept_bytes_are_the_activations():
    """A linear layer keeps its input for its weight, GELU its input; parameters were there before."""
    network = nn.Sequential(nn.Linear(16, 32), nn.GELU())
    there = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = memory.kept_bytes(lambda: network(torch.zeros(10, 16)), there)
    assert kept == 4 * 10 * (16 + 32)


def test_nothing_of_the_forward_pass_stays():
    """The look at what is kept must not keep it: a tensor that a hook returns as it is holds its own graph."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    made = []

    def forward():
        y = network(torch.zeros(2, 4))
        made.append(weakref.ref(y))
        return y

    memory.kept_bytes(forward, set())
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize(
    ("free", "rows_per_pair", "expected"), [(0, 2, 1), (999, 2, 4), (10**6, 2, 32), (10**6, 1, 64), (1700, 1, 8)]
)
def test_pairs_that_fit(free, rows_per_pair, expected):
    pairs = memory.pairs_that_fit(100, free, rows_per_pair)
    assert pairs == expected
    assert pairs == 1 or pairs * 100 <= free


@pytest.mark.parametrize(
    ("batch_size", "rows", "fit", "expected"),
    [(6, 2, 99, 2), (1, 2, 99, 12), (16, 2, 99, 1), (1, 1, 7, 7), (6, 2, 3, 1)],
)
def test_batches_to_merge(batch_size, rows, fit, expected):
    assert memory.batches_to_merge(batch_size, rows, fit) == expected


def test_a_machines_memory_is_shared_by_its_processes():
    alone, shared = (memory.free_bytes(torch.device("cpu"), n) for n in (1, 4))
    assert 0 < shared < alone
