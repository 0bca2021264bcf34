"""A stand-in for a CUDA device that computes on the CPU, tracks the order of operations, and fails on a missing wait.

Every stream and every thread of the host has a vector clock (Lamport's happened-before relation). An operation of a
stream comes after the earlier operations of its thread and of the stream; events and synchronisation join clocks. Of
two accesses to one storage, of which one is a write, the first must have happened before the second. Capturing a graph
is not checked: the accesses of a captured graph count when it is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# methods that give a value to the host, which waits for it
READS_VALUES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


class MissingWait(AssertionError):
    pass


class Timeline:
    """The clock of a stream or a thread: of each timeline, how many operations have happened before this point."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Timeline, int] = {}

    def join(self, clock: dict[Timeline, int]) -> None:
        for other, time in clock.items():
            self.clock[other] = max(time, self.clock.get(other, 0))

    def tick(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]


class Memory:
    """A storage: where it is, and which timelines last wrote to it and read it."""

    def __init__(self, storage: Any, maker: Timeline | None) -> None:
        self.storage = storage  # a reference, so that no other storage gets its address
        self.maker = maker
        self.on_device = False
        self.pinned = False
        self.write: tuple[Timeline, int] | None = None
        self.reads: dict[Timeline, int] = {}
        self.users: set[Timeline] = set()
        self.recorded: set[Timeline] = set()


class Device(TorchFunctionMode):
    """Within the context, tensors that `on_device` made are CUDA's; the fixture `device` puts it behind torch.cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Timeline("main thread")
        self.default = Timeline("default stream")
        self.stream = self.default
        self.capturing: list[tuple[Memory, bool]] | None = None
        self._memories: dict[int, Memory] = {}

    # memory

    def memory(self, tensor: torch.Tensor) -> Memory:
        storage = tensor.untyped_storage()
        return self._memories.setdefault(storage._cdata, Memory(storage, None))

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as one of the device's, written by the current stream."""
        memory = self.memory(tensor)
        memory.on_device, memory.maker, memory.users = True, self.stream, set()
        self._accesses([], [memory], self.stream)
        return tensor

    def unrecorded(self) -> list[Memory]:
        """Device memory that another stream uses without `record_stream`: the allocator may reuse it too early."""
        return [m for m in self._memories.values() if m.on_device and m.users - m.recorded - {m.maker}]

    def _accesses(self, reads: list[Memory], writes: list[Memory], timeline: Timeline) -> None:
        if timeline is not self.host:
            timeline.join(self.host.clock)
        time = timeline.tick()
        for memory in [*reads, *writes]:
            earlier = [memory.write] if memory.write is not None else []
            if memory in writes:
                earlier += memory.reads.items()
            for who, when in earlier:
                if timeline.clock.get(who, 0) < when:
                    raise MissingWait(f"the {timeline.name} does not wait for the {who.name}")
            memory.users.add(timeline)
        for memory in reads:
            memory.reads[timeline] = time
        for memory in writes:
            memory.write, memory.reads = (timeline, time), {}

    # torch's functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:
            return self.memory(args[0]).on_device
        if func == torch.Tensor.device.__get__:
            return CUDA if self.memory(args[0]).on_device else torch.device("cpu")
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        moves_up, args, kwargs, pinned = self._without_device(name, args, kwargs)
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        versions = [tensor._version for tensor in inputs]
        result = args[0].clone() if name == "pin_memory" else func(*args, **kwargs)
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        non_blocking = bool(kwargs.get("non_blocking")) or (name == "to" and any(a is True for a in args[1:]))
        self._note(name, inputs, versions, outputs, moves_up, non_blocking)
        for output in outputs:
            self.memory(output).pinned |= pinned or name == "pin_memory"
        return result

    def _without_device(self, name: str, args: Any, kwargs: Any) -> tuple[bool, Any, Any, bool]:
        """(makes device memory, args, kwargs, pinned): the arguments without those that a CPU does not accept."""
        wanted = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (str, torch.device))]
        moves_up = any(torch.device(device).type == "cuda" for device in wanted)
        if moves_up:
            kwargs.pop("device", None)
            args = tuple(a for a in args if not isinstance(a, (str, torch.device)))
        if name == "to" and wanted:
            # between host and device memory `to` always copies
            kwargs["copy"] = True
        return moves_up, args, kwargs, bool(kwargs.pop("pin_memory", False))

    def _note(self, name: str, inputs: Any, versions: Any, outputs: Any, moves_up: bool, non_blocking: bool) -> None:
        written = [t for t, version in zip(inputs, versions, strict=True) if t._version != version]
        old = {self.memory(tensor) for tensor in inputs}
        new = {self.memory(tensor) for tensor in outputs} - old
        writes = {self.memory(tensor) for tensor in written} | new
        reads = old - writes
        to_host = name in READS_VALUES or name == "to"
        if outputs and not writes:
            # a view
            return
        on_device = moves_up or any(memory.on_device for memory in old)
        for memory in new:
            memory.on_device = on_device and not (to_host and not moves_up)
            memory.maker = self.stream
        if not on_device:
            self._accesses(list(reads), list(writes), self.host)
            return
        if self.capturing is not None:
            self.capturing += [(memory, memory in writes) for memory in reads | writes]
            return
        self._accesses(list(reads), list(writes), self.stream)
        crosses = len({memory.on_device for memory in reads | writes}) == 2
        if name in READS_VALUES or (crosses and not non_blocking):
            self.host.join(self.stream.clock)

    # threads and streams

    @contextmanager
    def thread(self, begins_after: dict[Timeline, int] | None = None) -> Iterator[Timeline]:
        """Runs as another thread of the host, after what its creator had done, and on the default stream."""
        before = self.host, self.stream
        self.host, self.stream = Timeline("worker thread"), self.default
        self.host.join(before[0].clock if begins_after is None else begins_after)
        try:
            yield self.host
        finally:
            self.host, self.stream = before

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.timeline
        try:
            yield
        finally:
            self.stream = before


def put_behind_torch(device: Device, monkeypatch: Any) -> None:
    """Replaces torch.cuda's streams, events and graphs by those of the device."""

    class Stream:
        def __init__(self, of: Any = None, timeline: Timeline | None = None) -> None:
            self.timeline = timeline or Timeline("side stream")

        def wait_stream(self, other: Stream) -> None:
            self.timeline.join(other.timeline.clock)

        def wait_event(self, event: Event) -> None:
            self.timeline.join(event.clock)

        def synchronize(self) -> None:
            device.host.join(self.timeline.clock)

    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.clock: dict[Timeline, int] = {}  # an event that was not recorded counts as complete

        def record(self, stream: Stream | None = None) -> None:
            self.clock = dict((stream.timeline if stream else device.stream).clock)

        def synchronize(self) -> None:
            device.host.join(self.clock)

    class Graph:
        def __init__(self) -> None:
            self.accesses: list[tuple[Memory, bool]] = []

        def replay(self) -> None:
            reads = [memory for memory, writes in self.accesses if not writes]
            device._accesses(reads, [memory for memory, writes in self.accesses if writes], device.stream)

    @contextmanager
    def graph(made: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads use CUDA meanwhile"
        with device.on_stream(stream):
            device.capturing = made.accesses
            yield
            device.capturing = None

    stand_ins = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": device.on_stream}
    stand_ins["current_stream"] = lambda of=None: Stream(timeline=device.stream)
    stand_ins["is_available"] = lambda: True
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # `Tensor.record_stream` accepts real CUDA streams only
    record = lambda tensor, stream: device.memory(tensor).recorded.add(stream.timeline)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
