from __future__ import annotations

import pytest
import torch

from ddpo_fast.measured import Measured


def test_threads_are_kept(monkeypatch):
    """A resumed run has as many threads as OMP_NUM_THREADS says, else as many as the run began with."""
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
    assert measured.measure_once("kind", lambda: pytest.fail("measured again")) == "sdpa"
    assert [measured.measure_once("rows", lambda value=value: value) for value in (4, 8)] == [4, 4]
