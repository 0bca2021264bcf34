"""Records functions of tensors as CUDA graphs, whose replay launches all their kernels with one call of the driver."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Calls before a recording: in them Triton compiles its kernels, cuDNN chooses its own, and libraries allocate their
# workspaces, none of which may happen while a graph is recorded.
WARM_UPS = 3
# of `host_is_the_limit`, which pauses for at least this many times the time that the host takes, at a GPU's clock
ROUNDS = 5
PAUSE = 2
CYCLES_A_SECOND = 2e9

Function = Callable[..., Sequence[Tensor]]


class Recording(NamedTuple):
    """`replay` reads `inputs` and writes `outputs`, at the addresses that they had when it was recorded."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Sequence[Tensor]


class Recorded:
    """A function that is recorded at its first call for each set of shapes, dtypes and strides, and then replayed.

    The function must launch the same kernels every time, and whatever it reads besides its arguments (weights, buffers)
    must stay at its address. The next call overwrites the tensors that it returned.

    Args:
        function: takes and returns tensors on a CUDA device.
        undo: reverts what warm-up calls have changed (gradients that were added).
    """

    def __init__(self, function: Function, undo: Callable[[], None] = lambda: None) -> None:
        self.function = function
        self.undo = undo
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        kind = tuple((a.shape, a.dtype, a.stride()) for a in arguments)
        recording = self._recordings.get(kind)
        if recording is None:
            recording = self._recordings[kind] = record(self.function, arguments)
            self.undo()
        for static, argument in zip(recording.inputs, arguments, strict=True):
            static.copy_(argument)
        recording.replay()
        return recording.outputs

    def forget(self) -> None:
        """Drops the recordings; their memory is freed when no tensor that they returned is referenced any more."""
        self._recordings.clear()


def record(function: Function, arguments: Sequence[Tensor]) -> Recording:
    """Calls the function a few times on a side stream, as PyTorch requires before a capture, and captures it there.

    A capture records the kernels without running them.
    """
    inputs = [argument.clone() for argument in arguments]
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads score images meanwhile, and may allocate or synchronise
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return Recording(inputs, graph.replay, outputs)


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One stream for all recordings, as cuBLAS and cuDNN keep a workspace for each stream that was ever used."""
    return torch.cuda.Stream()


def host_is_the_limit(call: Callable[[], Any]) -> bool:
    """Whether a GPU computes a call faster than the host launches its kernels, so that a graph would save time.

    The shortest times of some rounds count, because disturbances only make times longer.
    """
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    of_host, of_device = [], []
    for _ in range(ROUNDS):
        # The device is idle. CUDA queues about a thousand launches, after which the host waits for a slower device, but
        # never as long as that takes for all of them.
        begun = time.perf_counter()
        call()
        of_host.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
        # the kernels wait behind a pause until all are launched, so that the device does not wait between them
        torch.cuda._sleep(int(PAUSE * of_host[-1] * CYCLES_A_SECOND))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        of_device.append(first.elapsed_time(last) / 1e3)
    return min(of_host) > min(of_device)


def problem(device: torch.device) -> str:
    """Why nothing can be recorded on a device, or ''."""
    return "" if device.type == "cuda" else f"CUDA graphs need a CUDA device, and this run is on {device.type}"


def check(device: torch.device) -> None:
    """Raises `ValueError`, naming the setting `cuda_graphs`, if nothing can be recorded on a device."""
    if reason := problem(device):
        raise ValueError(f"cuda_graphs is True, but {reason}: leave it out")
