"""The benchmarks run, and refuse what is not proved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHON": sys.executable} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_records_and_plot(tmp_path):
    output = tmp_path / "ops.jsonl"
    options = ["--device", "cpu", "--size", "tiny", "--skip-tests", "--rounds", "2", "--output", str(output)]
    options += ["--plot", str(tmp_path / "ops.png")]
    done = run(sys.executable, "bench/ops.py", "--op", "step_logprob", "ppo_loss", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(r["op"], r["contender"]) for r in rows} >= {("ppo_loss", "csrc"), ("step_logprob", "eager")}
    assert all(r["us_p50"] > 0 and r["speed_up"] > 0 and r["unverified"] and r["commit"] for r in rows)
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_an_op_whose_tests_fail_is_not_timed(tmp_path):
    output = tmp_path / "ops.jsonl"
    options = ["--device", "cpu", "--size", "tiny", "--output", str(output), "--plot", str(tmp_path / "ops.png")]
    done = run(sys.executable, "bench/ops.py", "--op", "geglu", *options, PYTEST_ADDOPTS="--no-such-option")
    assert done.returncode != 0
    assert "geglu" in done.stdout + done.stderr
    assert not output.exists() or not output.read_text()
