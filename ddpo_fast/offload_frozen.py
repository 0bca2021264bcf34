"""Keeps frozen networks in host memory and brings them to the device only while they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddpo_fast.temporary_values import temporary_values


def offload(network: nn.Module, dtype: torch.dtype) -> None:
    """Moves the network's parameters and buffers to host memory, in `dtype`, pinned if there is a GPU."""
    network.to("cpu", dtype=dtype)
    if torch.cuda.is_available():
        for tensor in _tensors(network):
            # only from page-locked memory can CUDA copy at the bus's full speed, and without stopping the host
            tensor.data = tensor.data.pin_memory()


def leave_as_loaded(network: nn.Module, dtype: torch.dtype) -> None:
    """Leaves the network's weights where and as they were loaded; `on_device` computes with copies in `dtype`.

    Weights that are mapped from a file then take no memory while the network is idle.
    """
    # read by `on_device`, which the callers know nothing else of
    network.computes_in = dtype  # type: ignore[assignment]


@contextmanager
def on_device(
    networks: nn.Module | Iterable[nn.Module], device: torch.device | str, by_blocks: bool = False
) -> Iterator[None]:
    """Inside, the networks' parameters and buffers are on `device`; afterwards they are where they were before.

    The copies on the device are dropped and not copied back, as a frozen network has not changed them. Does nothing for
    networks that are on such a device already, in the precision that `leave_as_loaded` was given.

    Args:
        by_blocks: whether those of `blocks_of` are there only while the block computes, which copies them for each of
            its calls.
    """
    device = torch.device(device)
    with ExitStack() as stack:
        for network in [networks] if isinstance(networks, nn.Module) else networks:
            dtype = getattr(network, "computes_in", None)
            if _is_there(_tensors(network), device, dtype):
                continue
            blocks = blocks_of(network) if by_blocks else []
            for block in blocks:
                stack.enter_context(_on_device_in_calls(block, device, dtype))
            stack.enter_context(_copied(_outside(network, blocks), device, dtype))
        yield


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of a network's lists of modules, without those within a member."""
    found: list[nn.Module] = []
    for child in network.children():
        found += child if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def bytes_by_blocks(networks: Iterable[nn.Module]) -> int:
    """The most bytes that `on_device` has there at a time, `by_blocks`, of networks that compute in their own types."""
    outside, largest = 0, 0
    for network in networks:
        blocks = blocks_of(network)
        outside += sum(tensor.nbytes for tensor in _outside(network, blocks))
        largest = max([largest, *(sum(tensor.nbytes for tensor in _tensors(block)) for block in blocks)])
    return outside + largest


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _outside(network: nn.Module, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of the network's modules that are not in `blocks`, each once."""
    inside = {module for block in blocks for module in block.modules()}
    found = [module for module in network.modules() if module not in inside]
    tensors = [t for module in found for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return list({id(tensor): tensor for tensor in tensors}.values())


def _wanted(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[torch.dtype]:
    """What each tensor computes in: `dtype`, unless that is None or the tensor has no floating-point numbers."""
    return [dtype if dtype and tensor.is_floating_point() else tensor.dtype for tensor in tensors]


def _is_there(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None) -> bool:
    wanted = zip(tensors, _wanted(tensors, dtype), strict=True)
    return all((tensor.device.type, tensor.dtype) == (device.type, own) for tensor, own in wanted)


@contextmanager
def _copied(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the tensors are on the device, and in `dtype`."""
    # the copies are queued on the current stream, where the network's kernels are queued behind them
    wanted = zip(tensors, _wanted(tensors, dtype), strict=True)
    copies = [tensor.data.to(device, own, non_blocking=True) for tensor, own in wanted]
    with temporary_values(tensors, copies):
        yield


@contextmanager
def _on_device_in_calls(block: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, each call of `block` finds its weights on the device."""
    call = ExitStack()

    def begin(*_: Any) -> None:
        call.enter_context(_copied(_tensors(block), device, dtype))

    def end(*_: Any) -> None:
        call.close()

    hooks = block.register_forward_pre_hook(begin), block.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
