"""The transformer block of Stable Diffusion's UNets with fewer kernels: sums and the layer norms after them are one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ddpo_fast.ops.add_layernorm import MOST_RANK, add_layernorm
from ddpo_fast.ops.lora_linear import two_products
from ddpo_fast.unet import convolutions
from ddpo_fast.unet.attention import SDPAProcessor
from ddpo_fast.unet.compiled_blocks import is_compiled
from ddpo_fast.unet.convolutions import is_bare, is_hooked
from ddpo_fast.unet.linear_layers import FusedLinear, FusedLoraLinear, query_key_value
from ddpo_fast.unet.residual_sums import add_product_, later_bias, leaves_sums
from ddpo_fast.unet.shared_halves import SharingBlock, with_rows_of


def without_bias(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear layer without its bias, and the bias, for a kernel that adds it and sums its gradient; None if added.

    A layer adds its bias itself on a CPU, where no kernel is saved, and where more than a linear layer is called.
    """
    if not (convolutions.adds_in_kernels(x) and is_bare(layer, nn.Linear, FusedLinear)):
        return layer(x), None
    return F.linear(x, layer.weight), layer.bias


def without_additions(layer: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A linear layer without its bias and without the last product of an adapter, and both as `add_layernorm` takes
    them."""
    adapter = layer.only_adapter() if is_bare(layer, FusedLoraLinear) and leaves_sums(x) else None
    if adapter is None or layer.r[adapter] > MOST_RANK or layer.base_layer.weight.dtype != x.dtype:
        rows, bias = without_bias(layer, x)
        return rows, {"added": bias}
    base, factors = layer.base_layer, (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    a, up = (factor.to(x.dtype) for factor in factors)
    rows, low = two_products(x, base.weight, a)
    return rows, {"added": base.bias, "low": low, "up": up, "factor": float(layer.scaling[adapter])}


class FusedBasicTransformerBlock(SharingBlock):
    """A block of self-attention, cross-attention and feed-forward layers, each after a layer norm of the sum so far."""

    # the transformer whose first block it is; set by `fuse_unet`, in a tuple, so that it is no submodule of this one
    first_of: tuple[Any] | None = None

    def bias_before(self, x: Tensor) -> Tensor | None:
        """The bias that the transformer's `proj_in` adds without a gradient, as its gradient is computed here."""
        if is_compiled(self) or self.first_of is None or is_hooked(self):
            return None
        bias: Tensor | None = self.first_of[0].detached_bias(x)
        return bias

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
        context, given = encoder_hidden_states, cross_attention_kwargs or {}
        norms: tuple[Any, ...] = (self.norm1, self.norm2, self.norm3)
        plain = all(is_bare(norm, nn.LayerNorm) for norm in norms)
        before = self.bias_before(hidden_states)
        if not plain or self._chunk_size is not None or hidden_states.ndim != 3 or "gligen" in given:
            if before is not None:
                hidden_states = hidden_states + (before - before.detach())
            return super().forward(
                hidden_states, attention_mask, context, encoder_attention_mask, timestep, given, *args, **kwargs
            )
        first, second, third = ((norm.weight, norm.bias, norm.eps) for norm in norms)
        hidden, normed = add_layernorm(hidden_states, *first, added=before)
        attended, added = _attend(self.attn1, normed, None, attention_mask, given)
        hidden, normed = add_layernorm(attended, *second, residual=hidden, **added)
        if context is not None:
            # the rows of guidance have been the same up to here
            hidden, normed = (with_rows_of(context, rows) for rows in (hidden, normed))
        attended, added = _attend(self.attn2, normed, context, encoder_attention_mask, given)
        last = _last_layer(self.ff)
        later = None if last is None else later_bias(last, attended)
        hidden, normed = add_layernorm(attended, *third, residual=hidden, later=later, **added)
        return self.ff(normed) + hidden if later is None else add_product_(hidden, last, self.ff.net[0](normed))


def fits_block(block: Any) -> bool:
    """Whether `FusedBasicTransformerBlock` computes the same."""
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
    )


def _last_layer(ff: Any) -> Any:
    """The linear layer at the end of feed-forward layers, if only their first layer runs before it; else None."""
    layers = list(ff.net)
    plain = type(ff) is FeedForward and len(layers) == 3 and not any(map(is_hooked, (ff, ff.net, layers[1])))
    return layers[2] if plain and type(layers[1]) is nn.Dropout and not (ff.training and layers[1].p > 0) else None


def _attend(
    attention: Any, rows: Tensor, context: Tensor | None, mask: Tensor | None, given: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The attention, and what its last layer adds that is not added yet, as `add_layernorm` takes it."""
    processor = attention.processor
    plain = isinstance(processor, SDPAProcessor) and not is_hooked(attention) and mask is None and not given
    if not plain or (attention.training and attention.to_out[1].p > 0):
        return attention(rows, encoder_hidden_states=context, attention_mask=mask, **given), {}
    heads = (row.unflatten(-1, (attention.heads, -1)) for row in query_key_value(attention, rows, context))
    return without_additions(attention.to_out[0], processor.attend(*heads).flatten(2))
