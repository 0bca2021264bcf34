"""LayerNorm of a sum, forward and backward in one launch each. A program takes whole rows of one image.

The sum is `s = residual + gate * (x + added)`. Pointers to operands that are absent are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

# elements that a program takes at a time: a 16-byte load of half precision for each of 256 threads. The backward pass
# keeps up to four sums for each element in registers.
TILE = 2048
# programs of the backward pass: four of 8 warps for each of the 132 multiprocessors of an H100
PROGRAMS = 528


@triton.jit
def _vector(ptr, start, column, real, absent: tl.constexpr):
    """The values of an operand for each column, [1, BLOCK_D], or a constant without it."""
    if ptr is None:
        return absent
    else:  # noqa: RET505  # Triton compiles what follows a `return` that is taken
        return tl.load(ptr + start + column, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_layernorm_fwd_kernel(
    x_ptr,
    residual_ptr,
    added_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    s_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    scale_step,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(1)
    # int64: a batch may hold more elements than an int32 counts
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    real = column < width
    mask = (row < rows)[:, None] & real[None, :]
    offset = (image * rows + row)[:, None] * width + column[None, :]

    s = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s = (s + _vector(added_ptr, 0, column, real, 0.0)) * _vector(gate_ptr, image * width, column, real, 1.0)
        s += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offset, rounded, mask=mask)
        # the backward pass reads the rounded sum
        s = rounded.to(tl.float32)

    mean = tl.sum(s, axis=1) / width
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(mean_ptr + image * rows + row, mean, mask=row < rows)
    tl.store(rstd_ptr + image * rows + row, rstd, mask=row < rows)
    y = centred * rstd[:, None] * _vector(scale_ptr, image * scale_step, column, real, 1.0)
    y += _vector(shift_ptr, image * scale_step, column, real, 0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


# In one piece, as all of it works on the values of one tile, and a quarter of the lines are arguments.
@triton.jit
def add_layernorm_bwd_kernel(
    grad_ptr,
    skip_ptr,
    s_ptr,
    x_ptr,
    added_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    ds_ptr,
    dx_ptr,
    dscale_ptr,
    dadded_ptr,
    dgate_ptr,
    rows,
    width,
    scale_step,
    share,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes `share` rows of an image, so that it can add up their gradients of the vectors."""
    image = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    real = column < width
    scale = _vector(scale_ptr, image * scale_step, column, real, 1.0)
    gate = _vector(gate_ptr, image * width, column, real, 1.0)
    dscale = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dadded = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dgate = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = tl.program_id(0) * share
    for start in range(first, first + share, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (row < rows)[:, None] & real[None, :]
        offset = (image * rows + row)[:, None] * width + column[None, :]
        mean = tl.load(mean_ptr + image * rows + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + image * rows + row, mask=row < rows, other=0.0)
        s = tl.load(s_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        # Let h = grad * scale be the gradient with respect to xhat. xhat does not change if a constant is added to s or
        # s is scaled (up to eps), so ds has no component along the constant vector or along xhat:
        # ds = rstd * (h - mean(h) - xhat * mean(h * xhat)), and what the sum's other uses give.
        h = grad * scale
        along_one = tl.sum(h, axis=1) / width
        along_x = tl.sum(h * xhat, axis=1) / width
        ds = (h - along_one[:, None] - xhat * along_x[:, None]) * rstd[:, None]
        if skip_ptr is not None:
            ds += tl.load(skip_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + offset, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if dscale_ptr is not None:
            dscale += grad * xhat
            dshift += grad
        if gate_ptr is not None:
            dx = ds * gate
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dgate_ptr is not None:
                x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                dgate += tl.where(mask, ds * (x + _vector(added_ptr, 0, column, real, 0.0)), 0.0)
        else:
            dx = ds
        if dadded_ptr is not None:
            dadded += tl.where(mask, dx, 0.0)
    part = image * tl.num_programs(0) + tl.program_id(0)
    at = part * width + column
    if dscale_ptr is not None:
        tl.store(dscale_ptr + at, tl.sum(dscale, axis=0), mask=real)
        tl.store(dscale_ptr + tl.num_programs(1) * tl.num_programs(0) * width + at, tl.sum(dshift, axis=0), mask=real)
    if dadded_ptr is not None:
        tl.store(dadded_ptr + at, tl.sum(dadded, axis=0), mask=real)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + at, tl.sum(dgate, axis=0), mask=real)


def add_layernorm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    added: torch.Tensor | None,
    gate: torch.Tensor | None,
    s: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills `y`, the fp32 `mean` and `rstd` of each row, and with a residual `s`; all are dense and not empty.

    `x`, `residual`, `s` and `y` are [N, ..., D]; `scale` and `shift` [D] or [N, D], `added` [D], `gate` [N, D].
    """
    images, rows, width = _sizes(x, scale, gate)
    tile, warps = _tiling(width)
    with torch.cuda.device_of(x):
        add_layernorm_fwd_kernel[triton.cdiv(rows, tile["BLOCK_R"]), images](
            x,
            residual,
            added,
            gate,
            scale,
            shift,
            s,
            y,
            mean,
            rstd,
            rows,
            width,
            width if scale.ndim == 2 else 0,
            eps,
            **tile,
            num_warps=warps,
        )


def add_layernorm_backward(
    grad: torch.Tensor,
    skip: torch.Tensor | None,
    s: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    added: torch.Tensor | None,
    gate: torch.Tensor | None,
    ds: torch.Tensor,
    dx: torch.Tensor | None,
    needs: Sequence[bool],
    as_one: bool = False,
) -> list[torch.Tensor | None]:
    """Fills `ds`, from the gradients of y and, if given, of s; with a gate also `dx`. All are dense and not empty.

    Returns the sums of parts of the rows, fp32, that `needs` asks for: of the gradients of scale and shift
    [2, N or 1, parts, D], of added and of gate [N or 1, parts, D]. The caller adds the parts up, in a fixed order. With
    `as_one`, those of scale, shift and added are one tensor [3, 1, parts, D], whose last part is the second result.
    """
    images, rows, width = _sizes(s, scale, gate)
    tile, warps = _tiling(width)
    blocks = triton.cdiv(rows, tile["BLOCK_R"])
    each = triton.cdiv(blocks, max(1, PROGRAMS // images))
    parts = triton.cdiv(blocks, each)
    shapes = ((2, images, parts, width), (images, parts, width), (images, parts, width))
    sums = [
        torch.empty(shape, dtype=torch.float32, device=s.device) if needed else None
        for shape, needed in zip(shapes, [needs[0] and not as_one, needs[1] and not as_one, needs[2]], strict=True)
    ]
    if as_one:
        whole = torch.empty((3, *shapes[1]), dtype=torch.float32, device=s.device)
        sums[:2] = whole, whole[2]
    with torch.cuda.device_of(s):
        add_layernorm_bwd_kernel[parts, images](
            grad,
            skip,
            s,
            x,
            added,
            gate,
            scale,
            mean,
            rstd,
            ds,
            dx,
            *sums,
            rows,
            width,
            width if scale.ndim == 2 else 0,
            each * tile["BLOCK_R"],
            **tile,
            num_warps=warps,
        )
    return sums


def _sizes(x: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor | None) -> tuple[int, int, int]:
    """Images, rows of an image, and width; one image of all rows if no operand differs between images."""
    width = x.shape[-1]
    images = x.shape[0] if scale.ndim == 2 or gate is not None else 1
    return images, x.numel() // (images * width), width


def _tiling(width: int) -> tuple[dict[str, int], int]:
    block_d = triton.next_power_of_2(width)
    block_r = max(1, TILE // block_d)
    return {"BLOCK_R": block_r, "BLOCK_D": block_d}, min(16, max(1, block_r * block_d // 256))


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) for the widths of SD 1.5, SD 3.5 and FLUX.1.

    Stable Diffusion 1.5 sums with biases, the transformers with gates.
    """
    cases = [("fp16", 320, kind) for kind in ("norm", "sum", "frozen sum")]
    cases += [("bf16", 320, "sum"), ("fp32", 320, "sum"), ("fp16", 640, "sum"), ("fp16", 1280, "sum")]
    cases += [("fp16", 1536, "gated sum"), ("bf16", 3072, "gated sum"), ("fp32", 3072, "gated sum")]
    for case in cases:
        yield _case("fwd", *case)
        yield _case("bwd", *case)


def _case(direction: str, dtype: str, width: int, kind: str) -> tuple[str, Any, dict[str, Any], dict[str, Any], int]:
    given = {"norm": "", "sum": "residual added s dadded", "frozen sum": "residual s"}
    given["gated sum"] = "residual gate s dx dgate"
    if direction == "fwd":
        kernel, names = add_layernorm_fwd_kernel, "x residual added gate scale shift s y mean rstd"
        present, last = "x scale shift y mean rstd " + given[kind], {"eps": "fp32"}
    else:
        kernel, names = add_layernorm_bwd_kernel, "grad skip s x added gate scale mean rstd ds dx dscale dadded dgate"
        present, last = "grad skip s scale mean rstd ds " + given[kind], {"share": "i32"}
        # of a gated sum the vectors' gradients; of others those of weights, if they are trained
        present += " x dscale" if kind == "gated sum" else " dscale" if kind != "frozen sum" else ""
    wide = {"mean", "rstd", "dscale", "dadded", "dgate"}
    absent = [name for name in names.split() if name not in present.split()]
    pointers = {f"{name}_ptr": "*fp32" if name in wide else f"*{dtype}" for name in names.split()}
    pointers |= {f"{name}_ptr": "constexpr" for name in absent}
    tile, warps = _tiling(width)
    sizes = {"rows": "i32", "width": "i32", "scale_step": "i32", **last, **dict.fromkeys(tile, "constexpr")}
    constants = {**{f"{name}_ptr": None for name in absent}, **tile}
    return f"{direction} {dtype} {width} wide, {kind}", kernel, {**pointers, **sizes}, constants, warps
