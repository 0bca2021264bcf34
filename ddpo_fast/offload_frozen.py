"""Keeps frozen networks in host memory and brings them to the device only while they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddpo_fast.temporary_values import temporary_values


def offload(network: nn.Module, dtype: torch.dtype) -> None:
    """Moves the network's parameters and buffers to host memory, in `dtype`, pinned if there is a GPU."""
    network.to("cpu", dtype=dtype)
    if torch.cuda.is_available():
        for tensor in [*network.parameters(), *network.buffers()]:
            # only from page-locked memory can CUDA copy at the bus's full speed, and without stopping the host
            tensor.data = tensor.data.pin_memory()


@contextmanager
def on_device(networks: nn.Module | Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Inside, the networks' parameters and buffers are on `device`; afterwards they are where they were before.

    The copies on the device are dropped and not copied back, as a frozen network has not changed them. Does nothing for
    networks that are on such a device already.
    """
    device = torch.device(device)
    each = [networks] if isinstance(networks, nn.Module) else networks
    tensors = [tensor for network in each for tensor in (*network.parameters(), *network.buffers())]
    if all(tensor.device.type == device.type for tensor in tensors):
        yield
        return
    # the copies are queued on the current stream, where the network's kernels are queued behind them
    copies = [tensor.data.to(device, non_blocking=True) for tensor in tensors]
    with temporary_values(tensors, copies):
        yield
