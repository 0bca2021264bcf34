"""The attention of Stable Diffusion 3's blocks, of the image's and the text's tokens together, with fewer copies.

B rows, M tokens, H heads of K channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from ddpo_fast.unet.linear_layers import project_three


class JointProcessor(JointAttnProcessor2_0):
    """diffusers' joint attention, with tokens in the order [B, M, H, K] that the projections write.

    diffusers joins them as [B, H, M, K], which attention returns too, so that the result is copied for the last layers;
    and it takes the image's and the text's part by slices, whose gradients are filled with zeros and added. The
    gradients of the input from query, key and value are added by matrix products.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        rows = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            of_text = _heads(attn, encoder_hidden_states, layers, (attn.norm_added_q, attn.norm_added_k))
            rows = [torch.cat(pair, dim=1) for pair in zip(rows, of_text, strict=True)]
        query, key, value = (row.transpose(1, 2) for row in rows)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        projection, dropout = attn.to_out
        if encoder_hidden_states is None:
            return dropout(projection(attended))
        # as one op, whose gradient is one concatenation
        image, text = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return dropout(projection(image)), text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, rows: Tensor, layers: tuple[Any, Any, Any], norms: tuple[Any, Any]) -> list[Tensor]:
    """Query, key and value [B, M, H, K]. Parts of longer rows would be copied by the norms."""
    projected = project_three(layers, rows, packed=norms[0] is None)
    query, key, value = (row.unflatten(-1, (attn.heads, -1)) for row in projected)
    query, key = (row if norm is None else norm(row) for row, norm in zip((query, key), norms, strict=True))
    return [query, key, value]
