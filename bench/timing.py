"""Timing, and what else one call of something costs: kernels, peak memory, bytes kept for the backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Any]
NO_LAUNCHES = {"launches": None, "launches_are": "dispatched ops", "kernel_us": None}


class Clock:
    """Microseconds of a call. On a GPU the L2 cache is flushed before each, and CUDA events measure it."""

    def __init__(self, device_type: str) -> None:
        self.flushed = None
        if device_type == "cuda":
            size = 4 * torch.cuda.get_device_properties().L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device="cuda")

    def sample(self, run: Run, repeats: int) -> float:
        if self.flushed is not None:
            return self._sample_on_gpu(run, repeats)
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begun) * 1e6 / repeats

    def _sample_on_gpu(self, run: Run, repeats: int) -> float:
        assert self.flushed is not None
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in pairs:
            # also gives the host a head start, so that a short op's launch does not show
            self.flushed.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)

    def repeats(self, run: Run, sample_seconds: float) -> int:
        """How many calls fill a sample, after a call to warm up."""
        run()
        return max(1, min(200, int(sample_seconds * 1e6 / self.sample(run, 1))))


def interleaved(clock: Clock, runs: dict[str, Run], rounds: int, sample_seconds: float) -> dict[str, list[float]]:
    """Microseconds of each run in each round; the order rotates, as the machine's state drifts."""
    repeats = {name: clock.repeats(run, sample_seconds) for name, run in runs.items()}
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock.sample(runs[name], repeats[name]))
    return times


class _DispatchedOps(TorchDispatchMode):
    """Counts ops, those inside of this project's custom ops too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ddpo_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(run: Run, device_type: str) -> dict[str, Any]:
    """CUDA kernels of a call and their microseconds without the gaps between them; on a CPU the dispatched ops."""
    if device_type == "cpu":
        with _DispatchedOps() as ops:
            run()
        return {**NO_LAUNCHES, "launches": ops.count}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))]
    kernel_us = sum(e.time_range.elapsed_us() for e in kernels)
    return {"launches": len(kernels), "launches_are": "CUDA kernels", "kernel_us": kernel_us}


def peak_bytes(run: Run, device_type: str) -> int:
    """The most that a call has allocated at a time beyond what was there before it."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(changes), default=0)


def kept_bytes(run: Run) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, its own inputs and weights among them."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())
