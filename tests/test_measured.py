from __future__ import annotations

import pytest
import torch

from ddpo_fast.measured import Measured


def test_threads_are_kept(monkeypatch):
    """A run has as many threads as OMP_NUM_THREADS says, else as many as it began with, else as many as it chooses."""
    now = torch.get_num_threads()
    kept = Measured(threads=now + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", str(now))
    kept.keep_threads(lambda: pytest.fail("chosen again"))
    assert torch.get_num_threads() == now
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        kept.keep_threads(lambda: pytest.fail("chosen again"))
        assert torch.get_num_threads() == now + 1
        new = Measured()
        new.keep_threads(lambda: now + 2)
        assert new == {"threads": now + 2}
        assert torch.get_num_threads() == now + 2
    finally:
        torch.set_num_threads(now)


def test_a_value_is_measured_once():
    measured = Measured(kind="sdpa")
    assert measured.measure_once("kind", lambda: pytest.fail("measured again")) == "sdpa"
    assert [measured.measure_once("rows", lambda value=value: value) for value in (4, 8)] == [4, 4]
