"""CLIPs in the layout of the package open_clip, which is not needed to read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CLIPConfig

from ddpo_fast.rewards.clip import TOKENIZERS, ClipNetwork
from ddpo_fast.rewards.clip_images import ImageFormat
from ddpo_fast.rewards.weight_files import fetch, file_of, local_path, read_weights

# The width of an attention head in the image encoder, by the encoder's width where it is not 64: no tensor tells it.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
_HEAD_WIDTH = 64
# ViT-H/14, in the words of transformers' config
_VIT_H_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_VIT_H_IMAGE = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# names of tensors in open_clip and in transformers
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
# matrices that open_clip multiplies with from the other side
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


class OpenClipNetwork(ClipNetwork):
    """A CLIP whose weights are in open_clip's layout: one file, of which the sizes of the network are read too.

    Args:
        model: the file, or the folder or Hub id that has a file of the name `file`.
        file: its name on the Hub.
        processor: folder or Hub id of the tokenizer.
        others: see `ClipNetwork`.
    """

    def __init__(self, model: str, *, file: str, processor: str, **others: Any) -> None:
        self.file = file
        super().__init__(model, processor=processor, **others)

    def _check_files(self) -> None:
        if local_path(self.option, self.model) is not None:
            self._config()
        if local_path(self.processor_option, self.processor) is not None:
            fetch(self.processor_option, self.processor, *TOKENIZERS)

    def _config(self) -> Any:
        # what is on the Hub is ViT-H/14, whose memory can be told before it is downloaded
        if local_path(self.option, self.model) is None:
            return _config(_VIT_H_TEXT, _VIT_H_IMAGE, 1024)
        return config_of(self._read())

    def _weights(self) -> dict[str, torch.Tensor]:
        return to_transformers(self._read())

    def _image_format(self) -> ImageFormat:
        size = self._config().vision_config.image_size
        return ImageFormat(size, size, pads=True)

    def _read(self) -> dict[str, torch.Tensor]:
        path = file_of(self.option, self.model, self.file)
        found = read_weights(path)
        if not {*_NAMES, *_TRANSPOSED} <= found.keys():
            raise ValueError(
                f"{self.option} is {self.model!r}, whose {path.name} is no CLIP of open_clip: it has no "
                f"{min({*_NAMES, *_TRANSPOSED} - found.keys())}"
            )
        return found


def config_of(tensors: Mapping[str, torch.Tensor]) -> CLIPConfig:
    """The config of a CLIP with tensors of these names and shapes in open_clip's layout."""
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    width, _, _, patch = tensors["visual.conv1.weight"].shape
    text = {
        "hidden_size": text_width,
        "num_attention_heads": text_width // _HEAD_WIDTH,
        "vocab_size": vocabulary,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        **_layer_sizes(tensors, ""),
    }
    patches = len(tensors["visual.positional_embedding"]) - 1
    image = {
        "hidden_size": width,
        "num_attention_heads": width // _HEAD_WIDTHS.get(width, _HEAD_WIDTH),
        "patch_size": patch,
        "image_size": patch * math.isqrt(patches),
        **_layer_sizes(tensors, "visual."),
    }
    return _config(text, image, tensors["text_projection"].shape[1])


def _layer_sizes(tensors: Mapping[str, torch.Tensor], tower: str) -> dict[str, int]:
    blocks = {found[2] for key in tensors if (found := _BLOCK.fullmatch(key)) and (found[1] or "") == tower}
    hidden = tensors[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"]
    return {"num_hidden_layers": len(blocks), "intermediate_size": len(hidden)}


def _config(text: dict[str, int], image: dict[str, int], width: int) -> CLIPConfig:
    # A prompt's embedding is read at its highest token in open_clip, for which transformers' config has the number 2.
    return CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 2},
        vision_config={**image, "hidden_act": "gelu"},
        projection_dim=width,
    )


def to_transformers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a CLIP in open_clip's layout by their names in transformers, which has three matrices for one."""
    return dict(renamed for key, tensor in tensors.items() for renamed in _renamed(key, tensor))


def _renamed(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor by its name in transformers, or in thirds by theirs; by its own name if it belongs nowhere."""
    stem, _, kind = key.rpartition(".")
    block = _BLOCK.fullmatch(key)
    if block is not None:
        tower, number, stem, kind = block.groups()
        layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
        if stem == "attn.in_proj":
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{layer}.self_attn.{part}_proj.{kind}", third
            return
        yield (f"{layer}.{_LAYERS[stem]}.{kind}" if stem in _LAYERS else key), tensor
    elif key in _TRANSPOSED:
        yield _TRANSPOSED[key], tensor.T.contiguous()
    elif stem in _NORMS:
        yield f"{_NORMS[stem]}.{kind}", tensor
    else:
        yield _NAMES.get(key, key), tensor
