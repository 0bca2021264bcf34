"""The transformer blocks of Stable Diffusion 3 and FLUX.1 with fewer kernels.

Their layer norms are scaled and shifted, and their layers' outputs gated, by the time embedding (AdaLN, arXiv
2212.09748). A norm with its modulation is one kernel, which also computes the gated sum before it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ddpo_fast.ops.add_layernorm import add_layernorm
from ddpo_fast.unet.convolutions import is_hooked

# an fp16 value of the text's tokens may leave the range of fp16, as in diffusers
LARGEST_FP16 = 65504


class _GatedSum(torch.autograd.Function):
    """PyTorch's own gradient of `addcmul` multiplies x by its factor of 1 first, in a kernel that copies it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x if ctx.needs_input_grad[1] else None)
        return torch.addcmul(rows, gate.unsqueeze(1), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, x = ctx.saved_tensors
        dgate = None if x is None else (grad * x).sum(1)
        return grad, dgate, grad * gate.unsqueeze(1) if ctx.needs_input_grad[2] else None


def gated_sum(rows: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """`rows + gate * x`: [N, L, D], [N, D] and [N, L, D] in one dtype."""
    total: Tensor = _GatedSum.apply(rows, gate, x)
    return total


class FusedJointTransformerBlock(JointTransformerBlock):
    """A block of Stable Diffusion 3, or of 3.5 with its second attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        norms = (self.norm1, self.norm1_context, self.norm2, self.norm2_context)
        if self._chunk_size is not None or _are_hooked(*norms):
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        given = joint_attention_kwargs or {}
        hidden, normed, (gate, *of_ff) = _modulated(self.norm1, hidden_states, temb)
        of_ff, second = of_ff[:3], of_ff[3:]
        if second:
            shift, scale, second_gate = second
            hidden, second_normed = add_layernorm(hidden, 1 + scale, shift, self.norm1.norm.eps)
        if self.context_pre_only:
            context, normed_context = encoder_hidden_states, self.norm1_context(encoder_hidden_states, temb)
        else:
            context, normed_context, of_context = _modulated(self.norm1_context, encoder_hidden_states, temb)
        attended, context_attended = self.attn(hidden_states=normed, encoder_hidden_states=normed_context, **given)
        if second:
            attention: Any = self.attn2
            hidden = gated_sum(hidden, gate, attended)
            attended, gate = attention(hidden_states=second_normed, **given), second_gate
        hidden = _feed_forward(self.norm2, self.ff, hidden, attended, gate, *of_ff)
        if self.context_pre_only:
            return None, hidden
        return _feed_forward(self.norm2_context, self.ff_context, context, context_attended, *of_context), hidden


class FusedFluxTransformerBlock(FluxTransformerBlock):
    """A block of FLUX.1 with layers of their own for the text."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        given = joint_attention_kwargs or {}
        # an image prompt adapter adds a third output of the attention
        norms = (self.norm1, self.norm1_context, self.norm2, self.norm2_context)
        if "ip_adapter_image_embeds" in given or "ip_hidden_states" in given or _are_hooked(*norms):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, given)
        hidden, normed, of_image = _modulated(self.norm1, hidden_states, temb)
        context, normed_context, of_context = _modulated(self.norm1_context, encoder_hidden_states, temb)
        attended, context_attended = self.attn(
            hidden_states=normed, encoder_hidden_states=normed_context, image_rotary_emb=image_rotary_emb, **given
        )
        hidden = _feed_forward(self.norm2, self.ff, hidden, attended, *of_image)
        context = _feed_forward(self.norm2_context, self.ff_context, context, context_attended, *of_context)
        return _in_range(context), hidden


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A block of FLUX.1 with the same layers for the image and the text."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        given = joint_attention_kwargs or {}
        if _are_hooked(self.norm):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, given)
        tokens = encoder_hidden_states.shape[1]
        rows, normed, (gate,) = _modulated(self.norm, torch.cat([encoder_hidden_states, hidden_states], dim=1), temb)
        inner = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **given)
        projected = self.proj_out(torch.cat([attended, inner], dim=2))
        rows = _in_range(gated_sum(rows, gate, projected))
        return rows[:, :tokens], rows[:, tokens:]


def has_layer_norms(block: Any) -> bool:
    """Whether the norms of a block are diffusers' usual ones, without weights of their own."""
    norms = [
        getattr(norm, "norm", norm)
        for name in ("norm", "norm1", "norm1_context", "norm2", "norm2_context")
        if (norm := getattr(block, name, None)) is not None
    ]
    return all(type(norm) is nn.LayerNorm and norm.weight is None for norm in norms)


def _are_hooked(*norms: Any) -> bool:
    """Whether anything else runs where norms, or the layer norms within them, are called."""
    return any(is_hooked(part) for norm in norms if norm is not None for part in (norm, getattr(norm, "norm", norm)))


def _modulated(norm: Any, rows: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The rows for the residual, the modulated norm, and what else the norm's layer makes of the time embedding."""
    embedding = norm.linear(norm.silu(temb))
    # contiguous vectors [N, D] by one copy
    shift, scale, *others = embedding.unflatten(1, (-1, rows.shape[-1])).transpose(0, 1).contiguous().unbind()
    rows, normed = add_layernorm(rows, 1 + scale, shift, norm.norm.eps)
    return rows, normed, others


def _feed_forward(
    norm: Any,
    layers: Any,
    rows: Tensor,
    attended: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    last_gate: Tensor,
) -> Tensor:
    """The rows after the gated attention and the gated feed-forward layers."""
    rows, normed = add_layernorm(attended, 1 + scale, shift, norm.eps, residual=rows, gate=gate)
    return gated_sum(rows, last_gate, layers(normed))


def _in_range(rows: Tensor) -> Tensor:
    return rows.clip(-LARGEST_FP16, LARGEST_FP16) if rows.dtype == torch.float16 else rows
