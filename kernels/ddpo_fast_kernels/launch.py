"""Helpers of the launchers: layout, tiles, sums over programs, and the counter that finds the last program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# by device and stream
_TICKETS: dict[tuple[torch.device, int], torch.Tensor] = {}


def row_layout(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns (C, pixels) for channels_last rows and (0, 0) for contiguous ones.

    Kernels take both as compile-time constants, because the offset of a channels_last element needs a division by the
    number of pixels, and a division by a constant is cheaper.
    """
    if tensor.is_contiguous():
        return 0, 0
    assert tensor.is_contiguous(memory_format=torch.channels_last), "rows must be dense"
    return tensor.shape[1], tensor.shape[2] * tensor.shape[3]


def block_and_warps(elements: int) -> tuple[int, int]:
    """The number of elements that a program takes at a time, and its number of warps, for images of `elements`.

    One program computes a whole image, so that the sum over the image needs no second launch and has a fixed order. The
    grid then has only as many programs as the batch has images, so each program must hide the latency of memory itself:
    large tiles keep many loads in flight. A latent of Stable Diffusion has 16,384 elements, which are four tiles.
    """
    block = min(triton.next_power_of_2(max(elements, 16)), 4096)
    return block, max(4, block // 256)


@triton.jit
def sum_parts_kernel(parts_ptr, sum_ptr, parts, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = column < width
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        offset = (tl.program_id(1) * parts + part)[:, None] * width + column[None, :]
        total += tl.load(parts_ptr + offset, mask=(part < parts)[:, None] & real[None, :], other=0.0)
    summed = tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + tl.program_id(1) * width + column, summed, mask=real)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums [K, D] in `dtype` of what programs have added up, [K, P, D] fp32, dense, with P > 0.

    PyTorch's sum would need a second launch for the cast.
    """
    sums = torch.empty((parts.shape[0], parts.shape[2]), dtype=dtype, device=parts.device)
    grid = (triton.cdiv(parts.shape[2], 32), parts.shape[0])
    with torch.cuda.device_of(parts):
        sum_parts_kernel[grid](parts, sums, parts.shape[1], parts.shape[2], BLOCK_P=64, BLOCK_D=32, num_warps=4)
    return sums


def ticket(device: torch.device) -> torch.Tensor:
    """A counter [1] that is 0 before and after every launch of the current stream; kernels reset it themselves.

    Launches on one stream run one after the other and can share a counter. A CUDA graph gets a counter of its own,
    because it may be replayed on another stream than it was captured on, at the same time as other launches.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _TICKETS:
        _TICKETS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _TICKETS[key]


@triton.jit
def is_last(ticket):
    """Whether this program is the last of its launch to arrive here.

    Programs of a launch run in no particular order and cannot wait for each other. Each program increments the counter
    after it has stored its results, so the program that brings the counter to the number of programs knows that all
    results are stored. The acquire-release semantics of the increment make the other programs' stores visible to it.
    """
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last
