"""bench/host_time.py runs, and leaves the ops as they were."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import host_time

from ddpo_fast.ops import backend


def test_it_times_every_op_in_three_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host_time, "CALLS", 2)
    call = backend.Op.__call__
    host_time.main(["--rounds", "2", "--output", str(tmp_path / "records")])
    assert backend.Op.__call__ is call
    rows = host_time.records.read([tmp_path / "records"])
    assert {row["way"] for row in rows} == {"registered", "called", "plain"}
    assert len(rows) == 3 * 2 * len(host_time.cases())
    assert all(len(row["rounds"]) == 2 for row in rows)
    assert "lora_linear" in capsys.readouterr().out
