"""The residual block of Stable Diffusion's UNets, whose norms and products compute what is beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from ddpo_fast.unet.convolutions import (
    CONVOLUTIONS,
    convolve,
    images_of,
    is_bare,
    is_hooked,
    is_pointwise,
    project,
    rows_of,
)
from ddpo_fast.unet.group_norms import norm_and_skip
from ddpo_fast.unet.residual_sums import ImageConcatenation, ImageSum, alike, leaves_sums
from ddpo_fast.unet.time_addends import TimeAddends


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose two norms are `GroupNormSiLU`, without resampling, and without scaling by the embedding.

    The block does not apply the activation after each norm, which the norm includes, and does not divide by an output
    factor of 1.
    """

    # the block's place in `TimeAddends`, set by `project_together`
    reader_index: int
    # the block that it belongs to and the transformer that reads its images, and nothing else; set by `fuse_unet`, in
    # a tuple, so that they are no submodules of this one
    followed_by: tuple[Any, Any] | None = None

    def forward(
        self,
        input_tensor: torch.Tensor | ImageConcatenation,
        temb: torch.Tensor | TimeAddends | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        hidden, input_tensor = norm_and_skip(self.norm1, input_tensor)
        added = None
        if isinstance(temb, TimeAddends):
            hidden, added = convolve(self.conv1, hidden, None), temb.of_block[self.reader_index]
        elif self.time_emb_proj is None:
            hidden = self.conv1(hidden)
            hidden = hidden if temb is None else hidden + temb
        else:
            assert temb is not None
            added = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if is_bare(self.conv1, *CONVOLUTIONS) and self.conv1.bias is not None:
                # the norm adds the convolution's bias too
                hidden = convolve(self.conv1, hidden, None)
                added = added + self.conv1.bias.to(added.dtype)
            else:
                hidden = self.conv1(hidden)
        hidden = self.dropout(self.norm2(hidden, added))
        if self._leaves_sum(input_tensor):
            return self._sum(input_tensor, hidden)
        total = self._with_residual(input_tensor, hidden)
        return total if self.output_scale_factor == 1.0 else total / self.output_scale_factor

    def _leaves_sum(self, x: torch.Tensor) -> bool:
        """Whether the transformer after this block computes the sum of the block's two parts."""
        # in this order: what is compiled for a block without a follower is then for those with one too
        if not leaves_sums(x) or self.followed_by is None:
            return False
        block, transformer = self.followed_by
        shortcut, conv = self.conv_shortcut, self.conv2
        return (
            # a checkpointed block would keep both parts
            not (block.gradient_checkpointing and torch.is_grad_enabled())
            and self.output_scale_factor == 1.0
            and x.is_contiguous(memory_format=torch.channels_last)
            and (shortcut is None or (is_pointwise(shortcut) and shortcut.bias is not None))
            and is_bare(conv, *CONVOLUTIONS)
            and conv.bias is not None
            and conv.weight.dtype == x.dtype
            and not is_hooked(self)
            and transformer.reads_sums()
        )

    def _sum(self, x: torch.Tensor, hidden: torch.Tensor) -> ImageSum:
        conv, shortcut = self.conv2, self.conv_shortcut
        hidden = convolve(conv, hidden, None)
        if shortcut is None:
            return ImageSum(x, hidden, conv.bias)
        residual = F.linear(rows_of(x), shortcut.weight.flatten(1), shortcut.bias.detach())
        return ImageSum(images_of(residual, *x.shape[2:]), hidden, alike(conv.bias, shortcut.bias))

    def _with_residual(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`shortcut(x) + conv2(hidden)`; a 1x1 shortcut adds both biases in its matrix product."""
        shortcut, conv = self.conv_shortcut, self.conv2
        if shortcut is None:
            return x + conv(hidden)
        # in another layout the rows would be a copy
        as_rows = x.is_contiguous(memory_format=torch.channels_last) and is_pointwise(shortcut)
        if not (as_rows and shortcut.bias is not None and is_bare(conv, *CONVOLUTIONS) and conv.bias is not None):
            return shortcut(x) + conv(hidden)
        residual = project(shortcut, rows_of(x), shortcut.bias + conv.bias)
        return images_of(residual, *x.shape[2:]) + convolve(conv, hidden, None)
