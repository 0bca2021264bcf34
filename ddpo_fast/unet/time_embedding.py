"""Projects the time embedding for all residual blocks of a UNet by one matrix product, where each block has its own.

The product's weight is a copy of the blocks' weights, one below the other, made at each call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ddpo_fast.unet import convolutions
from ddpo_fast.unet.compiled_blocks import is_compiled
from ddpo_fast.unet.convolutions import is_bare, is_hooked
from ddpo_fast.unet.linear_layers import are_one_op
from ddpo_fast.unet.shared_halves import blocks_of_one_half, shares_halves
from ddpo_fast.unet.text_projections import TextProjections, project_text_apart, project_text_together
from ddpo_fast.unet.time_addends import TimeAddends


class TogetherTimestepEmbedding(TimestepEmbedding):
    """The time embedding of a UNet, projected for all its residual blocks, on devices other than the CPU.

    Where a block's layers are called as modules, by a hook for instance, it gives the embedding itself.
    """

    # set by `project_together`; in a tuple, so that they are no submodules of this one too
    readers: tuple[Any, ...]
    shared: int
    text: TextProjections | None

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Any:
        emb = super().forward(sample, condition)
        if any(map(is_compiled, self.readers)):
            return emb
        if self.text is not None:
            # every call of the UNet begins here
            self.text.begin()
        if not (convolutions.adds_in_kernels(emb) and self._are_bare(emb)):
            return emb
        layers = [block.time_emb_proj for block in self.readers]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        of_convolutions = torch.cat([block.conv1.bias for block in self.readers])
        # as two sums, whose gradients are two tensors: as one, both would be the same memory
        stacked = F.linear(F.silu(emb), weight, bias) + of_convolutions
        return TimeAddends(stacked, [layer.out_features for layer in layers], self.shared)

    def _are_bare(self, emb: Tensor) -> bool:
        return not is_hooked(self) and all(
            are_one_op((block.time_emb_proj,), emb, bias=True)
            and is_bare(block.nonlinearity, nn.SiLU)
            and is_bare(block.conv1, *convolutions.CONVOLUTIONS)
            and block.conv1.bias is not None
            and block.conv1.bias.dtype == emb.dtype
            for block in self.readers
        )


def project_together(unet: Any, kind: type[nn.Module], transformer_kind: type[nn.Module]) -> None:
    """Makes the time embedding of a UNet project itself for all residual blocks, in place, if the UNet shares halves.

    So nothing but these blocks reads the embedding, and all of them as `FusedResnetBlock2D` does: they must be of this
    `kind`. The text is projected for all transformer blocks of `transformer_kind`, if no other reads it.
    """
    if not shares_halves(unet):
        return
    embedding = unet.time_embedding
    blocks = [module for module in unet.modules() if hasattr(module, "time_emb_proj")]
    fits = all(type(block) is kind and block.time_emb_proj is not None and not block.skip_time_act for block in blocks)
    if type(embedding) is not TimestepEmbedding or not fits or is_hooked(embedding):
        return
    embedding.__class__ = TogetherTimestepEmbedding
    embedding.readers, embedding.shared = tuple(blocks), blocks_of_one_half(unet)
    for index, block in enumerate(blocks):
        block.reader_index = index
    embedding.text = project_text_together(unet, transformer_kind)


def project_apart(unet: Any) -> None:
    """Undoes `project_together`."""
    embedding: Any = getattr(unet, "time_embedding", None)
    if type(embedding) is TogetherTimestepEmbedding:
        for block in embedding.readers:
            del block.reader_index
        project_text_apart(embedding.text)
        del embedding.readers, embedding.shared, embedding.text
        embedding.__class__ = TimestepEmbedding
