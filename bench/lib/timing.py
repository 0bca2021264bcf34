"""Times calls, alone and in turns, and how fast the device copies memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

Run = Callable[[], Any]


class Clock:
    """Microseconds of a call. On a GPU, CUDA events measure each call, and the L2 cache is overwritten before it."""

    def __init__(self, device_type: str) -> None:
        self.flushed = None
        if device_type == "cuda":
            size = 4 * torch.cuda.get_device_properties().L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device="cuda")

    def sample(self, run: Run, repeats: int) -> float:
        """Microseconds of a call: on a CPU the mean of the repeats, on a GPU their median."""
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
            # While the GPU writes, the host launches the call that is timed, so a short op is not measured by how long
            # its launch takes.
            self.flushed.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)

    def repeats(self, run: Run, sample_seconds: float) -> int:
        """How many calls take `sample_seconds`, from 1 to 200, measured on the second call."""
        run()
        return max(1, min(200, int(sample_seconds * 1e6 / self.sample(run, 1))))


def interleaved(clock: Clock, runs: dict[str, Run], rounds: int, sample_seconds: float) -> dict[str, list[float]]:
    """Microseconds of each run in each round.

    Each round begins with the next run, so that a machine whose speed drifts slows all of them down alike.
    """
    repeats = {name: clock.repeats(run, sample_seconds) for name, run in runs.items()}
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock.sample(runs[name], repeats[name]))
    return times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = quantiles(values, n=5, method="inclusive")
    return fifths[0], median(values), fifths[3]


def copy_of(moved_bytes: int, device_type: str) -> Run:
    """A copy that moves `moved_bytes` in all: it reads half of them and writes the other half."""
    source, target = torch.ones(2, max(moved_bytes // 2, 1), dtype=torch.uint8, device=device_type)
    return lambda: target.copy_(source)


def copy_bandwidth(moved_bytes: int, device_type: str) -> float:
    """GB/s (bytes read and bytes written) of a copy on the device."""
    clock, copy = Clock(device_type), copy_of(moved_bytes, device_type)
    copy()
    return moved_bytes / 1e3 / median(clock.sample(copy, 5) for _ in range(5))
