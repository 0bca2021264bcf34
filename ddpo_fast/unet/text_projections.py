"""Projects the text to the keys and values of all cross-attentions of a UNet by one matrix product.

Each cross-attention has two weights of its own for the same text. The product's weight is a copy of all of them, one
below the other, made at each call. B rows, L tokens, D width of the text, C channels of an attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ddpo_fast.unet.attention import SDPAProcessor
from ddpo_fast.unet.convolutions import is_hooked
from ddpo_fast.unet.linear_layers import are_one_op


class TextProjections:
    """The keys and values of a UNet's current call, computed for the first attention that takes its own.

    Args:
        attentions: the cross-attentions, in the order of their calls.
        blocks: the UNet's blocks, which know whether they are checkpointed: those compute their layers again, one by
            one, so each must project the text itself.
    """

    def __init__(self, attentions: tuple[Any, ...], blocks: tuple[Any, ...]) -> None:
        self.attentions, self.blocks = attentions, blocks
        self.end()

    def end(self) -> None:
        """Forgets the call."""
        self._context: Tensor | None = None
        self._left: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_open = False

    def begin(self) -> None:
        """Must be called in each call of the UNet before its first attention, because weights change between calls."""
        self.end()
        self._is_open = True

    def __getstate__(self) -> dict[str, Any]:
        # what belongs to a call is not copied
        return {"attentions": self.attentions, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.end()

    def take(self, index: int, context: Tensor) -> tuple[Tensor, Tensor] | None:
        """The key and value [B, L, C] of the attention at `index` for the text [B, L, D], once in a call.

        Returns None where the attention must compute them itself.
        """
        if self._is_open:
            self._is_open = False
            if self._fits(context):
                self._context, self._left = context, self._project(context)
        taken = self._left.pop(index, None) if context is self._context else None
        if not self._left:
            self._context = None
        return taken

    def _project(self, context: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        weights = [layer.weight for attention in self.attentions for layer in (attention.to_k, attention.to_v)]
        projected = F.linear(context, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
        return dict(enumerate(zip(projected[::2], projected[1::2], strict=True)))

    def _fits(self, context: Tensor) -> bool:
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in self.blocks)
        return not (torch.is_grad_enabled() and checkpointed) and all(
            isinstance(attention.processor, SDPAProcessor)
            and not is_hooked(attention)
            and are_one_op((attention.to_k, attention.to_v), context)
            for attention in self.attentions
        )


def project_text_together(unet: Any, block: type[nn.Module]) -> TextProjections | None:
    """Makes all cross-attentions of a UNet take their keys and values from one object, in place; returns it.

    Args:
        block: the class of the transformer blocks that take them. None is returned if a cross-attention is elsewhere.
    """
    found = tuple(m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention)
    taking = [module.attn2 for module in unet.modules() if type(module) is block]
    if not found or list(found) != taking:
        return None
    text = TextProjections(found, (*unet.down_blocks, unet.mid_block, *unet.up_blocks))
    for index, attention in enumerate(found):
        attention.text, attention.text_index = text, index
    return text


def project_text_apart(text: TextProjections | None) -> None:
    """Undoes `project_text_together`."""
    for attention in () if text is None else text.attentions:
        del attention.text, attention.text_index
