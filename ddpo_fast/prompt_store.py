"""Keeps prompts' embeddings on disk, one safetensors file each, so that text encoders are needed once for each prompt.

A file is found by the SHA-256 of the text encoders, their precision and the prompt. It holds `ids` [L'] and `embeds`
[L, D], as `Family.encode` returns them, with the prompt in its metadata.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Encoded = tuple[Tensor, Tensor]
# the elements at both ends of a weight that tell one text encoder from another
SAMPLED = 64


class PromptStore:
    """The embeddings of prompts in a folder, which is made with the first.

    Args:
        key: of the text encoders, by `key_of`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{self.key} {prompt}'.encode()).hexdigest()}.safetensors"

    def read(self, prompt: str, device: torch.device) -> Encoded | None:
        """(ids, embeds) of a prompt on the device; None if it is not known, or its file is damaged."""
        try:
            with safe_open(self.path(prompt), "pt", device=str(device)) as file:
                return file.get_tensor("ids"), file.get_tensor("embeds")
        except (OSError, SafetensorError):
            return None

    def write(self, prompt: str, ids: Tensor, embeds: Tensor) -> None:
        path = self.path(prompt)
        self.folder.mkdir(parents=True, exist_ok=True)
        # other processes write the same files
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({"ids": ids.contiguous(), "embeds": embeds.contiguous()}, partial, {"prompt": prompt})
        partial.replace(path)


def key_of(encoders: Iterable[nn.Module], settings: str) -> str:
    """What embeddings depend on: names, shapes and ends of the text encoders' weights, and what `settings` says."""
    found = hashlib.sha256(settings.encode())
    for encoder in encoders:
        for name, weight in encoder.state_dict().items():
            found.update(f"{name} {tuple(weight.shape)}".encode())
            flat = weight.detach().flatten()
            found.update(torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).double().cpu().numpy().tobytes())
    return found.hexdigest()
