"""The benchmark against TRL runs both trainers in turn, and flags what became slower."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from run_process import ROOT, environment, finish, read_records

from ddpo_fast.tiny_sd import MODEL


@pytest.fixture
def bench(monkeypatch):
    """`bench("stem")` imports a module of the folder bench/lib."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return lambda stem: importlib.import_module(f"lib.{stem}")


def throughput(output: Path, *options: str) -> tuple[list[dict], str]:
    """(records, what was printed) of a tiny run on the CPU."""
    command = [sys.executable, "bench/throughput.py", "--device", "cpu", "--size", "tiny", "--output", str(output)]
    done = finish([*command, *options], env=environment(), cwd=ROOT)
    return read_records(output), done.stdout


@pytest.mark.benchmark
def test_the_table_has_both_trainers(tmp_path):
    earlier = tmp_path / "earlier.jsonl"
    earlier.touch()
    rows, said = throughput(tmp_path / "table.jsonl", "--case", "lora", "--against", str(earlier))
    ours, trl = rows
    assert (ours["contender"], trl["contender"], trl["trl"]) == ("ours", "trl", "0.23.1")
    for row in rows:
        assert row["bench"] == "throughput"
        assert row["device"]
        assert row["commit"]
        assert len(row["rounds"]) == 1
        parts = row["sample_s"] + row["reward_s"] + row["train_s"]
        assert 0 < parts <= row["epoch_s"]
        assert row["images_per_s"] == pytest.approx(4 / row["epoch_s"])
        # 4 images of 2 steps, sampled and trained with guidance
        assert row["rows_per_s"] == pytest.approx(2 * 4 * 2 * 2 / row["epoch_s"])
        assert 0 < row["tflop_per_s"] < 2 * row["peak_tflop_per_s"]
        assert row["peak_bytes"] > 2**27
    # both trainers have the same prompts and noise, so images differ only by rounding in the first updates
    assert ours["reward_mean"] == pytest.approx(trl["reward_mean"], rel=0.05)
    speed_up = ours["images_per_s"] / trl["images_per_s"]
    assert trl["ours_over_this"]["per_round"] == [pytest.approx(speed_up)]
    for text in ("PartialState", "warms", "nothing to compare with", "TRL's example"):
        assert text in said


@pytest.mark.benchmark
def test_the_waterfall_is_drawn_and_recorded(tmp_path):
    rows, _ = throughput(tmp_path / "bars.jsonl", "--waterfall", "--case", "lora", "--technique", "plain", "fused")
    assert [row["contender"] for row in rows] == ["plain", "fused"]
    plain, fused = rows
    assert (plain["settings"]["fuse_unet"], fused["settings"]["fuse_unet"]) == (False, True)
    assert plain["gain"] is None
    assert fused["over"] == "plain"
    assert fused["gain"]["median"] == pytest.approx(fused["images_per_s"] / plain["images_per_s"])
    assert (tmp_path / "bars-waterfall-lora.png").stat().st_size > 1000


@pytest.mark.benchmark
def test_a_profile_lists_the_longest_ops(tmp_path):
    (row,), said = throughput(tmp_path / "profile.jsonl", "--profile", "lora")
    times = [op["self_s"] for op in row["profile"]]
    assert len(times) == 15 + 1
    assert times[:-1] == sorted(times[:-1], reverse=True)
    assert sum(times[:-1]) <= times[-1]
    assert "aten::" in said


def test_an_unknown_case_is_named():
    command = [sys.executable, "bench/throughput.py", "--device", "cpu", "--case", "nonsense"]
    done = finish(command, status=2, cwd=ROOT)
    assert "nonsense" in done.stderr
    assert "full-fp32" in done.stderr


def speeds(*images_per_s: float, **others) -> dict:
    rounds = [{"images_per_s": speed} for speed in images_per_s]
    middle = sorted(images_per_s)[len(images_per_s) // 2]
    row = {"bench": "throughput", "case": "lora", "contender": "ours", "device": "cpu", "threads": 1}
    return {**row, "images_per_s": middle, "rounds": rounds, "date": "2026-01-01", "commit": "abc", **others}


def test_what_got_slower_is_flagged(bench):
    against = bench("compare_with_record")
    now = speeds(10.0, 10.1, 9.9)
    assert against.compare([now], [speeds(20.0, 20.5, 19.0)])[1]
    # equal, faster, within the noise of either measurement, and by less than is flagged
    for old in (now, speeds(5.0, 5.1, 5.2), speeds(12.0, 10.1, 13.0), speeds(10.11, 10.12, 10.15)):
        lines, slower = against.compare([now], [old])
        assert not slower, lines
    # a single round gives no estimate of its noise
    assert not against.compare([speeds(9.5)], [speeds(10.0)])[1]
    assert against.compare([speeds(8.5)], [speeds(10.0)])[1]


def test_only_the_newest_row_of_the_same_work_is_compared_with(bench):
    against = bench("compare_with_record")
    now = speeds(10.0, 10.1, settings={"steps": 50})
    fast = speeds(20.0, 20.1, settings={"steps": 50})
    other = {**fast, "settings": {"steps": 10}}
    assert against.compare([now], [other]) == (["throughput lora ours: nothing to compare with"], False)
    assert not against.compare([now], [fast, {**now, "date": "2026-02-01"}])[1]
    assert against.compare([now], [now, {**fast, "date": "2026-02-01"}])[1]


def test_by_default_it_is_expected_to_take_a_quarter_of_an_hour_on_a_cpu(bench):
    bench("workloads")
    throughput = importlib.import_module("throughput")
    usual, longer = (throughput.parse(["--device", "cpu", *more]) for more in ([], ["--rounds", "6"]))
    assert 60 < throughput.expected_s(usual) <= 15 * 60
    assert throughput.expected_s(longer) == 2 * throughput.expected_s(usual)


def test_contenders_take_turns(bench):
    rounds, workloads = bench("rounds"), bench("workloads")
    settings = {"mixed_precision": "no"}
    contenders = [workloads.Contender(name, "ours", True, settings) for name in ("a", "b")]
    order = []

    def run_one(contender, timeout_s):
        order.append(contender.name)
        if len(order) == 4:
            raise rounds.RunFailed("out of memory")
        return {"images_per_s": float(len(order))}

    results, failed = rounds.take_turns(contenders, run_one, 3)
    assert "".join(order) == "abbab"
    assert failed == {"a": "out of memory"}
    assert [figures["images_per_s"] for figures in results["b"]] == [2.0, 3.0, 5.0]
    # a second round would end after the time limit
    results, _ = rounds.take_turns(contenders, lambda *_: {"images_per_s": 1.0}, 3, budget_s=1e-9)
    assert [len(found) for found in results.values()] == [1, 1]


def test_work_is_counted(bench):
    workloads = bench("workloads")
    known = workloads.cases("cpu", "full", None, {"fuse_unet": False})
    ours, trl = known["no-guidance"].contenders
    assert (ours.sample_rows, ours.train_rows) == (24 * 50, 24 * 50)
    assert (trl.sample_rows, trl.train_rows) == (2 * 24 * 50, 24 * 50)
    assert ours.settings["fuse_unet"] is False
    assert "fuse_unet" not in trl.settings
    flops = bench("flops").flops_of(MODEL, use_lora=False)
    # a backward pass has the work of two forward passes: gradients of inputs and of weights
    assert 2.9 < flops["trained"] / flops["forward"] < 3.0
