"""Text embeddings of prompts. Each is computed once, because the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from ddpo_fast.offload_frozen import on_device

# The text encoder is always called with this many prompts. The bits of an embedding may depend on the number of rows,
# and a resumed run, which encodes its prompts in other groups, must get the same bits.
ENCODED_AT_ONCE = 8
# prompts above which the kept embeddings are dropped, to bound their memory
MOST_KEPT = 4096


class PromptEmbeddings:
    """Token ids and embeddings of prompts on the device.

    Args:
        tokenizer, text_encoder: a pipeline's.
        remembers: whether to keep embeddings; they are never kept while the text encoder itself is trained.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, device: torch.device, remembers: bool) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.device = device
        self.remembers = remembers and not any(p.requires_grad for p in text_encoder.parameters())
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts: (token ids [B, L], embeddings [B, L, D])."""
        if not self.remembers:
            return self._encode(prompts)
        if len(self._known) > MOST_KEPT:
            self._known.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            few = new[start : start + ENCODED_AT_ONCE]
            encoded = self._encode(few + few[-1:] * (ENCODED_AT_ONCE - len(few)))
            # not strict: the encoded rows beyond `few` are padding
            for prompt, prompt_ids, embedding in zip(few, *encoded, strict=False):
                # cloned: a view would keep the whole batch alive
                self._known[prompt] = prompt_ids.clone(), embedding.clone()
        known = [self._known[prompt] for prompt in prompts]
        return torch.stack([ids for ids, _ in known]), torch.stack([embedding for _, embedding in known])

    def _encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._tokens(prompts)
        ids = tokens.input_ids.to(self.device)
        # the mask is passed where StableDiffusionPipeline.encode_prompt passes it
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        with on_device(self.text_encoder, self.device):
            return ids, self.text_encoder(ids, attention_mask=mask)[0]

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Ids [B, L], truncated or padded to the tokenizer's length."""
        return self._tokens(prompts).input_ids.to(self.device)

    def _tokens(self, prompts: Sequence[str]) -> Any:
        # a textual inversion of several vectors is one word in the prompt and several tokens
        whole = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), self.tokenizer)
        return self.tokenizer(
            whole,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
        )
