"""Memory of the device: how much of it a run may use, what is free, and which errors mean that it ran out."""

from __future__ import annotations

import psutil
import torch

GB = 10**9
# Bytes of the CUDA context with PyTorch's kernels, outside of PyTorch's allocator. Assumed: not measured on a GPU yet.
CUDA_CONTEXT = 500_000_000

# PyTorch's allocator has a type for it; libraries only say so.
# what PyTorch, cuDNN, cuBLAS and the CUDA runtime say when memory is short, as far as it is not `OutOfMemoryError`
SAID = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    # convolutions: no engine's workspace fits
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    # a library's handle and its workspace are made at its first call
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    # the CPU's allocator
    "can't allocate memory",
    "not enough memory: you tried to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(words in said for words in SAID)


def free_bytes(device: torch.device, num_processes: int = 1, gpu_memory: float | None = None) -> int:
    """What a process may still allocate on its device: of a GPU its own, or `gpu_memory` GB of it, of a machine its
    share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if gpu_memory is None:
            return free
        return min(free, int(gpu_memory * 1e9) - torch.cuda.memory_allocated(device))
    return psutil.virtual_memory().available // num_processes


def limit_memory(gpu_memory: float, device: torch.device) -> None:
    """Lets this process have so many GB of the GPU. Raises `ValueError` if CUDA alone needs them."""
    share = (gpu_memory * GB - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
    if share <= 0:
        raise ValueError(f"gpu_memory is {gpu_memory}, and CUDA alone takes {CUDA_CONTEXT / GB} GB: set more")
    # PyTorch refuses a device without an index, which means the current one
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)
