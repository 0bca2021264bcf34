"""GEGLU with the exact GELU, and a bias that its projection has not added: a launch forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ddpo_fast_kernels.launch import counters_of, share_of, sum_parts, tickets

# elements of a tile in each half of the input: two 16-byte loads of half precision for each of 128 threads
TILE = 2048
# programs of the backward pass: eight of 4 warps for each of the 132 multiprocessors of an H100
PROGRAMS = 1056
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _load(x_ptr, bias_ptr, row, column, rows, inner):
    """Loads the tile of these rows and columns: a, g, Phi(g) = (1 + erf(g / sqrt(2))) / 2, its offsets, and the mask.

    The offsets are those in x and in y.
    """
    # int64: rows * columns may exceed what an int32 counts
    row = row.to(tl.int64)[:, None]
    real = column < inner
    mask = (row < rows) & real[None, :]
    wide = row * (2 * inner) + column[None, :]
    a = tl.load(x_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + wide + inner, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)[None, :]
        g += tl.load(bias_ptr + inner + column, mask=real, other=0.0).to(tl.float32)[None, :]
    return a, g, 0.5 + 0.5 * tl.erf(g * SQRT_HALF), wide, row * inner + column[None, :], mask


@triton.jit
def geglu_fwd_kernel(x_ptr, bias_ptr, y_ptr, rows, inner, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    a, g, phi, _, narrow, mask = _load(x_ptr, bias_ptr, row, column, rows, inner)
    tl.store(y_ptr + narrow, (a * g * phi).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def geglu_bwd_kernel(
    x_ptr,
    bias_ptr,
    grad_ptr,
    dx_ptr,
    parts_ptr,
    dbias_ptr,
    tickets,
    rows,
    inner,
    share,
    parts_share,
    counters,
    ONE_SHARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A program takes `share` rows, so that it can add up their gradients of the bias."""
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(0) * share
    sum_a = tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    sum_g = tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    for start in range(first, first + share, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        a, g, phi, wide, narrow, mask = _load(x_ptr, bias_ptr, row, column, rows, inner)
        grad = tl.load(grad_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
        # gelu(g) = g Phi(g), so its derivative is Phi(g) + g phi(g) with the normal density phi
        slope = phi + g * (tl.exp(-0.5 * g * g) * INVERSE_SQRT_2PI)
        da, dg = grad * g * phi, grad * a * slope
        tl.store(dx_ptr + wide, da.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + wide + inner, dg.to(dx_ptr.dtype.element_ty), mask=mask)
        if parts_ptr is not None:
            sum_a += tl.where(mask, da, 0.0)
            sum_g += tl.where(mask, dg, 0.0)
    if parts_ptr is not None:
        at = parts_ptr + tl.program_id(0) * (2 * inner) + column
        tl.store(at, tl.sum(sum_a, axis=0), mask=column < inner)
        tl.store(at + inner, tl.sum(sum_g, axis=0), mask=column < inner)
        sum_parts(
            parts_ptr,
            dbias_ptr,
            tickets + tl.program_id(1) * counters,
            tl.program_id(0),
            tl.num_programs(0),
            parts_share,
            2 * inner,
            inner,
            inner,
            column,
            column < inner,
            2,
            ONE_SHARE,
            BLOCK_R,
            BLOCK_I,
        )


def geglu(x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Fills `y` [..., I] from `x` [..., 2I], both contiguous and not empty, and `bias` [2I]."""
    inner = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    (row_tiles, column_tiles), tile = _tiling(rows, inner)
    with torch.cuda.device_of(x):
        geglu_fwd_kernel[row_tiles, column_tiles](x, _dense(bias), y, rows, inner, **tile, num_warps=4)


def geglu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, dx: torch.Tensor, dbias: torch.Tensor | None
) -> None:
    """Fills `dx` [..., 2I] from `grad` [..., I] and `x` [..., 2I], all contiguous and not empty, and `bias` [2I].

    `dbias` [2I], if given, gets the sum of all rows of dx.
    """
    inner = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    (row_tiles, column_tiles), tile = _tiling(rows, inner)
    tiles = triton.cdiv(row_tiles, max(1, PROGRAMS // column_tiles))
    parts = triton.cdiv(row_tiles, tiles)
    counters = counters_of(parts)
    of_parts = counting = None
    if dbias is not None:
        of_parts = torch.empty((parts, 2 * inner), dtype=torch.float32, device=x.device)
        counting = tickets(x.device, column_tiles * counters)
    with torch.cuda.device_of(x):
        geglu_bwd_kernel[parts, column_tiles](
            x,
            _dense(bias),
            grad,
            dx,
            of_parts,
            dbias,
            counting,
            rows,
            inner,
            tiles * tile["BLOCK_R"],
            share_of(parts),
            counters,
            ONE_SHARE=share_of(parts) == parts,
            **tile,
            num_warps=4,
        )


def _dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def _tiling(rows: int, inner: int) -> tuple[tuple[int, int], dict[str, int]]:
    # 256 divides the widths of Stable Diffusion's GEGLUs (1280, 2560, 5120), so that no lane is masked
    block_i = min(triton.next_power_of_2(inner), 256)
    block_r = TILE // block_i
    return (triton.cdiv(rows, block_r), triton.cdiv(inner, block_i)), {"BLOCK_R": block_r, "BLOCK_I": block_i}


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) for SD 1.5's first transformer block with 24 images."""
    _, tile = _tiling(24 * 4096, 1280)
    sizes = {"rows": "i32", "inner": "i32"}
    for dtype in ("fp16", "bf16", "fp32"):
        x = f"*{dtype}"
        kinds = [(", trained bias", True, True), (", bias", True, False), ("", False, False)]
        for kind, biased, trained in kinds if dtype == "fp16" else kinds[:2]:
            absent = {} if biased else {"bias_ptr": None}
            inputs = {"x_ptr": x, "bias_ptr": x if biased else "constexpr"}
            constants = dict.fromkeys(tile, "constexpr")
            if not trained:
                signature = {**inputs, "y_ptr": x, **sizes, **constants}
                yield f"fwd {dtype}{kind}", geglu_fwd_kernel, signature, {**absent, **tile}, 4
            types = {"parts_ptr": "*fp32", "dbias_ptr": x, "tickets": "*i32"}
            sums = types if trained else dict.fromkeys(types, "constexpr")
            last = dict.fromkeys(("share", "parts_share", "counters"), "i32")
            given = {**absent, **({} if trained else dict.fromkeys(types)), **tile, "ONE_SHARE": False}
            signature = {**inputs, "grad_ptr": x, "dx_ptr": x, **sums, **sizes, **last}
            signature |= {**constants, "ONE_SHARE": "constexpr"}
            yield f"bwd {dtype}{kind}", geglu_bwd_kernel, signature, given, 4
