"""A part of a GPU, without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ddpo_fast.device_memory import CUDA_CONTEXT, GB, limit_memory


@pytest.fixture
def limits(monkeypatch):
    """The shares that PyTorch gives out of a GPU of 80 GB, by its index."""
    found: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda share, i: found.update({i: share}), raising=False)
    return found


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_device_needs_no_index(limits, device, index):
    limit_memory(24, torch.device(device))
    assert limits == {index: pytest.approx((24 * GB - CUDA_CONTEXT) / (80 * GB))}


def test_more_than_there_is_means_all(limits):
    limit_memory(100, torch.device("cuda"))
    assert limits == {3: 1.0}


def test_less_than_cuda_takes_is_refused(limits):
    with pytest.raises(ValueError, match=r"gpu_memory is 0\.1, and CUDA alone takes .* GB: set more"):
        limit_memory(0.1, torch.device("cuda"))
    assert not limits
