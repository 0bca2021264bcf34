"""Sums of a residual and a layer's output that the layer itself does not compute.

Either the next group norm computes the sum of images, which it would only read again (`ImageSum`), or the matrix
product of a last layer adds to rows that the norm before has made from the residual (`add_product_`). Either way a
kernel less reads and writes the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpo_fast.unet import convolutions
from ddpo_fast.unet.convolutions import is_autocast, is_bare, is_pointwise
from ddpo_fast.unet.linear_layers import FusedLinear


@dataclass(frozen=True)
class BiasedImages:
    """`images + bias`, [B, C, H, W] and [C]: what an upsampler hands on to the next up block."""

    images: Tensor
    bias: Tensor

    def total(self) -> Tensor:
        return self.images + self.bias[:, None, None]


@dataclass(frozen=True)
class ImageConcatenation:
    """The channels of two batches of images [B, C, H, W] and [B, C', H, W]: what a residual block of an up block reads.

    The block's first group norm makes it, which would only read it again. `bias` [C] is added to the first.
    """

    images: Tensor
    beside: Tensor
    bias: Tensor | None = None

    def total(self) -> Tensor:
        images = self.images if self.bias is None else BiasedImages(self.images, self.bias).total()
        return torch.cat([images, self.beside], 1)


@dataclass(frozen=True)
class ImageSum:
    """`residual + hidden + bias`, images [B, C, H, W] and [C]: what a residual block hands on to a transformer."""

    residual: Tensor
    hidden: Tensor
    bias: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    def total(self) -> Tensor:
        return self.residual + (self.hidden + self.bias[:, None, None])


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, other: Tensor) -> Tensor:
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad


def alike(bias: Tensor, other: Tensor) -> Tensor:
    """`bias`, whose gradient becomes that of `other` too: a bias of the same sum that its layer has added, detached."""
    applied: Tensor = _Alike.apply(bias, other)
    return applied


def leaves_sums(x: Tensor) -> bool:
    """Whether sums are left to other kernels: of tensors of one dtype, which autocast would change.

    A compiler chooses by itself what it fuses.
    """
    return convolutions.adds_in_kernels(x) and not is_autocast(x) and not torch.compiler.is_compiling()


def later_bias(layer: Any, x: Tensor) -> Tensor | None:
    """The bias of a layer if `add_product_` can compute the layer from `x` and add it to a residual; else None."""
    bare = is_pointwise(layer) or is_bare(layer, nn.Linear, FusedLinear)
    return layer.bias if bare and leaves_sums(x) and layer.weight.dtype == x.dtype else None


def add_product_(rows: Tensor, layer: Any, x: Tensor) -> Tensor:
    """Adds a linear layer or 1x1 convolution of `x` [B, L, I], without its bias, to `rows` [B L, O] in place.

    Returns the rows as [B, L, O]. The matrix product reads what it adds to: PyTorch would copy an operand that is not
    the result.
    """
    return rows.addmm_(x.flatten(0, 1), layer.weight.flatten(1).t()).unflatten(0, x.shape[:2])
