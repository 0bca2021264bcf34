"""The benchmark of optimizers runs, and records the bytes and times of each contender."""

from __future__ import annotations

import sys

import pytest
from run_process import ROOT, environment, finish, read_records


@pytest.mark.benchmark
def test_a_tiny_run_writes_records_and_a_plot(tmp_path):
    pytest.importorskip("bitsandbytes")
    output, plot = tmp_path / "optimizer.jsonl", tmp_path / "optimizer.png"
    options = ["--size", "tiny", "--threads", "1", "--no-deepspeed", "--output", str(output), "--plot", str(plot)]
    finish([sys.executable, "bench/optimizer.py", *options], env=environment(), cwd=ROOT)
    rows = {row["contender"]: row for row in read_records(output)}
    assert set(rows) == {"ours", "ours, bf16 in and out", "torch", "torch, bf16 in and out", "bitsandbytes"}
    assert rows["ours"]["times_ours"] == 1
    assert all(row["seconds_p50"] > 0 and row["threads"] == 1 and row["commit"] for row in rows.values())
    # 4 bytes of the weight, two codes of one byte, and two fp32 scales for each block of 256
    assert rows["ours"]["kept_bytes_per_weight"] == 6 + 2 * 4 * 20 / 5000
    assert round(rows["torch"]["kept_bytes_per_weight"], 2) == 12
    assert plot.stat().st_size > 1000
