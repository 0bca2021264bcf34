"""The up path of a UNet without concatenations: the first norm of a residual block makes the one that the block reads.

The norm's kernel reads it anyway, and its backward kernel gives both parts their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from ddpo_fast.unet.compiled_blocks import is_compiled
from ddpo_fast.unet.convolutions import CONVOLUTIONS, convolve, is_bare, is_hooked
from ddpo_fast.unet.residual_blocks import FusedResnetBlock2D
from ddpo_fast.unet.residual_sums import BiasedImages, ImageConcatenation, leaves_sums
from ddpo_fast.unet.shared_halves import MatchingCrossAttnUpBlock2D, MatchingUpBlock2D, with_rows_of

# the most output elements of PyTorch's nearest upsampling of channels_last images, which counts them in an int32
MOST_UPSAMPLED = 2**31 - 1


class FusedUpsample2D(Upsample2D):
    """Doubles the size of images and convolves them, without a copy.

    For batches of 64 and more, diffusers calls `contiguous` on the input, to avoid a defect of old versions of PyTorch.
    That call copies channels_last images into the contiguous layout.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or args or kwargs or not self._fits(hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        conv: Any = self.conv
        return conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))

    def with_later_bias(self, images: Tensor) -> Tensor | BiasedImages:
        """The same without the bias of the convolution, for a kernel that adds it, where nothing else runs."""
        conv: Any = self.conv
        if not (self._fits(images) and is_bare(conv, *CONVOLUTIONS) and conv.bias is not None):
            return self(images)
        return BiasedImages(convolve(conv, F.interpolate(images, scale_factor=2.0, mode="nearest"), None), conv.bias)

    def _fits(self, images: Tensor) -> bool:
        return 4 * images.numel() <= MOST_UPSAMPLED


class _Joining:
    """An up block whose residual blocks get what they read as two tensors."""

    # the next up block, which reads what this one gives, and nothing else; set by `fuse_unet`, in a tuple, so that it
    # is no submodule of this one
    read_by: tuple[Any, ...] = ()

    def forward(
        self, hidden_states: Any, res_hidden_states_tuple: tuple[Tensor, ...], temb: Any, *args: Any, **kwargs: Any
    ) -> Any:
        block: Any = self
        states, bias = res_hidden_states_tuple, None
        if isinstance(hidden_states, BiasedImages):
            hidden_states, bias = hidden_states.images, hidden_states.bias
        if args or not joins(block, hidden_states, states):
            hidden_states = hidden_states if bias is None else BiasedImages(hidden_states, bias).total()
            return super().forward(hidden_states, states, temb, *args, **kwargs)  # type: ignore[misc]
        upsample_size = kwargs.pop("upsample_size", None)
        temb = with_rows_of(hidden_states, temb)
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        # from the down block's last state to its first
        for resnet, attention, state in zip(block.resnets, attentions, states[::-1], strict=True):
            joined = ImageConcatenation(hidden_states, with_rows_of(hidden_states, state), bias)
            bias = None
            if torch.is_grad_enabled() and block.gradient_checkpointing:
                hidden_states = block._gradient_checkpointing_func(resnet, joined, temb)
            else:
                hidden_states = resnet(joined, temb)
            if attention is not None:
                hidden_states = attention(hidden_states, **kwargs, return_dict=False)[0]
        return self._upsampled(hidden_states, upsample_size)

    def _upsampled(self, images: Tensor, size: Any) -> Tensor | BiasedImages:
        block: Any = self
        upsamplers: Any = block.upsamplers or ()
        is_last = len(upsamplers) == 1 and is_bare(upsamplers[0], FusedUpsample2D) and size is None
        if self.read_by and is_last and not any(map(is_hooked, (block, *self.read_by))):
            biased: Tensor | BiasedImages = upsamplers[0].with_later_bias(images)
            return biased
        for upsampler in upsamplers:
            images = upsampler(images, size)
        return images


def joins(block: Any, images: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether the residual blocks of an up block make the concatenations, which FreeU would change."""
    return (
        leaves_sums(images)
        and all(state.dtype == images.dtype for state in states)
        and all(is_bare(resnet, FusedResnetBlock2D) and not is_compiled(resnet) for resnet in block.resnets)
        and getattr(block, "s1", None) is None
    )


class FusedUpBlock2D(_Joining, MatchingUpBlock2D):
    pass


class FusedCrossAttnUpBlock2D(_Joining, MatchingCrossAttnUpBlock2D):
    pass
