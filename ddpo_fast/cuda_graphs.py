"""Functions of tensors that are recorded once as a CUDA graph: a replay launches all their kernels at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# kernels are compiled and chosen, and libraries take their workspaces, before anything is recorded
WARM_UPS = 3

Function = Callable[..., Sequence[Tensor]]


class Recording(NamedTuple):
    """`replay` reads what is in `inputs` and writes `outputs`."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Sequence[Tensor]


class Recorded:
    """`function`, recorded at its first call with tensors of some shapes, dtypes and strides, then replayed.

    The function must launch the same kernels every time and keep what it works on beside its arguments in place. What
    it returns is overwritten by the next call.

    Args:
        function: takes and returns tensors on a CUDA device.
        undo: takes back what calls of the function have changed, as warm-ups are calls too.
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
        """Lets go of the recordings, and with them of their memory, once nobody holds their outputs."""
        self._recordings.clear()


def record(function: Function, arguments: Sequence[Tensor]) -> Recording:
    """Warms the function up on a stream of its own, as capturing wants it, and captures it."""
    inputs = [argument.clone() for argument in arguments]
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads, which score images, may allocate and wait meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return Recording(inputs, graph.replay, outputs)


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all recordings: libraries keep workspaces for every stream that was ever used."""
    return torch.cuda.Stream()


def problem(device: torch.device) -> str:
    """Why nothing can be recorded on a device, or ''."""
    return "" if device.type == "cuda" else f"CUDA graphs need a CUDA device, and this run is on {device.type}"
