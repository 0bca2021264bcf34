"""The model of scaling over devices: its properties, and its numbers against ones computed by hand."""

from __future__ import annotations

import json
import math
import sys

import pytest
from run_process import ROOT, finish, read_records

# imported first, as bench/lib puts an empty package in its place if it is missing
import ddpo_fast  # noqa: F401

BENCH = ROOT / "bench"
sys.path.append(str(BENCH))
import scaling  # noqa: E402
from lib import scaling_check, scaling_model  # noqa: E402

FULL, LORA = scaling_model.MODELS["full"], scaling_model.MODELS["lora"]
SMALL = scaling_model.Model(weights=5000, trained=1000, row_bytes=100)
ASSUMED = scaling.predictions(scaling.parse([]))
RECORD = {
    "bench": "throughput",
    "case": "full-bf16",
    "device": "NVIDIA H100 80GB HBM3",
    "trainer": "ours",
    "size": "full",
    "use_lora": False,
    "precision": "bf16",
    "sample_rows_per_s": 200.0,
    "train_rows_per_s": 100.0,
}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", [FULL, LORA])
def test_one_device_does_not_communicate(model, stage):
    links = scaling_model.CARDS["h100"][2]
    assert scaling_model.communication_s(stage, model, 50, 1, links) == 0
    assert scaling_model.sent_bytes(stage, model, 50, 1) == 0


def test_efficiency_is_at_most_one():
    for name in ("weak_efficiency", "strong_efficiency"):
        found = [row[name] for row in ASSUMED if not math.isnan(row[name])]
        assert all(0 < efficiency <= 1 for efficiency in found)
        assert min(found) < 0.9


def test_images_per_s_grow_with_the_devices():
    curves: dict[tuple, list[float]] = {}
    for row in ASSUMED:
        curves.setdefault((row["card"], row["trained"], row["stage"]), []).append(row["weak"])
    assert len(curves) == 2 * 2 * 4
    for curve in curves.values():
        assert len(curve) >= 10
        assert curve == sorted(curve)


@pytest.mark.parametrize("devices", [2, 8, 1024])
def test_each_zero_stage_takes_less_memory(devices):
    sizes = [sum(scaling_model.memory(stage, FULL, 24, devices).values()) for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_memory_equals_that_computed_by_hand():
    other = 2 * (83_653_863 + 123_060_480)
    whole = {"weights": 2 * 5000 + other, "master": 4000, "gradients": 4000, "states": 8000, "activations": 300}
    assert scaling_model.memory(0, SMALL, 3, 4) == whole
    assert scaling_model.memory(1, SMALL, 3, 4) == {**whole, "master": 1000, "states": 2000}
    assert scaling_model.memory(2, SMALL, 3, 4) == {**whole, "master": 1000, "states": 2000, "gradients": 1000}
    # fp32 weight, gradient and two moments, and a half-precision copy
    parts = scaling_model.memory(0, FULL, 0, 1)
    assert sum(parts.values()) - other == 18 * 859_520_964


@pytest.mark.parametrize(
    ("stage", "model", "micro_batches", "devices", "sent"),
    [
        (0, FULL, 67, 8, 2 * 7 * 859_520_964 * 4 / 8),
        (0, LORA, 67, 2, 797_184 * 4),
        (0, SMALL, 3, 4, 2 * 3000),
        (1, SMALL, 3, 4, 3000 + 1500),
        (2, SMALL, 3, 4, 3 * 3000 + 1500),
        (3, SMALL, 3, 4, 3 * 3000 + 3 * 2 * 7500),
    ],
)
def test_communicated_bytes_equal_those_computed_by_hand(stage, model, micro_batches, devices, sent):
    assert scaling_model.sent_bytes(stage, model, micro_batches, devices) == pytest.approx(sent)


def test_communication_time_equals_that_computed_by_hand():
    links = scaling_model.Links(inside=8.0, across=2.0, inside_hop=0.25, across_hop=0.5, node=4)
    # in a ring of 4 devices each one sends 3/4 of the bytes
    assert scaling_model.collective_s(64, 1, 4, links) == 48 / 8 + 3 * 0.25
    # with 3 nodes each device then sends 2/3 of its quarter to the other nodes
    assert scaling_model.collective_s(96, 2, 12, links) == pytest.approx(72 / 8 + 16 / 2 + 2 * (3 * 0.25 + 2 * 0.5))
    # an all-reduce sends that twice, as one message
    assert scaling_model.communication_s(0, SMALL, 1, 4, links) == 2 * (3000 / 8 + 3 * 0.25)
    work = scaling_model.Work(images=4, steps=5, updates=2, pairs=3)
    assert (work.rows, work.micro_batches) == (40, 4)
    rates = scaling_model.Rates(sample=10, train=5, reward_s=0.5, optimizer_s=8, origin="")
    assert scaling_model.epoch_s(0, SMALL, work, rates, 1, links) == 4 + 8 + 2 + 2 * 8
    exchange = scaling_model.communication_s(1, SMALL, 4, 4, links)
    assert scaling_model.epoch_s(1, SMALL, work, rates, 4, links) == pytest.approx(4 + 8 + 2 + 2 * (8 / 4 + exchange))


def test_least_times_are_those_of_the_counted_row():
    counts = ((8e9, 1e6), (0.0, 6e6), (1e9, 4e6))
    assert scaling_model.least_s(counts, 1e12, 1e9) == pytest.approx(8e-3 + 6e-3 + 4e-3)
    rows = [row for row in read_records(BENCH / "records" / "traffic.jsonl") if row["network"] == "sd1.5"]
    for kind, model in (("all weights", FULL), ("lora", LORA)):
        of = {row["phase"]: row for row in rows if (row["variant"], row["trained"]) == ("fused", kind)}
        for counted, phases in ((model.sampling, ["sampling"]), (model.training, ["forward", "backward"])):
            # at the rates that the record was made with it is the record's
            found = scaling_model.least_s(counted, 550e12, 2.8e12)
            assert found == pytest.approx(sum(of[phase]["least_s"] for phase in phases))
            assert all(size >= 0 for _, size in counted)


def test_strong_scaling_ends_where_an_update_has_no_image():
    rows = scaling.predictions(scaling.parse(["--epoch-images", "16", "--updates", "2", "--devices", "8", "16"]))
    assert {(row["devices"], math.isnan(row["strong"])) for row in rows} == {(8, False), (16, True)}
    assert not any(math.isnan(row["weak"]) for row in rows)


def test_measured_rates_come_from_a_record(tmp_path):
    others = [{"device": "NVIDIA A100-SXM4-80GB"}, {"trainer": "trl"}, {"precision": "fp32"}, {"size": "tiny"}]
    others += [{"case": "no-guidance"}, {"use_lora": True}, {"bench": "waterfall"}]
    rows = [{**RECORD, "train_rows_per_s": 7.0}, RECORD]
    rows += [{**RECORD, "sample_rows_per_s": 1.0, **other} for other in others]
    failed = {name: value for name, value in RECORD.items() if not name.endswith("_per_s")}
    file = tmp_path / "throughput.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, {**failed, "failed": "out of memory"}]))
    options = scaling.parse(["--record", str(file), "--devices", "1", "--images", "10", "--updates", "1"])
    found = {(row["card"], row["trained"]): row for row in scaling.predictions(options)}
    row = found["h100", "full"]
    assert row["origin"] == "rows/s measured, rest assumed"
    optimizer_s = 30 * 859_520_964 / 3350e9
    assert row["weak"] == pytest.approx(10 / (1000 / 200 + 1000 / 100 + optimizer_s))
    file.write_text(json.dumps(RECORD))
    assert [row["origin"] for row in scaling.predictions(options) if row["card"] == "a100"] == ["assumed", "assumed"]


def test_rates_that_are_given_must_be_of_one_gpu():
    with pytest.raises(SystemExit):
        scaling.parse(["--rows-per-s", "200", "100"])
    options = scaling.parse(["--rows-per-s", "200", "100", "--device", "a100", "--trained", "lora", "--devices", "1"])
    (row,) = scaling.predictions(options)
    assert row["origin"] == "rows/s given, rest assumed"


def test_the_check_against_processes_equals_that_computed_by_hand(monkeypatch):
    """One process takes 1 s to sample and 2 s to train; two at the same time take up to twice as long."""
    together = {"parts": [3.0, 0.0, 4.0], "weights": 1000, "calls": 20, "bytes": 8000, "hop_s": 0.01}
    runs = [
        [{"parts": [1.0, 0.0, 2.0]}],
        [{"parts": [2.0, 0.0, 4.0]}, {"parts": [1.0, 0.0, 3.0]}],
        [{**together, "bytes_per_s": 16_000.0}, {}],
    ]
    monkeypatch.setattr(scaling_check, "epochs_of", lambda workers: runs.pop(0))
    row = scaling_check.checked([])
    # an update sends 4000 bytes at 16000 bytes/s and has two hops
    communication_s = 2 * (0.25 + 2 * 0.01)
    assert row["communication_s"] == pytest.approx(communication_s)
    assert row["from_alone_s"] == pytest.approx(3 + communication_s)
    assert row["from_beside_s"] == pytest.approx(6 + communication_s)
    assert row["beside_error"] == pytest.approx((6 + communication_s) / 7 - 1)
    assert row["foretold_bytes"] == row["bytes"]


def test_command_line(tmp_path):
    plot = tmp_path / "scaling.png"
    done = finish([sys.executable, BENCH / "scaling.py", "--devices", "1", "2", "16", "--output", plot])
    lines = [line for line in done.stdout.splitlines() if line.startswith(("a100", "h100"))]
    assert len(lines) == 2 * 2 * (1 + 4 + 4)
    assert all(line.endswith("[assumed]") for line in lines)
    assert plot.stat().st_size > 10_000


@pytest.mark.benchmark
def test_the_check_trains_on_two_processes(tmp_path):
    output = tmp_path / "scaling.jsonl"
    finish([sys.executable, BENCH / "scaling.py", "--check", "--rounds", "1", "--output", output])
    (row,) = read_records(output)
    assert row["measured_s"] > 0
    # gradients, and a few metrics
    assert 0 <= row["bytes"] - row["foretold_bytes"] < 1000
