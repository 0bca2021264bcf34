"""Frozen networks that wait in host memory until they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def awake(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The network's tensors are on `device`, and afterwards where they were: nothing is copied back."""
    device = torch.device(device)
    tensors = [*network.parameters(), *network.buffers()]
    homes = [tensor.data for tensor in tensors]
    if all(home.device.type == device.type for home in homes):
        yield
        return
    for tensor, home in zip(tensors, homes, strict=True):
        tensor.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def sleep(network: nn.Module, dtype: torch.dtype) -> None:
    """Puts the network's tensors into host memory that a GPU reads at full speed."""
    network.to("cpu", dtype=dtype)
    if torch.cuda.is_available():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.data = tensor.data.pin_memory()
