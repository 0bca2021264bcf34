"""Computes once what the two rows of classifier-free guidance have in common.

The row with the negative prompt and the row with the prompt have the same latents and timestep. Up to the first
cross-attention a UNet computes the same for both: the time embedding, `conv_in`, and the first blocks with their
self-attention. `share_halves` makes a UNet take N latents and timesteps with 2N embeddings, the negative prompts
first; its layers compute N rows until the embeddings are read, and 2N rows from there on. The gradient of the shared
part is the sum of both halves'.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

from ddpo_fast.unet.convolutions import is_patched
from ddpo_fast.unet.sampling_cache import cache_problem
from ddpo_fast.unet.time_addends import TimeAddends


def with_rows_of(like: Tensor, tensor: Any) -> Any:
    """`tensor` twice, one copy after the other, if `like` has twice as many rows; else the tensor itself."""
    if isinstance(tensor, TimeAddends):
        return tensor.for_rows(len(like))
    return torch.cat([tensor, tensor]) if len(like) == 2 * len(tensor) else tensor


class SharingBlock(BasicTransformerBlock):
    """A transformer block in which N rows become 2N, between the self-attention and the cross-attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        context = encoder_hidden_states
        if context is None or len(context) != 2 * len(hidden_states) or self._chunk_size is not None:
            if context is not None:
                hidden_states = with_rows_of(context, hidden_states)
            return super().forward(
                hidden_states,
                attention_mask,
                context,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *args,
                **kwargs,
            )
        given = cross_attention_kwargs or {}
        attended = self.attn1(self.norm1(hidden_states), attention_mask=attention_mask, **given) + hidden_states
        # the query's projection is the same for both rows too, but is no larger than this copy
        hidden = with_rows_of(context, attended)
        read = self.attn2(
            self.norm2(hidden), encoder_hidden_states=context, attention_mask=encoder_attention_mask, **given
        )
        hidden = read + hidden
        return self.ff(self.norm3(hidden)) + hidden


class SharingTransformer2DModel(Transformer2DModel):
    """The transformer of images around a `SharingBlock`: its residual has N rows where its tokens have 2N."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        residual = with_rows_of(hidden_states, residual)
        return super()._get_output_for_continuous_inputs(
            hidden_states, residual, len(hidden_states), height, width, inner_dim
        )


class SharingDownBlock2D(CrossAttnDownBlock2D):
    """The block of the first cross-attention: N rows before it, 2N after it."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
        additional_residuals: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if encoder_hidden_states is None or len(encoder_hidden_states) == len(hidden_states):
            return super().forward(hidden_states, temb, additional_residuals=additional_residuals, **given)
        states: tuple[Tensor, ...] = ()
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            matching = with_rows_of(hidden_states, temb)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(resnet, hidden_states, matching)
            else:
                hidden_states = resnet(hidden_states, matching)
            hidden_states = attention(hidden_states, **given, return_dict=False)[0]
            states += (hidden_states,)
        assert additional_residuals is None, "a T2I adapter's residuals have as many rows as the embeddings"
        for downsampler in self.downsamplers or ():
            hidden_states = downsampler(hidden_states)
            states += (hidden_states,)
        return hidden_states, states


class _Matching:
    """A block whose time embedding, and what it gets from the down blocks, may have half as many rows as its images."""

    def forward(self, hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, with_rows_of(hidden_states, temb), *args, **kwargs)  # type: ignore[misc]


class MatchingDownBlock2D(_Matching, DownBlock2D):
    pass


class MatchingCrossAttnDownBlock2D(_Matching, CrossAttnDownBlock2D):
    pass


class MatchingMidBlock2D(_Matching, UNetMidBlock2DCrossAttn):
    pass


class _MatchingUp:
    """The same for a block that also gets what the down blocks gave."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        states = tuple(with_rows_of(hidden_states, state) for state in res_hidden_states_tuple)
        return super().forward(  # type: ignore[misc]
            hidden_states, states, with_rows_of(hidden_states, temb), *args, **kwargs
        )


class MatchingUpBlock2D(_MatchingUp, UpBlock2D):
    pass


class MatchingCrossAttnUpBlock2D(_MatchingUp, CrossAttnUpBlock2D):
    pass


MATCHING: dict[type[nn.Module], type[nn.Module]] = {
    DownBlock2D: MatchingDownBlock2D,
    CrossAttnDownBlock2D: MatchingCrossAttnDownBlock2D,
    UNetMidBlock2DCrossAttn: MatchingMidBlock2D,
    UpBlock2D: MatchingUpBlock2D,
    CrossAttnUpBlock2D: MatchingCrossAttnUpBlock2D,
}
# for each class that sharing gives a module, the one that it had
UNSHARED: dict[type[nn.Module], type[nn.Module]] = {
    **{matching: plain for plain, matching in MATCHING.items()},
    SharingDownBlock2D: CrossAttnDownBlock2D,
    SharingTransformer2DModel: Transformer2DModel,
    SharingBlock: BasicTransformerBlock,
}


def share_halves(unet: Any) -> Any:
    """Makes a UNet take N latents with 2N embeddings, in place, if it is of a kind that can; returns it.

    Only classes of modules change. A UNet is left as it is if the prompt has a part in its time embedding, as in
    Stable Diffusion XL, or if it has blocks of other kinds.
    """
    if type(unet) is not UNet2DConditionModel or cache_problem(unet) or unet.config.encoder_hid_dim_type is not None:
        return unet
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    first = next((block for block in unet.down_blocks if hasattr(block, "attentions")), None)
    if first is None or not all(_can_match(block) for block in blocks):
        return unet
    transformer: Any = first.attentions[0]
    # one that is fused already has this part of `SharingTransformer2DModel`
    fits = isinstance(transformer, Transformer2DModel) and transformer.is_input_continuous
    if not (fits and _can_share(transformer.transformer_blocks[0]) and not is_patched(transformer)):
        return unet
    for block in blocks:
        # an up block that is fused matches already
        block.__class__ = SharingDownBlock2D if block is first else MATCHING.get(type(block), type(block))
    if type(transformer) is Transformer2DModel:
        transformer.__class__ = SharingTransformer2DModel
    if type(transformer.transformer_blocks[0]) is BasicTransformerBlock:
        transformer.transformer_blocks[0].__class__ = SharingBlock
    return unet


def _can_match(block: Any) -> bool:
    return (type(block) in MATCHING or isinstance(block, _MatchingUp)) and not is_patched(block)


def _can_share(block: Any) -> bool:
    # one that is fused is a `SharingBlock` already
    plain = type(block) is BasicTransformerBlock or isinstance(block, SharingBlock)
    plain = plain and block.norm_type == "layer_norm" and block.pos_embed is None
    return plain and block.attn2 is not None and not block.only_cross_attention and not is_patched(block)


def shares_halves(unet: Any) -> bool:
    """Whether a UNet takes N latents with 2N embeddings (see `share_halves`)."""
    return any(type(block) is SharingDownBlock2D for block in getattr(unet, "down_blocks", ()))


def blocks_of_one_half(unet: Any) -> int:
    """How many residual blocks of a UNet that shares halves, the first ones, compute N rows."""
    first = next(i for i, block in enumerate(unet.down_blocks) if type(block) is SharingDownBlock2D)
    return sum(len(block.resnets) for block in unet.down_blocks[:first]) + 1
