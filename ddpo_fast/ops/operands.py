"""What the ops need to know of their operands, and the memory layouts and dtypes that they convert them to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def dense_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor itself if it is contiguous or channels_last, else a contiguous copy.

    The output of a UNet in channels_last is channels_last. The kernels can index both layouts, so neither needs a copy.
    """
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def dense(x: Tensor) -> Tensor:
    """Returns `x` if it is contiguous or channels_last, the layouts that the kernels can index, else a copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def as_dense_as(x: Tensor, other: Tensor) -> Tensor:
    """Returns `other` if it is contiguous or channels_last where `x` is, else a copy that is."""
    return other.contiguous() if x.is_contiguous() else other.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_with_channels(x: Tensor, channels: int) -> Tensor:
    """A tensor like x, which is contiguous or channels_last, with another number of channels."""
    shape = x.shape[0], channels, *x.shape[2:]
    if x.is_contiguous():
        return x.new_empty(shape)
    return x.movedim(1, -1).new_empty((*x.shape[:1], *x.shape[2:], channels)).movedim(-1, 1)


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Returns the tensor with the strides and dtype of `like`, which must be dense; a copy only if they differ."""
    if tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor
    return torch.empty_like(like).copy_(tensor)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds the values of all tensors that there are."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


def stores_sum(residual: Tensor | None, later: Tensor | None, keep: bool) -> bool:
    """Whether a norm of a sum stores the sum: to return it, or to `keep` it for the backward pass beside its copy."""
    return residual is not None and (keep or later is None)


def mark_outputs(ctx: Any, output: tuple[Tensor, ...], residual: Tensor | None, later: Tensor | None) -> None:
    """Sets `ctx.summed` and `ctx.copied` of a norm, and which of its outputs (y, s, copy, mean, rstd) have gradients.

    Beside y the copy has one if there is `later`, else the sum s if there is a residual.
    """
    _, s, copy, mean, rstd = output
    ctx.summed, ctx.copied = residual is not None, later is not None
    unused = (s,) if ctx.copied else ((copy,) if ctx.summed else (s, copy))
    ctx.mark_non_differentiable(mean, rstd, *unused)
    # without this, autograd would allocate zeros for the gradients of mean and rstd in every backward pass
    ctx.set_materialize_grads(False)


def returned_sums_gradient(ctx: Any, of_s: Tensor | None, of_copy: Tensor | None, skip: Tensor | None) -> Tensor | None:
    """The gradient of what `mark_outputs` named beside y; `skip` where a norm has no sum."""
    if ctx.copied:
        return of_copy
    return of_s if ctx.summed else skip


def with_frozen(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts x, weight and bias to autocast's dtype where autocast is on, else to the weight's.

    Autocast casts the operands of PyTorch's own ops only, so an op that replaces one must do the same cast.

    Raises `ValueError`, which names `op`, if the weight or the bias requires a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(f"{op} is for frozen weights, but the weight or the bias requires a gradient")
    device_type = x.device.type
    # asking about autocast on the device `meta` raises
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if casts else weight.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
