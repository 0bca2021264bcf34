"""Operands in the layouts and precisions that ops compute with."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous or channels_last, else a contiguous copy."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the layout and dtype of `like`, which is dense: itself if it has them, else a copy."""
    if tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor
    return torch.empty_like(like).copy_(tensor)


def with_frozen(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias in autocast's dtype where autocast is on, else in the weight's.

    Raises `ValueError` in the name of `op` if the weight or the bias requires a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(f"{op} is for frozen weights, but the weight or the bias requires a gradient")
    device_type = x.device.type
    # `meta` has no autocast to ask about
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if casts else weight.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
