"""What launchers share: how a tensor's rows lie in memory, and the ticket that the last program of a launch draws."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TICKETS: dict[tuple[torch.device, int], torch.Tensor] = {}


def row_layout(tensor: torch.Tensor) -> tuple[int, int]:
    """(C, pixels) of channels_last rows, (0, 0) of contiguous ones. Compile-time constants, as indexing divides."""
    if tensor.is_contiguous():
        return 0, 0
    assert tensor.is_contiguous(memory_format=torch.channels_last), "rows must be dense"
    return tensor.shape[1], tensor.shape[2] * tensor.shape[3]


def block_and_warps(elements: int) -> tuple[int, int]:
    """Elements of an image that a program takes at a time, and its warps.

    One program owns an image, so the grid is small: an image of Stable Diffusion has 16,384 elements, and more of it
    in flight hides the latency that more programs would.
    """
    block = min(triton.next_power_of_2(max(elements, 16)), 4096)
    return block, max(4, block // 256)


def ticket(device: torch.device) -> torch.Tensor:
    """A counter [1] that is 0 before and after every launch of its stream; kernels set it back themselves.

    A graph gets counters of its own: it may run on another stream than it was captured on.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _TICKETS:
        _TICKETS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _TICKETS[key]


@triton.jit
def is_last(ticket):
    """Whether all other programs of the launch have drawn their tickets before; what they stored can then be read."""
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last
