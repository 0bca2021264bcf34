"""Records functions of tensors as CUDA graphs, whose replay launches all their kernels with one call of the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Calls before a recording: in them Triton compiles its kernels, cuDNN chooses its own, and libraries allocate their
# workspaces, none of which may happen while a graph is recorded.
WARM_UPS = 3

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


def problem(device: torch.device) -> str:
    """Why nothing can be recorded on a device, or ''."""
    return "" if device.type == "cuda" else f"CUDA graphs need a CUDA device, and this run is on {device.type}"


def check(device: torch.device) -> None:
    """Raises `ValueError`, naming the setting `cuda_graphs`, if nothing can be recorded on a device."""
    if reason := problem(device):
        raise ValueError(f"cuda_graphs is True, but {reason}: leave it out")
