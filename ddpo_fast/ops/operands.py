"""Brings operands into the memory layouts and dtypes that the ops compute with."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor itself if it is contiguous or channels_last, else a contiguous copy.

    A UNet in channels_last answers in channels_last; the kernels index both layouts, so no copy is made for them.
    """
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Returns the tensor in the strides and dtype of `like`, which is dense: itself if it has them, else a copy."""
    if tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor
    return torch.empty_like(like).copy_(tensor)


def with_frozen(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts x, weight and bias to autocast's dtype where autocast is on, else to the weight's.

    Autocast knows PyTorch's own layers only, so an op that replaces one has to do the same cast.

    Raises `ValueError`, which names `op`, if the weight or the bias requires a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(f"{op} is for frozen weights, but the weight or the bias requires a gradient")
    device_type = x.device.type
    # asking about autocast on the device `meta` raises
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if casts else weight.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
