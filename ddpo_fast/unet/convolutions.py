"""Convolutions of a UNet computed with less work than their modules do: frozen ones, 1x1 ones, and those whose bias is
added by another op.

On a GPU, PyTorch adds the bias of a convolution in a kernel of its own, which reads and writes the whole output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpo_fast.ops.frozen import frozen_conv2d
from ddpo_fast.ops.linear import linear, onednn_is_faster


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not save its input for the backward pass while its weights are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x, self.bias)


CONVOLUTIONS = (nn.Conv2d, FrozenConv2d)


def convolve(conv: nn.Conv2d, x: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution `conv` of images [B, I, H, W], with `bias` [O] or None in place of its own."""
    frozen = not (conv.weight.requires_grad or (bias is not None and bias.requires_grad))
    if not (type(conv) is FrozenConv2d and torch.is_grad_enabled() and x.requires_grad and frozen):
        return conv._conv_forward(x, conv.weight, bias)
    # `fits_conv` accepts layers whose padding is a tuple
    padding: Any = conv.padding
    return frozen_conv2d(x, conv.weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def fits_conv(conv: nn.Conv2d) -> bool:
    """Whether `FrozenConv2d` computes the same."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def adds_in_kernels(x: Tensor) -> bool:
    """Whether additions are left to kernels that read or write the same tensors: on all devices but the CPU.

    A CPU has no such kernels, and the order of its sums stays as it was.
    """
    return x.device.type != "cpu"


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    device_type = x.device.type
    # asking on the device `meta` raises
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def is_bare(layer: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of one of these classes and nothing else runs where it is called, so that another op can
    compute it from its parameters."""
    return type(layer) in kinds and not is_hooked(layer)


def is_pointwise(conv: Any) -> bool:
    """Whether a layer is a plain 1x1 convolution: a linear layer of every pixel."""
    return (
        is_bare(conv, nn.Conv2d, FrozenConv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), 0)
        and conv.groups == 1
    )


def project(layer: Any, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution as a linear layer, whose kernel adds the bias: rows [B, M, I] of the pixels -> [B, M, O].

    Args:
        bias: in place of the layer's own.
    """
    weight, bias = layer.weight.flatten(1), layer.bias if bias is None else bias
    if rows.dtype == weight.dtype and onednn_is_faster(rows.device.type, rows.dtype):
        return linear(rows, weight, bias)
    return F.linear(rows, weight, bias)


def rows_of(images: Tensor) -> Tensor:
    """The pixels as rows: [B, C, H, W] -> [B, H W, C], without a copy for channels_last."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def images_of(rows: Tensor, height: int, width: int) -> Tensor:
    """[B, H W, C] -> [B, C, H, W] in channels_last, without a copy."""
    return rows.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has hooks (accelerate's offload, for instance), which run only if the module is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether `forward` is set on the instance. Changing the class would then have no effect."""
    return "forward" in vars(module)
