"""What a processor is fastest with, as measured: the number of threads, and whether bf16 pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

# Timed calls for each number of threads and each precision, after one that is not timed.
ROUNDS = 3
# The bits of a run follow its number of threads. So fewer are taken only where they need no more than this share of the
# time: the noise of so few calls should not decide.
CLEARLY_FASTER = 0.8
# Nor is a still smaller number tried where one takes this many times as long as the best.
HOPELESS = 2
# Channels of the timed layers. They are few: wider layers divide over threads at least as well.
CHANNELS = 64


def layers(rows: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A call of a 3 x 3 convolution, a 1 x 1 convolution and an activation of [rows, CHANNELS, height, width]."""
    x = torch.ones((rows, CHANNELS, height, width), dtype=dtype).to(memory_format=torch.channels_last)
    wide, narrow = (torch.ones((CHANNELS, CHANNELS, size, size), dtype=dtype) for size in (3, 1))

    @torch.no_grad()
    def call() -> Tensor:
        return conv2d(silu(conv2d(x, wide, padding=1)), narrow)

    return call


def fastest_threads(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """The number of threads with which `call` is fastest: PyTorch's, or a half of it, a quarter, ... or 1.

    PyTorch's number is that of the cores that the process may run on. That is too many where other programs use them,
    and where the process may have less of their time, as in a container with a quota: the threads then wait for each
    other in every operator.
    """
    most = best = torch.get_num_threads()
    least_time = median(_times(call, clock))
    threads = most // 2
    try:
        while threads:
            torch.set_num_threads(threads)
            seconds = median(_times(call, clock))
            if seconds > HOPELESS * least_time:
                break
            if seconds <= CLEARLY_FASTER * least_time:
                best, least_time = threads, seconds
            threads //= 2
    finally:
        torch.set_num_threads(most)
    return best


def bf16_speedup(clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times as fast the layers of a network of images are in bf16 as in fp32, with the present threads.

    Asking which instructions a processor has is not enough: those for dot products of bf16 vectors (AVX512-BF16) are
    slower than fp32's on some processors.
    """
    exact, half = layers(16, 16, 16), layers(16, 16, 16, torch.bfloat16)
    # the least times, which other programs change least
    return min(_times(exact, clock)) / min(_times(half, clock))


def _times(call: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    """The times of ROUNDS calls."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = clock()
        call()
        times.append(clock() - start)
    return times
