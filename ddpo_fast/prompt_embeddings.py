"""Text embeddings of prompts. Each is computed once, because the text encoders are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpo_fast.families import Family

# The text encoder is always called with this many prompts. The bits of an embedding may depend on the number of rows,
# and a resumed run, which encodes its prompts in other groups, must get the same bits.
ENCODED_AT_ONCE = 8
# prompts above which the kept embeddings are dropped, to bound their memory
MOST_KEPT = 4096


class PromptEmbeddings:
    """Token ids and embeddings of prompts on the device.

    Args:
        remembers: whether to keep embeddings; they are never kept while a text encoder itself is trained.
    """

    def __init__(self, family: Family, device: torch.device, remembers: bool) -> None:
        self.family = family
        self.device = device
        trained = any(p.requires_grad for encoder in family.text_encoders.values() for p in encoder.parameters())
        self.remembers = remembers and not trained
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts: (token ids [B, L], embeddings [B, L, D])."""
        if not self.remembers:
            return self.family.encode(prompts, self.device)
        if len(self._known) > MOST_KEPT:
            self._known.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            few = new[start : start + ENCODED_AT_ONCE]
            encoded = self.family.encode(few + few[-1:] * (ENCODED_AT_ONCE - len(few)), self.device)
            # not strict: the encoded rows beyond `few` are padding
            for prompt, prompt_ids, embedding in zip(few, *encoded, strict=False):
                # cloned: a view would keep the whole batch alive
                self._known[prompt] = prompt_ids.clone(), embedding.clone()
        known = [self._known[prompt] for prompt in prompts]
        return torch.stack([ids for ids, _ in known]), torch.stack([embedding for _, embedding in known])

    def negative(self, prompt: str | None) -> torch.Tensor:
        """The embedding [1, L, D] of a run's negative prompt; '' and None mean that it has none."""
        embeds = self([prompt or ""])[1]
        return embeds if prompt else self.family.no_negative(embeds)
