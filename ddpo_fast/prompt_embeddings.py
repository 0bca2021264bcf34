"""Text embeddings of prompts. Each is computed once, because the text encoders are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpo_fast.families import Family
from ddpo_fast.prompt_store import PromptStore

# The text encoder is always called with this many prompts. The bits of an embedding may depend on the number of rows,
# and a resumed run, which encodes its prompts in other groups, must get the same bits.
ENCODED_AT_ONCE = 8
# bytes above which kept embeddings make room for new ones: 2000 prompts of Stable Diffusion 1.x in bf16, 60 of FLUX
MOST_KEPT = 250_000_000


class PromptEmbeddings:
    """Token ids and embeddings of prompts on the device.

    Args:
        remembers: whether to keep embeddings; they are never kept while a text encoder itself is trained.
        store: keeps them on disk too.

    Raises `ValueError` for a store while a text encoder is trained.
    """

    def __init__(self, family: Family, device: torch.device, remembers: bool, store: PromptStore | None = None) -> None:
        self.family = family
        self.device = device
        self.store = store
        trained = any(p.requires_grad for encoder in family.text_encoders.values() for p in encoder.parameters())
        if store is not None and trained:
            raise ValueError("embed_prompts_once is True, but a text encoder is trained: leave it out")
        self.remembers = (remembers or store is not None) and not trained
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts: (token ids [B, L], embeddings [B, L, D])."""
        if not self.remembers:
            return self.family.encode(prompts, self.device)
        self.keep(prompts)
        known = [self._known[prompt] for prompt in prompts]
        return torch.stack([ids for ids, _ in known]), torch.stack([embedding for _, embedding in known])

    @torch.no_grad()
    def keep(self, prompts: Sequence[str]) -> None:
        """Makes sure that the prompts' embeddings are on the device, where they stay for the next call at least."""
        wanted = list(dict.fromkeys(prompts))
        if all(prompt in self._known for prompt in wanted):
            return
        if self.kept_bytes > MOST_KEPT:
            self._known = {prompt: self._known[prompt] for prompt in wanted if prompt in self._known}
        new = []
        for prompt in wanted:
            if prompt in self._known:
                continue
            if self.store is not None and (found := self.store.read(prompt, self.device)) is not None:
                self._known[prompt] = found
            else:
                new.append(prompt)
        for start in range(0, len(new), ENCODED_AT_ONCE):
            few = new[start : start + ENCODED_AT_ONCE]
            encoded = self.family.encode(few + few[-1:] * (ENCODED_AT_ONCE - len(few)), self.device)
            # not strict: the encoded rows beyond `few` are padding
            for prompt, prompt_ids, embedding in zip(few, *encoded, strict=False):
                # cloned: a view would keep the whole batch alive
                self._known[prompt] = prompt_ids.clone(), embedding.clone()
                if self.store is not None:
                    self.store.write(prompt, *self._known[prompt])

    @property
    def kept_bytes(self) -> int:
        """Bytes of the embeddings that are on the device."""
        return sum(ids.nbytes + embeds.nbytes for ids, embeds in self._known.values())

    def embed_all(self, prompts: Sequence[str]) -> None:
        """Makes sure that the store has each of the prompts."""
        assert self.store is not None, "without a store they would be dropped again"
        new = [prompt for prompt in prompts if not self.store.path(prompt).exists()]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            self.keep(new[start : start + ENCODED_AT_ONCE])

    def negative(self, prompt: str | None) -> torch.Tensor:
        """The embedding [1, L, D] of a run's negative prompt; '' and None mean that it has none."""
        embeds = self([prompt or ""])[1]
        return embeds if prompt else self.family.no_negative(embeds)
