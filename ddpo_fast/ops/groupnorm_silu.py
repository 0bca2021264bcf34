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
from ddpo_fast.ops.operands import laid_out_as


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
    y, _, _ = FORWARD(_dense(x), weight, bias, groups, eps, silu, addend)
    return y


def groupnorm_silu_and_skip(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """`groupnorm_silu` and x for a skip connection, whose gradient the norm's backward pass adds to its own."""
    y, _, _, x = FORWARD.with_skip(_dense(x), weight, bias, groups, eps, silu, None)
    return y, x


def _dense(x: Tensor) -> Tensor:
    """Returns `x` if it is contiguous or channels_last, the layouts that the kernels can index, else a copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


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


def _sum(x: Tensor, addend: Tensor | None) -> Tensor:
    return x if addend is None else x + addend.to(x.dtype).view(*addend.shape, *[1] * (x.ndim - 2))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, addend: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x = _sum(x, addend)
    z, mean, rstd = _norm(x, weight, bias, groups, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return laid_out_as(x, F.silu(z) if silu else z), mean.to(wide), rstd.to(wide)


def _widest(weight: Tensor, bias: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, bias.dtype)


def _reference_backward(
    x: Tensor,
    grad: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    addend: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    silu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, to which `skip` is added, and of the others those in `needs`.

    These are the gradients of weight and bias as one tensor [2, C], which takes one sum and one cast, and the
    addend's.
    """
    groups = mean.shape[1]
    affine, of_addend = needs
    x = _sum(x, addend)
    z, mean, rstd = _norm(x, weight, bias, groups, eps)
    grad = grad.contiguous()
    if silu:
        grad = torch.ops.aten.silu_backward(grad, z)
    narrow = weight.to(x.dtype).contiguous()
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        grad, x.contiguous(), mean, rstd, narrow, *_sizes(x), groups, [True, affine, affine]
    )
    dx = laid_out_as(x, dx)
    found = [dx if skip is None else dx + skip]
    if affine:
        found.append(torch.stack([dweight, dbias]).to(_widest(weight, bias)))
    if of_addend:
        assert addend is not None
        found.append(dx.flatten(2).sum(2).sum_to_size(addend.shape).to(addend.dtype))
    return found


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (torch.empty((x.shape[0], groups), dtype=wide, device=x.device) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, addend: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from ddpo_fast_kernels.groupnorm_silu import groupnorm_silu

    made = _empty(x, weight, bias, groups)
    groupnorm_silu(x, weight, bias, eps, silu, addend, *made)
    return made


def _triton_backward(
    x: Tensor,
    grad: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    addend: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    silu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    from ddpo_fast_kernels.groupnorm_silu import groupnorm_silu_backward
    from ddpo_fast_kernels.launch import sum_parts

    dx = torch.empty_like(x)
    affine, of_addend = needs
    # one sum for each image and channel, added up below in a fixed order; atomic additions would not be reproducible
    partials = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device) if affine else None
    daddend = None
    if of_addend:
        assert addend is not None
        dtype = addend.dtype if addend.shape == x.shape[:2] else torch.float32
        daddend = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    groupnorm_silu_backward(x, grad, skip, weight, bias, addend, mean, rstd, silu, dx, daddend, partials)
    found = [dx]
    if partials is not None:
        found.append(sum_parts(partials, _widest(weight, bias)))
    if daddend is not None and addend is not None:
        found.append(daddend.sum_to_size(addend.shape).to(addend.dtype))
    return found


def _empty_backward(
    x: Tensor, grad: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, addend: Tensor | None, *others: Any
) -> list[Tensor]:
    affine, of_addend = others[-1]
    found = [torch.empty_like(x)]
    if affine:
        found.append(torch.empty((2, len(weight)), dtype=_widest(weight, bias), device=x.device))
    if of_addend and addend is not None:
        found.append(torch.empty(addend.shape, dtype=addend.dtype, device=x.device))
    return found


def _csrc(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, addend: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    made = _empty(x, weight, bias, groups)
    torch.ops.ddpo_fast_csrc.groupnorm_silu(x, weight, bias, eps, silu, addend, *made)
    return made


def _csrc_backward(*arguments: Any) -> list[Tensor]:
    *operands, _, silu, needs = arguments
    found = _empty_backward(*arguments)
    dx, *others = found
    made = iter(others)
    daffine, daddend = (next(made) if needed else None for needed in needs)
    torch.ops.ddpo_fast_csrc.groupnorm_silu_backward(*operands, silu, dx, daffine, daddend)
    return found


FORWARD = Op("groupnorm_silu", _reference, _empty, _triton, _csrc, csrc_devices=("cpu",))
BACKWARD = Op(
    "groupnorm_silu_backward",
    _reference_backward,
    _empty_backward,
    _triton_backward,
    _csrc_backward,
    csrc_devices=("cpu",),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.eps, ctx.silu, addend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # without this, autograd would allocate zeros for the gradients of mean and rstd in every backward pass
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, addend, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor | None, _mean: None, _rstd: None, skip: Tensor | None = None) -> Any:
    if grad is None:
        return (skip, *[None] * 6)
    x, *norm = ctx.saved_tensors
    needs = ctx.needs_input_grad
    asked = [needs[1] or needs[2], needs[6]]
    skip = None if skip is None else laid_out_as(x, skip)
    dx, *others = BACKWARD(x, laid_out_as(x, grad), skip, *norm, ctx.eps, ctx.silu, asked)
    # autograd casts them to the parameters' dtypes, if those differ from each other
    dweight, dbias = others[0].unbind() if asked[0] else (None, None)
    return dx, dweight, dbias, None, None, None, others[-1] if asked[1] else None


FORWARD.register_autograd(_differentiate, setup_context=_save)
