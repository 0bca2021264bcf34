"""What placing a run's networks sets for the whole process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ddpo_fast.config import DDPOConfig
from ddpo_fast.placement import choose_libraries


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_convolutions_unless_bits_must_repeat(monkeypatch, deterministic):
    for name, value in (("benchmark", deterministic), ("allow_tf32", True), ("deterministic", deterministic)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    # without CUDA, PyTorch's own cannot be read
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    choose_libraries(DDPOConfig(allow_tf32=False))
    assert torch.backends.cudnn.benchmark is not deterministic
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
