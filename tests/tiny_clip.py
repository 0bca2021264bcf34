"""Tiny CLIPs with random weights, written to folders in the layouts in which CLIPs are published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from ddpo_fast import tiny_sd

# of the bundled model's tokenizer: its number of tokens, with the first and the last of a prompt at the end
VOCABULARY, LENGTH = 789, 32
IMAGE, PATCH, WIDTH = 32, 8, 64
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_config(embed_width: int = 16) -> CLIPConfig:
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "eos_token_id": 788, "bos_token_id": 787}
    image = {"image_size": IMAGE, "patch_size": PATCH}
    return CLIPConfig(text_config={**LAYERS, **text}, vision_config={**LAYERS, **image}, projection_dim=embed_width)


def random_clip(config: CLIPConfig) -> CLIPModel:
    """A CLIP whose weights are large enough for its embeddings to depend on what is embedded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            clip.logit_scale.fill_(4.6)
    return clip


def write_clip(folder: Path, embed_width: int = 16, with_processor: bool = True) -> Path:
    """A folder as of `openai/clip-vit-large-patch14`."""
    random_clip(clip_config(embed_width)).save_pretrained(folder)
    if with_processor:
        write_processor(folder)
    return folder


def write_processor(folder: Path) -> Path:
    shutil.copytree(tiny_sd.MODEL / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": IMAGE, "crop_size": IMAGE, "resample": 3}))
    return folder


def examples(number: int, size: int = 40) -> torch.Tensor:
    """Random images [number, 3, size, size] in [0, 1]."""
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(1))


class Malicious:
    """What makes an empty file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mknod, (str(self.file),)
