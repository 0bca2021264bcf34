"""bench/unet_calls.py runs on a CPU, and a call of it is what sampling and training call."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import unet_calls


def test_each_pass_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(unet_calls, "ROUNDS", 1)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    unet_calls.main(["--device", "cpu", "--size", "tiny", "--rows", "2", "--output", str(tmp_path / "records")])
    rows = unet_calls.records.read([tmp_path / "records"])
    assert [row["pass"] for row in rows] == ["sampling", "training"]
    assert all(0 < row["host_ms"] <= row["ms"] and row["first_s"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        unet_calls.parse(["--rows", "3"])


def test_only_training_adds_gradients():
    unet = unet_calls.make_unet(unet_calls.default_model("cpu", "tiny"), "cpu")
    inputs = unet_calls.inputs_of(unet, 2)
    (output,) = unet_calls.function_of(unet, trains=False)(*inputs)
    assert output.shape[0] == 2
    assert all(weight.grad is None for weight in unet.parameters())
    unet_calls.function_of(unet, trains=True)(*inputs)
    assert all(weight.grad is not None for weight in unet.parameters())
