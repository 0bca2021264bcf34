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


def leave_as_loaded(network: nn.Module, dtype: torch.dtype) -> None:
    """Leaves the network's weights where and as they were loaded; `on_device` computes with copies in `dtype`.

    Weights that are mapped from a file then take no memory while the network is idle.
    """
    # read by `on_device`, which the callers know nothing else of
    network.computes_in = dtype  # type: ignore[assignment]


@contextmanager
def on_device(networks: nn.Module | Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Inside, the networks' parameters and buffers are on `device`; afterwards they are where they were before.

    The copies on the device are dropped and not copied back, as a frozen network has not changed them. Does nothing for
    networks that are on such a device already, in the precision that `leave_as_loaded` was given.
    """
    device = torch.device(device)
    tensors, dtypes = [], []
    for network in [networks] if isinstance(networks, nn.Module) else networks:
        dtype = getattr(network, "computes_in", None)
        for tensor in (*network.parameters(), *network.buffers()):
            tensors.append(tensor)
            dtypes.append(dtype if dtype and tensor.is_floating_point() else tensor.dtype)
    if all((t.device.type, t.dtype) == (device.type, wanted) for t, wanted in zip(tensors, dtypes, strict=True)):
        yield
        return
    # the copies are queued on the current stream, where the network's kernels are queued behind them
    copies = [t.data.to(device, wanted, non_blocking=True) for t, wanted in zip(tensors, dtypes, strict=True)]
    with temporary_values(tensors, copies):
        yield
