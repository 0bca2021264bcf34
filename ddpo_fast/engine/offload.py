"""An optimizer's step in host memory.

Gradients are copied to the host, the CPU updates the fp32 weights, and half-precision copies of them are copied back to
the device. Each gradient and each weight crosses the bus once per update, a bucket at a time. While the CPU updates one
bucket, the next bucket's gradients and the previous bucket's weights are copied in separate CUDA streams.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo_fast.engine.host_adamw import HostAdamW8bit
from ddpo_fast.engine.master_weights import MasterWeights
from ddpo_fast.engine.optimizers import buckets, flat, only_parameters


class Offload:
    """Steps of an optimizer whose parameters, `weights.masters`, are in host memory."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: MasterWeights) -> None:
        self.optimizer = optimizer
        self.weights = weights
        if "TORCHELASTIC_RUN_ID" in os.environ and weights.copies[0].is_cuda:
            # torchrun sets OMP_NUM_THREADS=1, which is enough for processes that only launch kernels. Here the CPU
            # computes the step, so each process of this machine gets an equal share of the processors.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self.buckets = list(buckets(master.numel() for master in weights.masters))
        # double buffering: a copy fills or empties one buffer while the CPU works on the other
        self._gradients = [_Staging(), _Staging()]
        self._copies = [_Staging(), _Staging()]

    def step(self, multiplier: float) -> None:
        """One update from the gradients times `multiplier`; brings the network's copies up to date."""
        gradients, copies = self.weights.gradients, self.weights.copies
        bucket_members = [[i for i in bucket if gradients[i] is not None] for bucket in self.buckets]
        bucket_members = [members for members in bucket_members if members]
        for turn, members in enumerate(bucket_members):
            # the next bucket's gradients are downloaded while this bucket is updated; the first bucket's right away
            if turn == 0:
                self._download(members, 0)
            if turn + 1 < len(bucket_members):
                self._download(bucket_members[turn + 1], turn + 1)
            downloaded, uploaded = self._gradients[turn % 2], self._copies[turn % 2]
            # wait for this bucket's gradients, and for the upload that used the same buffer two turns ago
            downloaded.synchronize()
            uploaded.synchronize()
            uploaded.views = uploaded.reserve([copies[i] for i in members])
            self._update(members, downloaded.views, uploaded.views, multiplier)
            uploaded.start_copy([flat(copies[i]) for i in members], uploaded.views)
        for staging in self._copies:
            staging.block_current_stream()

    def _download(self, members: Sequence[int], turn: int) -> None:
        staging = self._gradients[turn % 2]
        gradients = self.weights.gradients
        found = [flat(gradients[i], like=self.weights.masters[i]) for i in members]  # type: ignore[arg-type]
        staging.views = staging.reserve(found)
        staging.start_copy(staging.views, found)

    def _update(self, members: Sequence[int], gradients: list[Tensor], out: list[Tensor], multiplier: float) -> None:
        """Updates one bucket's fp32 weights from its gradients, and writes half-precision copies of them to `out`."""
        masters = [self.weights.masters[i] for i in members]
        stored = [master.data for master in masters]
        for master, data in zip(masters, stored, strict=True):
            # a view, because gradients and `out` are flat too, in the order of the masters' memory
            master.data = flat(data)
        with only_parameters(self.optimizer, masters):
            if isinstance(self.optimizer, HostAdamW8bit):
                # a single pass over memory reads the half-precision gradients, scales them and writes the copies
                self.optimizer.step_with(gradients, out, multiplier)
            else:
                for master, gradient in zip(masters, gradients, strict=True):
                    master.grad = gradient.float() * multiplier
                self.optimizer.step()
                torch._foreach_copy_(out, [master.data for master in masters])
        for master, data in zip(masters, stored, strict=True):
            master.data, master.grad = data, None


class _Staging:
    """A pinned host buffer for one bucket, and the copy between this buffer and the device that is in progress.

    Only copies from and to pinned (page-locked) memory run asynchronously to the host and to other streams.
    """

    def __init__(self) -> None:
        # the parts of the buffer for the bucket's tensors
        self.views: list[Tensor] = []
        self._buffer = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def reserve(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns parts of the buffer with as many elements as the tensors. The buffer's content becomes invalid."""
        sizes = [tensor.numel() for tensor in tensors]
        if self._buffer.dtype != tensors[0].dtype or self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=tensors[0].is_cuda)
        return list(self._buffer[: sum(sizes)].split(sizes))

    def start_copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Starts copying in a separate stream, after all work that the device's current stream has queued so far."""
        device = next((t.device for t in (*targets, *sources) if t.is_cuda), None)
        if device is None:
            torch._foreach_copy_(list(targets), list(sources))
            return
        if self._stream is None:
            self._stream, self._copied = torch.cuda.Stream(device), torch.cuda.Event()
        assert self._copied is not None
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                for tensor in (target, source):
                    if tensor.is_cuda:
                        # Otherwise PyTorch's allocator may reuse the memory as soon as no Python object refers to the
                        # tensor, while this stream is still copying.
                        tensor.record_stream(self._stream)
        self._copied.record(self._stream)

    def synchronize(self) -> None:
        """Makes the host wait until the copy is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def block_current_stream(self) -> None:
        """Makes the device's current stream wait until the copy is done; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
