"""GEGLU with the exact GELU, forward and backward, in one launch each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

# elements of a tile in each half of the input: two 16-byte loads of half precision for each of 128 threads
TILE = 2048
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _load(x_ptr, rows, inner, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    """Loads the program's tile: a, g, Phi(g) = (1 + erf(g / sqrt(2))) / 2, offsets in x and in y, and the mask."""
    # int64: rows * columns may exceed what an int32 counts
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    mask = (row < rows) & (column < inner)
    wide = row * (2 * inner) + column
    a = tl.load(x_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + wide + inner, mask=mask, other=0.0).to(tl.float32)
    return a, g, 0.5 + 0.5 * tl.erf(g * SQRT_HALF), wide, row * inner + column, mask


@triton.jit
def geglu_fwd_kernel(x_ptr, y_ptr, rows, inner, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    a, g, phi, _, narrow, mask = _load(x_ptr, rows, inner, BLOCK_R, BLOCK_I)
    tl.store(y_ptr + narrow, (a * g * phi).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def geglu_bwd_kernel(x_ptr, grad_ptr, dx_ptr, rows, inner, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    a, g, phi, wide, narrow, mask = _load(x_ptr, rows, inner, BLOCK_R, BLOCK_I)
    grad = tl.load(grad_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
    # gelu(g) = g Phi(g), so its derivative is Phi(g) + g phi(g) with the normal density phi
    slope = phi + g * (tl.exp(-0.5 * g * g) * INVERSE_SQRT_2PI)
    tl.store(dx_ptr + wide, (grad * g * phi).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + wide + inner, (grad * a * slope).to(dx_ptr.dtype.element_ty), mask=mask)


def geglu(x: torch.Tensor, y: torch.Tensor) -> None:
    """Fills `y` [..., I] from `x` [..., 2I], both contiguous and not empty."""
    _launch(geglu_fwd_kernel, x, y)


def geglu_backward(grad: torch.Tensor, x: torch.Tensor, dx: torch.Tensor) -> None:
    """Fills `dx` [..., 2I] from `grad` [..., I] and `x` [..., 2I], all contiguous and not empty."""
    _launch(geglu_bwd_kernel, x, grad, dx)


def _launch(kernel: Any, x: torch.Tensor, *others: torch.Tensor) -> None:
    inner = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    grid, tile = _tiling(rows, inner)
    with torch.cuda.device_of(x):
        kernel[grid](x, *others, rows, inner, **tile, num_warps=4)


def _tiling(rows: int, inner: int) -> tuple[tuple[int, int], dict[str, int]]:
    # 256 divides the widths of Stable Diffusion's GEGLUs (1280, 2560, 5120), so that no lane is masked
    block_i = min(triton.next_power_of_2(inner), 256)
    block_r = TILE // block_i
    return (triton.cdiv(rows, block_r), triton.cdiv(inner, block_i)), {"BLOCK_R": block_r, "BLOCK_I": block_i}


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) for SD 1.5's first transformer block with 24 images."""
    _, tile = _tiling(24 * 4096, 1280)
    sizes = {"rows": "i32", "inner": "i32", **dict.fromkeys(tile, "constexpr")}
    for dtype in ("fp16", "bf16", "fp32"):
        x = f"*{dtype}"
        yield f"fwd {dtype}", geglu_fwd_kernel, {"x_ptr": x, "y_ptr": x, **sizes}, tile, 4
        yield f"bwd {dtype}", geglu_bwd_kernel, {"x_ptr": x, "grad_ptr": x, "dx_ptr": x, **sizes}, tile, 4
