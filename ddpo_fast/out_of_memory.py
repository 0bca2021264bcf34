"""Errors that mean that memory ran out: PyTorch's allocator has a type for it, libraries only say so."""

from __future__ import annotations

import torch

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
