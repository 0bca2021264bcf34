"""LayerNorm of a sum, forward and backward in one launch each. A program takes whole rows of one image.

The sum is `s = residual + gate * (x + added + low up^T)`. Pointers to operands that are absent are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ddpo_fast_kernels.launch import counters_of, share_of, sum_parts, tickets

# elements that a program takes at a time: a 16-byte load of half precision for each of 256 threads. The backward pass
# keeps up to four sums for each element in registers.
TILE = 2048
# programs of the backward pass: four of 8 warps for each of the 132 multiprocessors of an H100
PROGRAMS = 528
# elements of the parts of a sum that a program takes at a time: with more, the kernels would need more registers
SUM_TILE = 4096


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
    low_ptr,
    up_ptr,
    scale_ptr,
    shift_ptr,
    later_ptr,
    s_ptr,
    copy_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    scale_step,
    eps,
    factor,
    RANK: tl.constexpr,
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
    if low_ptr is not None:
        at = (image * rows + row) * RANK
        for i in tl.static_range(RANK):
            low = factor * tl.load(low_ptr + at + i, mask=row < rows, other=0.0).to(tl.float32)
            s += low[:, None] * _vector(up_ptr, i, column * RANK, real, 0.0)
    if residual_ptr is not None:
        s = (s + _vector(added_ptr, 0, column, real, 0.0)) * _vector(gate_ptr, image * width, column, real, 1.0)
        s += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(x_ptr.dtype.element_ty)
        if s_ptr is not None:
            tl.store(s_ptr + offset, rounded, mask=mask)
        # the backward pass reads the rounded sum
        s = rounded.to(tl.float32)
    if copy_ptr is not None:
        copy = s + _vector(later_ptr, 0, column, real, 0.0)
        tl.store(copy_ptr + offset, copy.to(copy_ptr.dtype.element_ty), mask=mask)

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
    parts_ptr,
    sums_ptr,
    tickets,
    rows,
    width,
    scale_step,
    share,
    parts_share,
    counters,
    AFFINE: tl.constexpr,
    ADDED: tl.constexpr,
    GATE: tl.constexpr,
    LATER: tl.constexpr,
    ONE_SHARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program takes `share` rows of an image, so that it can add up their gradients of the vectors.

    AFFINE, ADDED, GATE, LATER: which vectors get a gradient: scale and shift, added, gate, and later, in this order.
    """
    image = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    real = column < width
    scale = _vector(scale_ptr, image * scale_step, column, real, 1.0)
    gate = _vector(gate_ptr, image * width, column, real, 1.0)
    dscale = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dadded = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dgate = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dlater = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
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
            skip = tl.load(skip_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            ds += skip
            if LATER:
                dlater += skip
        tl.store(ds_ptr + offset, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if AFFINE:
            dscale += grad * xhat
            dshift += grad
        if gate_ptr is not None:
            dx = ds * gate
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if GATE:
                x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                dgate += tl.where(mask, ds * (x + _vector(added_ptr, 0, column, real, 0.0)), 0.0)
        else:
            dx = ds
        if ADDED:
            dadded += tl.where(mask, dx, 0.0)
    if parts_ptr is not None:
        parts, images = tl.num_programs(0), tl.num_programs(1)
        vector_step = images * parts * width
        of_image = parts_ptr + image * parts * width
        at = of_image + tl.program_id(0) * width + column
        if AFFINE:
            tl.store(at, tl.sum(dscale, axis=0), mask=real)
            tl.store(at + vector_step, tl.sum(dshift, axis=0), mask=real)
        if ADDED:
            tl.store(at + 2 * AFFINE * vector_step, tl.sum(dadded, axis=0), mask=real)
        if GATE:
            tl.store(at + (2 * AFFINE + ADDED) * vector_step, tl.sum(dgate, axis=0), mask=real)
        if LATER:
            tl.store(at + (2 * AFFINE + ADDED + GATE) * vector_step, tl.sum(dlater, axis=0), mask=real)
        sum_parts(
            of_image,
            sums_ptr + image * width,
            tickets + image * counters,
            tl.program_id(0),
            parts,
            parts_share,
            width,
            vector_step,
            images * width,
            column,
            real,
            2 * AFFINE + ADDED + GATE + LATER,
            ONE_SHARE,
            BLOCK_P,
            BLOCK_D,
        )


def add_layernorm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    added: torch.Tensor | None,
    gate: torch.Tensor | None,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    factor: float,
    later: torch.Tensor | None,
    s: torch.Tensor | None,
    copy: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills `y`, the fp32 `mean` and `rstd` of each row, with a residual `s` if it is given, and with `later` `copy`.

    All are dense and not empty. `x`, `residual`, `s`, `copy` and `y` are [N, ..., D]; `scale` and `shift` [D] or
    [N, D], `added` and `later` [D], `gate` [N, D]. The product of `low` [N, ..., r] and `up` [D, r], times `factor`, is
    added to x if they are given.
    """
    images, rows, width = _sizes(x, scale, gate)
    tile, warps = _tiling(width)
    with torch.cuda.device_of(x):
        add_layernorm_fwd_kernel[triton.cdiv(rows, tile["BLOCK_R"]), images](
            x,
            residual,
            added,
            gate,
            low,
            up,
            scale,
            shift,
            later,
            s,
            copy,
            y,
            mean,
            rstd,
            rows,
            width,
            width if scale.ndim == 2 else 0,
            eps,
            factor,
            RANK=0 if up is None else up.shape[1],
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
    sums: torch.Tensor | None,
) -> None:
    """Fills `ds`, from the gradients of y and, if given, of s; with a gate also `dx`. All are dense and not empty.

    `sums` [V, N or 1, D] gets those gradients of vectors that `needs` asks for, for each image if any of the operands
    differs between images: of scale and shift, of added, of gate, and of later, the sum of `skip`.
    """
    images, rows, width = _sizes(s, scale, gate)
    tile, warps = _tiling(width)
    blocks = triton.cdiv(rows, tile["BLOCK_R"])
    each = triton.cdiv(blocks, max(1, PROGRAMS // images))
    parts = triton.cdiv(blocks, each)
    counters = counters_of(parts)
    of_parts = counting = None
    if sums is not None:
        of_parts = torch.empty((len(sums), images, parts, width), dtype=torch.float32, device=s.device)
        counting = tickets(s.device, images * counters)
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
            of_parts,
            sums,
            counting,
            rows,
            width,
            width if scale.ndim == 2 else 0,
            each * tile["BLOCK_R"],
            share_of(parts),
            counters,
            AFFINE=needs[0],
            ADDED=needs[1],
            GATE=needs[2],
            LATER=needs[3],
            ONE_SHARE=share_of(parts) == parts,
            BLOCK_P=max(1, SUM_TILE // tile["BLOCK_D"]),
            **tile,
            num_warps=warps,
        )


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
    cases = [("fp16", 320, kind) for kind in ("norm", "sum", "last sum", "frozen sum", "sampled sum")]
    cases += [("fp16", 1280, "last sum"), *(("fp16", width, "adapted sum") for width in (320, 640, 1280))]
    cases += [("bf16", 320, "sum"), ("fp32", 320, "sum"), ("fp16", 640, "sum"), ("fp16", 1280, "sum")]
    cases += [("fp16", 1536, "gated sum"), ("bf16", 3072, "gated sum"), ("fp32", 3072, "gated sum")]
    for case in cases:
        yield _case("fwd", *case)
        # that of a sum with an adapter is no other than without
        if case[-1] not in ("sampled sum", "adapted sum"):
            yield _case("bwd", *case)


def _case(direction: str, dtype: str, width: int, kind: str) -> tuple[str, Any, dict[str, Any], dict[str, Any], int]:
    given = {"norm": "", "sum": "residual added s", "frozen sum": "residual s", "gated sum": "residual gate s dx"}
    given |= {"last sum": "residual added later s copy", "sampled sum": "residual added later copy"}
    given["adapted sum"] = "residual added low up later s copy"
    tile, warps = _tiling(width)
    constants: dict[str, Any] = dict(tile)
    if direction == "fwd":
        kernel, names = add_layernorm_fwd_kernel, "x residual added gate low up scale shift later s copy y mean rstd"
        present, last = "x scale shift y mean rstd " + given[kind], {"eps": "fp32", "factor": "fp32"}
        constants["RANK"] = 16 if kind == "adapted sum" else 0
    else:
        kernel, names = add_layernorm_bwd_kernel, "grad skip s x added gate scale mean rstd ds dx parts sums tickets"
        present, last = "grad skip s scale mean rstd ds " + given[kind], dict.fromkeys(("share", "parts_share"), "i32")
        # of a gated sum the vectors' gradients; of others those of weights, if they are trained
        trained = kind != "frozen sum"
        present += " x" * (kind == "gated sum") + " parts sums tickets" * trained
        last["counters"] = "i32"
        constants |= {"AFFINE": trained, "ADDED": "last" in kind or kind == "sum", "GATE": kind == "gated sum"}
        constants |= {"LATER": kind == "last sum"}
        # of few images there are many parts each
        constants |= {"ONE_SHARE": kind == "gated sum", "BLOCK_P": max(1, SUM_TILE // tile["BLOCK_D"])}
    types = {"mean": "*fp32", "rstd": "*fp32", "parts": "*fp32", "tickets": "*i32"}
    absent = [name for name in names.split() if name not in present.split()]
    pointers = {name if name == "tickets" else f"{name}_ptr": types.get(name, f"*{dtype}") for name in names.split()}
    constants |= {name if name == "tickets" else f"{name}_ptr": None for name in absent}
    sizes = {"rows": "i32", "width": "i32", "scale_step": "i32", **last}
    signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    return f"{direction} {dtype} {width} wide, {kind}", kernel, signature, constants, warps
