"""Computes layers of a UNet once per rollout that would give the same result at every denoising step.

During a rollout the weights do not change. So the keys and values of the cross-attention depend only on the prompts,
and the projected time embedding that each residual block adds depends only on the timestep. B rows, T steps, L tokens,
D width of the text embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ddpo_fast.unet.attention import is_plain
from ddpo_fast.unet.compiled_blocks import for_any_rows, is_compiled
from ddpo_fast.unet.time_addends import TimeAddends

# A UNet with one of these parts cannot be cached: its time embedding depends on more than the timestep, or its
# cross-attention on more than the text.
UNCACHED = ("class_embedding", "add_embedding", "time_embed_act", "encoder_hid_proj")


def cache_problem(unet: Any) -> str:
    """Why `UNetCache` cannot be used for a UNet, or '' if it can."""
    if not isinstance(unet, UNet2DConditionModel):
        return f"{type(unet).__name__} is no UNet2DConditionModel"
    modules: Iterable[Any] = unet.modules()
    if extra := next((name for name in UNCACHED if getattr(unet, name, None) is not None), None):
        return f"the UNet has {extra}"
    for module in modules:
        if hasattr(module, "time_emb_proj") and not isinstance(module, ResnetBlock2D):
            return f"{type(module).__name__} uses the time embedding in a way of its own"
        # keys and values of added projections, for instance, are of the image too
        if isinstance(module, Attention) and module.is_cross_attention and not is_plain(module):
            return f"{type(module.processor).__name__} may take keys and values from more than the text"
    return ""


class UNetCache:
    """The results of a UNet's layers that do not change during a rollout, for a UNet without a `cache_problem`.

    Call `fill` at the start of a rollout, and `at(step)` before each call of the UNet, inside `in_use()`. Buffers are
    reused from rollout to rollout if their size is the same, because captured CUDA graphs read from their addresses.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        attentions = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
        self.projections = [projection for attention in attentions for projection in (attention.to_k, attention.to_v)]
        self.blocks: list[Any] = [
            m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None
        ]
        self._context: list[Tensor] = []
        # what the time embedding gives if it is projected for all blocks together
        self._together: TimeAddends | None = None
        self._steps = torch.empty(0)
        self._row = torch.empty(0)

    @torch.no_grad()
    def fill(self, embeds_BLD: Tensor, timesteps_T: Tensor) -> None:
        """Computes the results for the text embeddings of a rollout's rows and for its timesteps."""
        context = [projection(embeds_BLD) for projection in self.projections]
        self._context = [kept_in_place(old, new) for old, new in zip(self._context or context, context, strict=True)]
        if any(map(is_compiled, self.blocks)):
            for_any_rows(*self._context)
        emb = self.unet.time_embedding(self.unet.time_proj(timesteps_T).to(embeds_BLD.dtype))
        self._together = emb if isinstance(emb, TimeAddends) else None
        if self._together is not None:
            self._steps = self._together.stacked
        else:
            added = [
                block.time_emb_proj(emb if block.skip_time_act else block.nonlinearity(emb)) for block in self.blocks
            ]
            self._steps = torch.cat(added, dim=1)
        # one row [1, ...] for all rows of the batch, which are at the same timestep
        self._row = kept_in_place(self._row, self._steps[:1])

    def at(self, step: int) -> None:
        """Selects the denoising step of the UNet's next call, by its index in `timesteps_T`."""
        self._row.copy_(self._steps[step : step + 1])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the cached layers return their stored results and compute nothing."""
        # only the cached layers use the time embedding itself, so an empty tensor can take its place
        nothing = self._row.new_empty(1, 0)
        embedding: Any = nothing
        if self._together is not None:
            embedding = TimeAddends(self._row, self._together.widths, self._together.shared)
        stand_ins: list[tuple[Any, Any]] = [(self.unet.time_proj, nothing), (self.unet.time_embedding, embedding)]
        stand_ins += zip(self.projections, self._context, strict=True)
        projections = [block.time_emb_proj for block in self.blocks]
        # These are views of `_row`. `at` overwrites `_row` in place, and so changes what the layers return at each
        # step.
        rows = self._row.split([projection.out_features for projection in projections], dim=1)
        stand_ins += zip(projections, rows, strict=True)
        # a module may already have a `forward` of its own, from accelerate's hooks for instance
        before = [vars(module).get("forward") for module, _ in stand_ins]
        for module, answer in stand_ins:
            module.answer, module.forward = answer, MethodType(_answer, module)
        try:
            yield
        finally:
            for (module, _), forward in zip(stand_ins, before, strict=True):
                del module.forward, module.answer
                if forward is not None:
                    module.forward = forward


def _answer(module: Any, *_args: Any, **_kwargs: Any) -> Any:
    # One function for all modules, with the result as an attribute: a compiled block reads the attribute at each call,
    # where it would be compiled again for another function.
    return module.answer


def kept_in_place(buffer: Tensor, values: Tensor) -> Tensor:
    """Copies the values into the buffer and returns it; returns a new one if shape, dtype or device differ."""
    same = (buffer.shape, buffer.dtype, buffer.device) == (values.shape, values.dtype, values.device)
    return buffer.copy_(values) if same else values.clone()
