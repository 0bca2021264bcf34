"""A device's memory: how much of it is free, how much a run may use, and which errors say that it ran out."""

from __future__ import annotations

import psutil
import torch

GB = 10**9
# Bytes that the CUDA context with PyTorch's kernels takes, outside of PyTorch's allocator: assumed, not measured.
CUDA_CONTEXT = 500_000_000

# Parts of the messages by which PyTorch, cuDNN, cuBLAS and the CUDA runtime report a lack of memory. Only PyTorch's own
# allocator raises an `OutOfMemoryError`; the rest are plain `RuntimeError`s.
OUT_OF_MEMORY_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    # for a convolution: cuDNN has found no algorithm whose workspace fits
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    # a library allocates its handle and workspace at its first call
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    # the CPU's allocator
    "can't allocate memory",
    "not enough memory: you tried to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


def free_bytes(device: torch.device, num_processes: int = 1, gpu_memory: float | None = None) -> int:
    """Bytes that this process may still allocate on its device.

    Args:
        num_processes: of the run. Each is assumed to have its own GPU or, on a CPU, an equal share of the memory.
        gpu_memory: GB of the GPU to use; None for all of it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # CUDA counts all memory that PyTorch's allocator has reserved as used. The part of it that is not allocated to
        # tensors is free for this process too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if gpu_memory is None:
            return free
        return min(free, int(gpu_memory * GB) - torch.cuda.memory_allocated(device))
    return psutil.virtual_memory().available // num_processes


def memory_held(device: torch.device) -> dict[str, float]:
    """GB that this process holds: `host_gb` now, and on a GPU `device_gb`, the most that tensors have taken so far."""
    found = {"host_gb": psutil.Process().memory_info().rss / GB}
    if device.type == "cuda":
        found["device_gb"] = torch.cuda.max_memory_allocated(device) / GB
    return found


def limit_memory(gpu_memory: float, device: torch.device) -> None:
    """Limits PyTorch's allocator so that the process takes `gpu_memory` GB of the GPU at most.

    Raises `ValueError` if the CUDA context alone needs that much.
    """
    # the CUDA context's memory is not the allocator's, so it is subtracted from the allocator's share
    share = (gpu_memory * GB - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
    if share <= 0:
        raise ValueError(f"gpu_memory is {gpu_memory}, and CUDA alone takes {CUDA_CONTEXT / GB} GB: set more")
    # by its index (None: the current device), as PyTorch refuses torch.device("cuda"), which has none
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)
