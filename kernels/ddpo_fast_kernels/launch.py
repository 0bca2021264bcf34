"""Helpers of the launchers: layout, tiles, sums over programs, and the counter that finds the last program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# parts that one program may add up; with more, the others would wait for it
MOST_IN_ONE_SHARE = 64
# as many as the launches of Stable Diffusion's UNets need at once
FEWEST_TICKETS = 4096
# by device and stream
_TICKETS: dict[tuple[torch.device, int], torch.Tensor] = {}
# those of CUDA graphs, which know their addresses only
_CAPTURED: list[torch.Tensor] = []


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


def tickets(device: torch.device, count: int = 1) -> torch.Tensor:
    """Counters [at least `count`] that are 0 before and after every launch of the current stream; kernels reset them.

    Launches on one stream run one after the other and can share counters. A CUDA graph keeps those of the stream that
    it is captured on, and the next launch there outside of a capture gets others: the graph may be replayed on another
    stream, at the same time as other launches. They are made before the capture, which would record a launch that
    fills them; PyTorch requires that a function runs once on the stream before.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _TICKETS.get(key)
    large_enough = counters is not None and len(counters) >= count
    if torch.cuda.is_current_stream_capturing():
        if counters is None or not large_enough:
            return torch.zeros(count, dtype=torch.int32, device=device)
        if not any(counters is kept for kept in _CAPTURED):
            _CAPTURED.append(counters)
        return counters
    if counters is None or not large_enough or any(counters is kept for kept in _CAPTURED):
        # launches that still use a smaller tensor run before any that gets its memory, as they are on this stream
        counters = _TICKETS[key] = torch.zeros(max(count, FEWEST_TICKETS), dtype=torch.int32, device=device)
    return counters


@triton.jit
def is_last(ticket, count):
    """Whether this program is the last of `count` programs to arrive here.

    Programs of a launch run in no particular order and cannot wait for each other. Each program increments the counter
    after it has stored its results, so the program that brings the counter to `count` knows that all results are
    stored. The acquire-release semantics of the increment make the other programs' stores visible to it.
    """
    # one thread increments the counter, but all threads store results
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _sum_rows(from_ptr, to_ptr, rows, step, column, real, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the sum of `rows` rows, of which each is `step` after the one before it; always in the same order."""
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        offset = row.to(tl.int64)[:, None] * step + column[None, :]
        total += tl.load(from_ptr + offset, mask=(row < rows)[:, None] & real[None, :], other=0.0)
    tl.store(to_ptr + column, tl.sum(total, axis=0).to(to_ptr.dtype.element_ty), mask=real)


@triton.jit
def sum_parts(
    parts_ptr,
    sums_ptr,
    tickets,
    part,
    parts,
    share,
    part_step,
    vector_step,
    sum_step,
    column,
    real,
    VECTORS: tl.constexpr,
    ONE_SHARE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds up what programs have stored for these columns of some vectors, in the launch that stored it.

    A program calls this after it has stored row `part`, of `parts`, of each vector, in fp32. The last of each `share`
    programs adds up their rows, and the last of those adds up these sums: about 2 sqrt(parts) rows one after the other,
    and not `parts`, while the other multiprocessors may have nothing left to do. All sums have a fixed order; atomic
    additions would not be reproducible.

    Args:
        tickets: counters that only these programs use, `counters_of(parts)` of them.
        part_step, vector_step, sum_step: from a part's row to the next, and from a vector to the next of the parts and
            of the sums.
    """
    group = part // share
    first = group * share
    if is_last(tickets + group, tl.minimum(share, parts - first)):
        if ONE_SHARE:
            for vector in tl.static_range(VECTORS):
                at, to = parts_ptr + vector * vector_step, sums_ptr + vector * sum_step
                _sum_rows(at, to, parts, part_step, column, real, BLOCK_P, BLOCK_D)
        else:
            members = tl.minimum(share, parts - first)
            for vector in tl.static_range(VECTORS):
                # the sum replaces the first row, which nothing reads any more
                at = parts_ptr + vector * vector_step + first * part_step
                _sum_rows(at, at, members, part_step, column, real, BLOCK_P, BLOCK_D)
            groups = tl.cdiv(parts, share)
            if is_last(tickets + groups, groups):
                for vector in tl.static_range(VECTORS):
                    at, to = parts_ptr + vector * vector_step, sums_ptr + vector * sum_step
                    _sum_rows(at, to, groups, share * part_step, column, real, BLOCK_P, BLOCK_D)


def share_of(parts: int) -> int:
    """The `share` of `sum_parts`: all parts if they are few, else that with the fewest rows to add up."""
    return parts if parts <= MOST_IN_ONE_SHARE else round(parts**0.5)


def counters_of(parts: int) -> int:
    """How many counters `sum_parts` needs: one for each share, and one for the shares."""
    return triton.cdiv(parts, share_of(parts)) + 1
