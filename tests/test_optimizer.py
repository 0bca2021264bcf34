"""optimizer.py runs and counts the bytes of each optimizer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from run_process import finish

ROOT = Path(__file__).parents[1]


@pytest.mark.benchmark
def test_a_tiny_run_writes_records_and_a_plot(tmp_path):
    pytest.importorskip("bitsandbytes")
    output, plot = tmp_path / "optimizer.jsonl", tmp_path / "optimizer.png"
    options = ["--size", "tiny", "--threads", "1", "--no-deepspeed", "--output", str(output), "--plot", str(plot)]
    command = [sys.executable, "bench/optimizer.py", *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = finish(command, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["contender"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert set(rows) == {"ours", "ours, bf16 in and out", "torch", "torch, bf16 in and out", "bitsandbytes"}
    assert rows["ours"]["times_ours"] == 1
    assert all(row["seconds_p50"] > 0 and row["threads"] == 1 and row["commit"] for row in rows.values())
    # the weight, two codes, and two scales for each block of 256
    assert rows["ours"]["kept_bytes_per_weight"] == 6 + 2 * 4 * 20 / 5000
    assert round(rows["torch"]["kept_bytes_per_weight"], 2) == 12
    assert plot.stat().st_size > 1000
