"""A convolution with frozen weights that does not save its input for the backward pass.

Only the weight's gradient needs the input. PyTorch's convolution saves it even where the weight is frozen; its linear
layer does not. The results are equal to PyTorch's in every bit, because the same library calls compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpo_fast.ops.backend import Op
from ddpo_fast.ops.operands import with_frozen


def frozen_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` with a gradient for x only: [B, I, H, W] -> [B, O, H', W'].

    The operands are cast to autocast's dtype where autocast is on, else to the weight's, and the result has that dtype.
    Raises `ValueError` if the weight or the bias requires a gradient.
    """
    x, weight, bias = with_frozen("frozen_conv2d", x, weight, bias)
    return FORWARD(x, weight, bias, stride, padding, dilation, groups)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    if channels_last:
        # `convolution_backward` takes the layout of its result from the input and the weight. On a CPU the stand-in for
        # the input has no layout (all its strides are 0), so the weight's decides. For a 1x1 kernel `contiguous` may
        # leave the strides unchanged, because the weight is contiguous in both layouts, so the strides are set
        # explicitly.
        _, i, h, w = weight.shape
        weight = weight.contiguous(memory_format=torch.channels_last)
        weight = weight.as_strided(weight.shape, (h * w * i, 1, w * i, i), weight.storage_offset())
    if channels_last and grad.is_cuda:
        # cuDNN takes the layout from the input, and a contiguous stand-in would make it transpose the gradient twice.
        # The stand-in's values are not read, because only the weight's gradient would need them.
        stand_in = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    else:
        # one element that is expanded to the input's shape takes no memory
        stand_in = grad.new_empty(1).expand(shape)
    only_input = (True, False, False)
    return torch.ops.aten.convolution_backward(
        grad, stand_in, weight, None, stride, padding, dilation, False, (0, 0), groups, only_input
    )[0]


FORWARD = Op("frozen_conv2d", _forward, _forward)
BACKWARD = Op("frozen_conv2d_backward", _backward, _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, *geometry = inputs
    channels_last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
    ctx.others = (x.shape, channels_last, *geometry)
    ctx.save_for_backward(weight)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return BACKWARD(grad, *ctx.saved_tensors, *ctx.others), *[None] * 6


FORWARD.register_autograd(_gradients, setup_context=_save)
