"""GroupNorm and the SiLU that follows it as one op, whose output has the memory format of its input.

As two ops, the norm would write its result to memory for SiLU to read, and both would save their inputs for the
backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo_fast.ops.backend import Op
from ddpo_fast.ops.operands import (
    as_dense_as,
    dense,
    empty_with_channels,
    laid_out_as,
    mark_outputs,
    returned_sums_gradient,
    stores_sum,
    widest,
)


def groupnorm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    addend: Tensor | None = None,
) -> Tensor:
    """`y = silu(z)` with `z = (x + addend - mean) / sqrt(var + eps) * weight + bias`; `silu=False`: `y = z`.

    Args:
        x: [N, C, ...] fp16, bf16 or fp32 (fp64: by the reference), channels_last or contiguous; a tensor in another
            layout is copied. `mean` and `var` are computed in fp32 over each group of C / groups channels of an image.
        weight, bias: [C], in the dtype of `x` or a wider one.
        groups: the number of groups, a divisor of C.
        eps: added to the variance.
        addend: [N, C], or [1, C] for all images, added to every pixel; None for 0. `mean` and `var` are of the sum.

    Returns `y` in the shape, dtype and memory format of `x`. The backward pass saves `x` and the groups' statistics and
    computes z again. Raises `ValueError` for shapes that do not fit.
    """
    if x.ndim < 2 or x.shape[1] % groups:
        raise ValueError(f"x has shape {tuple(x.shape)} but must be [N, C, ...] with C divisible by {groups} groups")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)} but x has {x.shape[1]} channels")
    if addend is not None and addend.shape not in (x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"addend has shape {tuple(addend.shape)} but must be {tuple(x.shape[:2])}")
    return FORWARD(dense(x), weight, bias, groups, eps, silu, addend, None, None, True, None)[0]


def groupnorm_silu_and_skip(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    later: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`groupnorm_silu` of `s = x + addend + residual`, and s for a skip connection.

    Args:
        residual: like `x`; without it s is `x`, and `addend` must be None. s is rounded to the dtype of `x`.
        beside: [N, C', ...] in the dtype of `x`, in place of a residual and `later`. s is `x + addend` and, after its
            channels, these; weight and bias have the channels of s. The backward pass gives each its gradient as a
            tensor.
        later: [C], the bias of a layer whose output will be added to s. With it, s + later is returned as rows
            [N * pixels, C] that nothing else reads, so that a matrix product may add to them in place. `x` is then
            copied if it is not channels_last.

    The norm's backward pass adds the gradient of s from its other uses to its own, and sums it for that of `later`.
    Without gradients, s is not stored if `later` is given.
    """
    assert residual is not None or beside is not None or addend is None
    assert beside is None or (residual is None and later is None and (addend is None or len(addend) == 1))
    if later is not None and not x.movedim(1, -1).is_contiguous():
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x = dense(x)
    if residual is None and later is None and beside is None:
        y, *_, x = FORWARD.with_skip(x, weight, bias, groups, eps, silu, None, None, None, True, None)
        return y, x
    residual = None if residual is None else laid_out_as(x, residual)
    beside = None if beside is None else as_dense_as(x, beside)
    keep = torch.is_grad_enabled()
    y, s, copy, _, _ = FORWARD(x, weight, bias, groups, eps, silu, addend, residual, later, keep, beside)
    return y, s if later is None else copy


# y; s and its copy for a later product, empty where they are not stored; mean and rstd
Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# the definition


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # `native_group_norm`, because F.group_norm returns no statistics and refuses groups of one value. The tensors are
    # made contiguous, because for channels_last tensors on a CPU PyTorch computes the variance as E[x^2] - E[x]^2,
    # which loses all digits to cancellation where the mean is large.
    x, weight, bias = (tensor.to(x.dtype).contiguous() for tensor in (x, weight, bias))
    images, channels, pixels = _sizes(x)
    return torch.native_group_norm(x, weight, bias, images, channels, pixels, groups, eps)


def _sum(x: Tensor, addend: Tensor | None, residual: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
    x = x if addend is None else x + addend.to(x.dtype).view(*addend.shape, *[1] * (x.ndim - 2))
    x = x if beside is None else as_dense_as(x, torch.cat([x, beside], 1))
    return x if residual is None else x + residual


def _made_with(residual: Tensor | None, beside: Tensor | None) -> Tensor | None:
    """What `s` is made of beside `x`; without it `s` is `x`."""
    return beside if residual is None else residual


def _copy(s: Tensor, later: Tensor | None) -> Tensor:
    """s + later as rows."""
    return s.new_empty(0) if later is None else s.movedim(1, -1).flatten(0, -2) + later.to(s.dtype)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    residual: Tensor | None,
    later: Tensor | None,
    keep: bool,
    beside: Tensor | None,
) -> Made:
    """y; s if it is made, unless it is only returned with `later` and not to `keep`; its copy; the statistics."""
    s = _sum(x, addend, residual, beside)
    z, mean, rstd = _norm(s, weight, bias, groups, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = laid_out_as(s, F.silu(z) if silu else z)
    stored = s if stores_sum(_made_with(residual, beside), later, keep) else x.new_empty(0)
    return y, stored, _copy(s, later), mean.to(wide), rstd.to(wide)


def _is_shared(x: Tensor, addend: Tensor | None, needs: Sequence[bool]) -> bool:
    """Whether the gradient of an addend is asked for that all images share."""
    return addend is not None and needs[1] and addend.shape != x.shape[:2]


def _reference_backward(
    x: Tensor,
    grad: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    addend: Tensor | None,
    later: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    silu: bool,
    summed: bool,
    width: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, to which `skip` is added, and of the others those in `needs`: of weight and bias, addend, and later.

    If `width` is not 0, dx is two tensors, of which the first has as many channels. Of the others, those that are the
    same for all images are one tensor [V, C]. The gradient of an addend for each image is another.
    With `summed`, x is s, which has what was added already.
    """
    groups = mean.shape[1]
    s = x if summed else _sum(x, addend)
    z, mean, rstd = _norm(s, weight, bias, groups, eps)
    grad = grad.contiguous()
    if silu:
        grad = torch.ops.aten.silu_backward(grad, z)
    narrow = weight.to(x.dtype).contiguous()
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        grad, s.contiguous(), mean, rstd, narrow, *_sizes(x), groups, [True, needs[0], needs[0]]
    )
    dx = laid_out_as(x, dx)
    dx = dx if skip is None else dx + skip
    affine = [dweight, dbias] if needs[0] else []
    return [*_in_parts(dx, width), *_vectors(dx, skip, weight, bias, addend, later, affine, needs)]


def _in_parts(dx: Tensor, width: int) -> list[Tensor]:
    """dx if `width` is 0, else its first `width` channels and the others as two dense tensors."""
    if not width:
        return [dx]
    empty = _empty_parts(dx, width)
    return [to.copy_(part) for to, part in zip(empty, dx.split([to.shape[1] for to in empty], 1), strict=True)]


def _empty_parts(x: Tensor, width: int) -> list[Tensor]:
    """Two tensors in the dense layout of x: of its first `width` channels, and of the others."""
    return [empty_with_channels(x, channels) for channels in (width, x.shape[1] - width)]


def _vectors(
    dx: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    addend: Tensor | None,
    later: Tensor | None,
    affine: list[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """What the backward pass returns after dx, with the gradients of weight and bias given as `affine`."""
    sums, found = list(affine), []
    if needs[1]:
        assert addend is not None
        of_images = dx.flatten(2).sum(2)
        if _is_shared(dx, addend, needs):
            sums.append(of_images.sum(0))
        else:
            found.append(of_images.to(addend.dtype))
    if needs[2]:
        sums.append(dx.new_zeros(dx.shape[1]) if skip is None else skip.movedim(1, -1).flatten(0, -2).sum(0))
    return [*([torch.stack(sums).to(widest(weight, bias, addend, later))] if sums else []), *found]


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *others: Any) -> Made:
    *_, residual, later, keep, beside = others
    mean, rstd = _statistics(x, groups)
    y = torch.empty_like(x) if beside is None else empty_with_channels(x, len(weight))
    s = torch.empty_like(y) if stores_sum(_made_with(residual, beside), later, keep) else x.new_empty(0)
    images, channels, pixels = _sizes(x)
    copy = x.new_empty(0) if later is None else x.new_empty(images * pixels, channels)
    return y, s, copy, mean, rstd


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0], groups), dtype=dtype), x.new_empty((x.shape[0], groups), dtype=dtype)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *others: Any) -> Made:
    from ddpo_fast_kernels.groupnorm_silu import groupnorm_silu

    eps, silu, addend, residual, later, keep, beside = others
    made = _empty(x, weight, bias, groups, *others)
    y, s, copy, mean, rstd = made
    stored = s if stores_sum(_made_with(residual, beside), later, keep) else None
    copied = None if later is None else copy
    groupnorm_silu(x, weight, bias, eps, silu, addend, residual, later, beside, y, stored, copied, mean, rstd)
    return made


def _triton_backward(*arguments: Any) -> list[Tensor]:
    from ddpo_fast_kernels.groupnorm_silu import groupnorm_silu_backward

    x, grad, skip, weight, bias, addend, _, mean, rstd, _, silu, summed, width, needs = arguments
    found = _empty_backward(*arguments)
    shared = _is_shared(x, addend, needs)
    dx, *others = found
    dbeside = others.pop(0) if width else None
    sums = others.pop(0) if needs[0] or shared or needs[2] else None
    groupnorm_silu_backward(
        *(x, grad, skip, weight, bias, None if summed else addend, mean, rstd, silu),
        *([needs[0], shared, needs[2]], dx, dbeside, others[0] if others else None, sums),
    )
    return found


def _empty_backward(*arguments: Any) -> list[Tensor]:
    x, _, _, weight, bias, addend, later, *_, width, needs = arguments
    found = _empty_parts(x, width) if width else [torch.empty_like(x)]
    shared = _is_shared(x, addend, needs)
    if vectors := 2 * needs[0] + shared + needs[2]:
        dtype = widest(weight, bias, addend, later)
        found.append(torch.empty((vectors, len(weight)), dtype=dtype, device=x.device))
    if needs[1] and not shared:
        assert addend is not None
        found.append(torch.empty(addend.shape, dtype=addend.dtype, device=x.device))
    return found


def csrc_declines(x: Tensor, groups: int, backward: bool, has_sum: bool) -> bool:
    """Whether the CUDA leaves a call to other backends: a sum, or groups of x that shared memory does not hold."""
    return x.is_cuda and (has_sum or not torch.ops.ddpo_fast_csrc.groupnorm_silu_fits(x, groups, backward))


def _without_csrc(op: Op, x: Tensor, *others: Any) -> Any:
    names = (name for name in ("triton", "reference") if not op.reasons(name, x.device.type, x.dtype))
    run = op.implementations[next(names)]
    assert run is not None
    return run(x, *others)


def _csrc(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *others: Any) -> Made:
    """The C++ has no residual: on a CPU, whose caches hold a sum that was just made, one would save little."""
    eps, silu, addend, residual, later, keep, beside = others
    added = _made_with(residual, beside)
    if csrc_declines(x, groups, False, added is not None or later is not None):
        return _without_csrc(FORWARD, x, weight, bias, groups, *others)
    s = x if added is None else _sum(x, addend, residual, beside)
    s = s if residual is None else laid_out_as(x, s)
    addend = addend if added is None else None
    y, (mean, rstd) = torch.empty_like(s), _statistics(s, groups)
    with torch.cuda.device_of(x):
        torch.ops.ddpo_fast_csrc.groupnorm_silu(s, weight, bias, eps, silu, addend, y, mean, rstd)
    stored = s if stores_sum(added, later, keep) else x.new_empty(0)
    return y, stored, _copy(s, later), mean, rstd


def _csrc_backward(*arguments: Any) -> list[Tensor]:
    x, grad, skip, weight, bias, addend, later, mean, rstd, _, silu, summed, width, needs = arguments
    if csrc_declines(x, mean.shape[1], True, summed or needs[2]):
        return _without_csrc(BACKWARD, *arguments)
    run = torch.ops.ddpo_fast_csrc.groupnorm_silu_backward
    operands = x, grad, skip, weight, bias, None if summed else addend, mean, rstd, silu
    dx, *others = _empty_backward(*arguments[:-2], 0, needs)
    if summed or needs[2]:
        affine = torch.empty((2, len(weight)), dtype=widest(weight, bias), device=x.device) if needs[0] else None
        run(*operands, dx, affine, None)
        rows = [] if affine is None else list(affine)
        return [*_in_parts(dx, width), *_vectors(dx, skip, weight, bias, addend, later, rows, needs)]
    affine = others[0][:2] if needs[0] else None
    # of all images or of each, the last row or all rows of the last tensor
    added = (others[-1][-1:] if _is_shared(x, addend, needs) else others[-1]) if needs[1] else None
    with torch.cuda.device_of(x):
        run(*operands, dx, affine, added)
    return [dx, *others]


FORWARD = Op("groupnorm_silu", _reference, _empty, _triton, _csrc, csrc_devices=("cpu", "cuda"))
BACKWARD = Op(
    "groupnorm_silu_backward",
    _reference_backward,
    _empty_backward,
    _triton_backward,
    _csrc_backward,
    csrc_devices=("cpu", "cuda"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.eps, ctx.silu, addend, residual, later, _, beside = inputs
    _, s, _, mean, rstd = output
    mark_outputs(ctx, output, _made_with(residual, beside), later)
    ctx.width = 0 if beside is None else x.shape[1]
    ctx.save_for_backward(s if ctx.summed else x, weight, bias, addend, later, mean, rstd)


def _differentiate(
    ctx: Any,
    grad: Tensor | None,
    of_s: Tensor | None,
    of_copy: Tensor | None,
    _mean: None,
    _rstd: None,
    skip: Tensor | None = None,
) -> Any:
    skip = returned_sums_gradient(ctx, of_s, of_copy, skip)
    if grad is None and not (ctx.copied or ctx.summed):
        return (skip, *[None] * 10)
    x, weight, bias, addend, later, mean, rstd = ctx.saved_tensors
    if skip is not None:
        skip = laid_out_as(x, skip.view(x.movedim(1, -1).shape).movedim(-1, 1) if ctx.copied else skip)
    grad = torch.zeros_like(x) if grad is None else laid_out_as(x, grad)
    needs = ctx.needs_input_grad
    asked = [needs[1] or needs[2], needs[6], needs[8]]
    dx, *others = BACKWARD(
        *(x, grad, skip, weight, bias, addend, later, mean, rstd, ctx.eps, ctx.silu, ctx.summed, ctx.width, asked)
    )
    dbeside = others.pop(0) if ctx.width else None
    shared = _is_shared(x, addend, asked)
    sums = iter(others[0].unbind() if asked[0] or shared or asked[2] else ())
    # autograd casts them to the parameters' dtypes, if those differ from each other
    dweight, dbias = (next(sums) if asked[0] else None for _ in range(2))
    # of a concatenation, what the first part's channels have
    daddend = next(sums)[None, : ctx.width or None] if shared else (others[-1] if asked[1] else None)
    dlater = next(sums) if asked[2] else None
    dresidual = dx if ctx.summed and not ctx.width else None
    return dx, dweight, dbias, None, None, None, daddend, dresidual, dlater, None, dbeside


FORWARD.register_autograd(_differentiate, setup_context=_save)
