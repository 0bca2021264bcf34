"""Which errors mean that memory ran out, and the share of a GPU that a run may use; no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ddpo_fast.device_memory import CUDA_CONTEXT, GB, is_out_of_memory, limit_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation after trying 5 plans."),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: cudaErrorMemoryAllocation"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=lambda error: str(error)[:40],
)
def test_errors_that_mean_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL error: unhandled cuda error, out of memory somewhere else"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_errors_that_do_not(error):
    assert not is_out_of_memory(error)


@pytest.fixture
def limits(monkeypatch):
    """Replaces CUDA by a GPU of 80 GB; the share of its memory that PyTorch was limited to, by the GPU's index."""
    found: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda share, i: found.update({i: share}), raising=False)
    return found


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_device_without_an_index_is_the_current_one(limits, device, index):
    limit_memory(24, torch.device(device))
    assert limits == {index: pytest.approx((24 * GB - CUDA_CONTEXT) / (80 * GB))}


def test_a_limit_above_the_gpus_memory_means_all_of_it(limits):
    limit_memory(100, torch.device("cuda"))
    assert limits == {3: 1.0}


def test_a_limit_below_what_cuda_takes_is_refused(limits):
    with pytest.raises(ValueError, match=r"gpu_memory is 0\.1, and CUDA alone takes .* GB: set more"):
        limit_memory(0.1, torch.device("cuda"))
    assert not limits
