"""The benchmark scripts run at tiny sizes, and time no op whose tests have not passed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from run_process import ROOT, environment, finish, read_records


def run(*command: str, status: int | None = 0, **variables: str) -> subprocess.CompletedProcess:
    return finish(command, status, env=environment(**{"PYTHON": sys.executable, **variables}), cwd=ROOT)


def test_records_and_plot(tmp_path):
    output = tmp_path / "ops.jsonl"
    options = ["--device", "cpu", "--size", "tiny", "--skip-tests", "--rounds", "2", "--output", str(output)]
    options += ["--plot", str(tmp_path / "ops.png")]
    run(sys.executable, "bench/ops.py", "--op", "step_logprob", "ppo_loss", *options)
    rows = read_records(output)
    assert {(r["op"], r["contender"]) for r in rows} >= {("ppo_loss", "csrc"), ("step_logprob", "eager")}
    assert all(r["us_p50"] > 0 and r["speed_up"] > 0 and r["unverified"] and r["commit"] for r in rows)
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_a_call_that_csrc_declines_is_not_timed_as_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    script = importlib.import_module("ops")
    options = script.parse(["--device", "cpu", "--size", "tiny"])
    (case,) = script.CASES["groupnorm_silu"]("cpu", "tiny")
    case.declines = lambda direction: direction == "bwd"
    timed = {direction: [name for name, *_ in script.contenders(case, direction, options)] for direction in case.moved}
    assert timed["fwd"] == timed["fwd+bwd"] == ["eager", "csrc", "reference"]
    assert timed["bwd"] == ["eager", "reference"]


@pytest.mark.benchmark
def test_an_op_whose_tests_fail_is_not_timed(tmp_path):
    output = tmp_path / "ops.jsonl"
    options = ["--device", "cpu", "--size", "tiny", "--output", str(output), "--plot", str(tmp_path / "ops.png")]
    command = [sys.executable, "bench/ops.py", "--op", "geglu", *options]
    done = run(*command, status=None, PYTEST_ADDOPTS="--no-such-option")
    assert done.returncode != 0
    assert "geglu" in done.stdout + done.stderr
    assert not output.exists() or not output.read_text()


@pytest.mark.benchmark
def test_an_op_is_timed_if_a_report_says_that_its_tests_passed(tmp_path):
    output, report = tmp_path / "ops.jsonl", tmp_path / "tests.xml"
    options = ["--op", "geglu", "--device", "cpu", "--size", "tiny", "--output", str(output), "--tested", str(report)]
    options += ["--test-command", "false"]
    suite = '<testsuites><testsuite><testcase classname="tests.test_geglu">{}</testcase></testsuite></testsuites>'
    report.write_text(suite.format("<failure/>"))
    assert run(sys.executable, "bench/ops.py", *options, status=None).returncode != 0
    assert not output.exists()
    report.write_text(suite.format(""))
    run(sys.executable, "bench/ops.py", *options)
    assert not any(record["unverified"] for record in read_records(output))


@pytest.mark.benchmark
def test_after_a_failed_stage_the_others_run_and_it_runs_again(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *--op\\ lora_linear*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    settings = {"DRY_RUN": "1", "OUT": str(tmp_path / "out"), "ONLY": "layers|ops-lora|frozen"}
    run("bash", "bench/on_gpu.sh", status=1, **settings, PYTHON=str(broken))
    results = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".jsonl", ".xml")}
    assert results == {"tests-layers.xml", "ops-frozen.jsonl"}
    second = run("bash", "bench/on_gpu.sh", **settings)
    assert (tmp_path / "out" / "ops-lora_linear.jsonl").exists()
    assert second.stdout.count("done before") == 2 * 2, second.stdout


@pytest.mark.parametrize(
    ("model", "kind", "engine"),
    [
        ("random", "full", "offload"),
        ("sdxl", "full", "plain"),
        ("sd35", "lora", "plain"),
        # the only one whose peak is in T5, while prompts are encoded
        ("flux_dev", "lora", "plain"),
    ],
)
def test_memory_is_predicted_and_measured(tmp_path, monkeypatch, capsys, model, kind, engine):
    """Of a whole run. In this process: the script starts one for each combination, and each imports everything again.

    A tenth is for workspaces that ops allocate inside, which the plan does not know.
    """
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    memory = importlib.import_module("memory")
    monkeypatch.setattr(memory, "in_a_process", memory.trained)
    output = tmp_path / "memory.jsonl"
    options = ["--device", "cpu", "--models", model, "--kinds", kind, "--precisions", "fp32", "--modes", "blocks"]
    options += ["--micro", "4", "--engines", engine, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    memory.main()
    (row,) = read_records(output)
    assert row["commit"]
    assert row["predicted_phase"] == {"random": "training", "flux_dev": "encoding"}.get(model, row["predicted_phase"])
    assert abs(row["predicted_bytes"] / row["measured_bytes"] - 1) < 0.1
    assert (0 < row["host_bytes"] < row["predicted_bytes"]) == (engine == "offload")
    assert f"{kind} {engine} no blocks" in capsys.readouterr().out


@pytest.mark.benchmark
def test_plans_of_published_sizes_are_recorded(tmp_path):
    output = tmp_path / "plans.jsonl"
    run(sys.executable, "bench/plans.py", "--models", "sd3.5-medium", "--output", str(output))
    fits = read_records(output)
    assert [(row["gpu_gb"], max(row["total_gb"].values()) < 0.95 * row["gpu_gb"]) for row in fits] == [(16, True)] * 2
    assert [row["chosen"]["embed_prompts_once"] for row in fits] == [True, True]


@pytest.mark.benchmark
def test_a_stage_for_a_part_of_a_gpus_memory(tmp_path):
    # the cap lies between micro-batches of the layers without C++, which are the same on every machine
    settings = {
        "DRY_RUN": "1",
        "OUT": str(tmp_path),
        "ONLY": "memory-full-8",
        "DDPO_FAST_BACKEND": "reference",
    }
    done = run("bash", "bench/on_gpu.sh", **settings)
    capped, whole = read_records(tmp_path / "memory-full-8.jsonl")
    assert capped["cap_gb"] == 8 / 50
    assert whole["cap_gb"] is None
    assert capped["chosen"]["train_micro_batch_size"] < whole["chosen"]["train_micro_batch_size"]
    assert capped["measured_bytes"] < whole["measured_bytes"]
    assert capped["over_uncapped"] == capped["epoch_s"] / whole["epoch_s"]
    for row in (capped, whole):
        assert abs(row["error"]) < 0.1
    assert "times the time without a cap" in done.stdout
