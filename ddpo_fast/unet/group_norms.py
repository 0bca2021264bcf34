"""Group norms of images with the SiLU that follows them, and with the sum or the concatenation before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpo_fast.ops.groupnorm_silu import groupnorm_silu, groupnorm_silu_and_skip
from ddpo_fast.unet import convolutions
from ddpo_fast.unet.convolutions import is_bare
from ddpo_fast.unet.residual_sums import ImageConcatenation, ImageSum


class FusedGroupNorm(nn.GroupNorm):
    """A group norm of images [B, C, H, W]; PyTorch computes other inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:
            return super().forward(x)
        return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps, False)


class GroupNormSiLU(nn.GroupNorm):
    """A group norm of images and the SiLU that follows it. The SiLU layer itself must be replaced by `SkippedSiLU`."""

    def forward(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """`addend` [N, C] is added to every pixel of x first."""
        return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps, True, addend)


class SkippedSiLU(nn.SiLU):
    """The identity, in the place of a SiLU that the `GroupNormSiLU` before it already computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def norm_and_skip(
    norm: Any, x: torch.Tensor | ImageSum | ImageConcatenation, later: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group norm of images, of a sum or of a concatenation, and x for a skip connection; a fused norm's kernel adds
    their gradients.

    Args:
        later: for what `groupnorm_silu_and_skip` returns with it in place of x; the norm must be a bare fused one.
    """
    addend = residual = beside = None
    images: Any = x
    if isinstance(x, ImageSum):
        images, addend, residual = x.hidden, x.bias[None], x.residual
    elif isinstance(x, ImageConcatenation):
        images, beside, addend = x.images, x.beside, None if x.bias is None else x.bias[None]
    if not (is_bare(norm, FusedGroupNorm, GroupNormSiLU) and convolutions.adds_in_kernels(images)):
        assert later is None
        x = x if isinstance(x, torch.Tensor) else x.total()
        return norm(x), x
    silu = isinstance(norm, GroupNormSiLU)
    of_norm = norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    return groupnorm_silu_and_skip(images, *of_norm, addend, residual, later, beside)
