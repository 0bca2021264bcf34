"""The up path of a UNet without concatenations: the first norm of a residual block makes the one that the block reads.

The norm's kernel reads it anyway, and its backward kernel gives both parts their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.unet.compiled_blocks import is_compiled
from ddpo_fast.unet.convolutions import is_bare
from ddpo_fast.unet.residual_blocks import FusedResnetBlock2D
from ddpo_fast.unet.residual_sums import ImageConcatenation, leaves_sums
from ddpo_fast.unet.shared_halves import MatchingCrossAttnUpBlock2D, MatchingUpBlock2D, with_rows_of


class _Joining:
    """An up block whose residual blocks get what they read as two tensors."""

    def forward(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], temb: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        block: Any = self
        if args or not joins(block, hidden_states, res_hidden_states_tuple):
            return super().forward(hidden_states, res_hidden_states_tuple, temb, *args, **kwargs)  # type: ignore[misc]
        upsample_size = kwargs.pop("upsample_size", None)
        temb = with_rows_of(hidden_states, temb)
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        # from the down block's last state to its first
        for resnet, attention, state in zip(block.resnets, attentions, res_hidden_states_tuple[::-1], strict=True):
            joined = ImageConcatenation(hidden_states, with_rows_of(hidden_states, state))
            if torch.is_grad_enabled() and block.gradient_checkpointing:
                hidden_states = block._gradient_checkpointing_func(resnet, joined, temb)
            else:
                hidden_states = resnet(joined, temb)
            if attention is not None:
                hidden_states = attention(hidden_states, **kwargs, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


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
