"""What a call costs besides time: kernels, peak memory, and bytes kept for the backward pass."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lib.timing import Run

NO_LAUNCHES = {"launches": None, "launches_are": "dispatched ops", "kernel_us": None}


class _DispatchedOps(TorchDispatchMode):
    """Counts ops, and those that this project's custom ops call in their turn."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch switches a dispatch mode off while the mode handles an op, so it is entered again to count the ops
        # inside of a custom op
        if func.namespace == "ddpo_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(run: Run, device_type: str) -> dict[str, Any]:
    """The number of a call's CUDA kernels and their microseconds without the gaps between them; on a CPU the number of
    dispatched ops."""
    if device_type == "cpu":
        with _DispatchedOps() as ops:
            run()
        return {**NO_LAUNCHES, "launches": ops.count}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))]
    kernel_us = sum(e.time_range.elapsed_us() for e in kernels)
    return {"launches": len(kernels), "launches_are": "CUDA kernels", "kernel_us": kernel_us}


def peak_bytes(run: Run, device_type: str) -> int:
    """The most bytes that a call has allocated at a time, beyond those that were allocated before it."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return peak_of_cpu_allocations(profiler)


def peak_of_cpu_allocations(profiler: profile) -> int:
    """The most bytes by which PyTorch's CPU allocator stood above its level at the start of a profile.

    The profiler writes an event for each allocation (bytes above zero) and each release (below zero).
    """
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(accumulate((change for _, change in changes), initial=0))


def kept_bytes(run: Run) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, its own inputs and weights included."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())
