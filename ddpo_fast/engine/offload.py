"""A step in host memory: gradients come down, the CPU updates the exact weights, half-precision copies go up.

Each crosses the bus once an update, a bucket at a time; while the CPU works on one bucket the next comes down and the
one before goes up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo_fast.engine.host_adamw import HostAdamW8bit
from ddpo_fast.engine.master_weights import MasterWeights
from ddpo_fast.engine.optimizers import buckets, flat, training_only


class Offload:
    """Steps of an optimizer whose parameters, `weights.masters`, are in host memory."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: MasterWeights) -> None:
        self.optimizer = optimizer
        self.weights = weights
        if "TORCHELASTIC_RUN_ID" in os.environ and weights.copies[0].is_cuda:
            # torchrun leaves each process one thread, and here the CPU has something to do
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self.buckets = list(buckets(master.numel() for master in weights.masters))
        # two of each: one moves while the other is worked on
        self._gradients = [_Staging(), _Staging()]
        self._copies = [_Staging(), _Staging()]

    def step(self, multiplier: float) -> None:
        """One update from the gradients times `multiplier`; brings the network's copies up to date."""
        sums, copies = self.weights.gradients, self.weights.copies
        chosen = [[i for i in bucket if sums[i] is not None] for bucket in self.buckets]
        chosen = [bucket for bucket in chosen if bucket]
        for at, bucket in enumerate(chosen):
            if at == 0:
                self._download(bucket, 0)
            if at + 1 < len(chosen):
                self._download(chosen[at + 1], at + 1)
            gradients, out = self._gradients[at % 2], self._copies[at % 2]
            gradients.wait()
            out.wait()
            out.views = out.room([copies[i] for i in bucket])
            self._update(bucket, gradients.views, out.views, multiplier)
            out.move([flat(copies[i]) for i in bucket], out.views)
        for staging in self._copies:
            staging.finish()

    def _download(self, bucket: Sequence[int], at: int) -> None:
        staging = self._gradients[at % 2]
        sums = self.weights.gradients
        found = [flat(sums[i], like=self.weights.masters[i]) for i in bucket]  # type: ignore[arg-type]
        staging.views = staging.room(found)
        staging.move(staging.views, found)

    def _update(self, bucket: Sequence[int], gradients: list[Tensor], out: list[Tensor], multiplier: float) -> None:
        """One bucket: the exact weights from the gradients, and the copies in `out` from them."""
        masters = [self.weights.masters[i] for i in bucket]
        homes = [master.data for master in masters]
        for master, home in zip(masters, homes, strict=True):
            master.data = flat(home)
        with training_only(self.optimizer, masters):
            if isinstance(self.optimizer, HostAdamW8bit):
                self.optimizer.step_with(gradients, out, multiplier)
            else:
                for master, gradient in zip(masters, gradients, strict=True):
                    master.grad = gradient.float() * multiplier
                self.optimizer.step()
                torch._foreach_copy_(out, [master.data for master in masters])
        for master, home in zip(masters, homes, strict=True):
            master.data, master.grad = home, None


class _Staging:
    """Page-locked host memory for a bucket, and the copy between it and the device that is under way."""

    def __init__(self) -> None:
        self.views: list[Tensor] = []
        self._memory = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def room(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory for each of the tensors, flat: what was there before is overwritten."""
        sizes = [tensor.numel() for tensor in tensors]
        if self._memory.dtype != tensors[0].dtype or self._memory.numel() < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=tensors[0].is_cuda)
        return list(self._memory[: sum(sizes)].split(sizes))

    def move(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Starts the copy; the sources on a device are what its current stream leaves there."""
        device = next((t.device for t in (*targets, *sources) if t.is_cuda), None)
        if device is None:
            torch._foreach_copy_(list(targets), list(sources))
            return
        if self._stream is None:
            self._stream, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        assert self._done is not None
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                for tensor in (target, source):
                    if tensor.is_cuda:
                        tensor.record_stream(self._stream)
        self._done.record(self._stream)

    def wait(self) -> None:
        """The host waits for the copy."""
        if self._done is not None:
            self._done.synchronize()

    def finish(self) -> None:
        """The device's current stream waits for the copy."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
