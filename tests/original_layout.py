"""Writes pipelines in the layout in which Stable Diffusion 1.x, 2.x and XL were first published: one file of weights.

The names are the inverse of those that diffusers converts them to (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0",
    r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "conv_norm_out": "norm_out",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0": "proj_out",
    r"downsamplers\.0": "downsample",
    r"upsamplers\.0": "upsample",
}
OPEN_CLIP = {
    r"^embeddings\.token_embedding": "token_embedding",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    "^final_layer_norm": "ln_final",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"layer_norm(\d)": r"ln_\1",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def renamed(name: str, rules: dict[str, str]) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


def unet_name(name: str, unet: Any) -> str:
    depth = unet.config.layers_per_block + 1
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)(\.conv)?", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        place = depth * (block + 1) if kind == "downsamplers" else depth * block + layer + 1
        inner = {"resnets": ".0", "attentions": ".1", "downsamplers": ".0.op"}[kind]
        name = f"input_blocks.{place}{inner}{name[found.end() - len(found[4] or '') * (kind != 'downsamplers') :]}"
    elif found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        place = depth * block + (depth - 1 if kind == "upsamplers" else layer)
        has_attention = hasattr(unet.up_blocks[block], "attentions")
        inner = {"resnets": ".0", "attentions": ".1", "upsamplers": ".2" if has_attention else ".1"}[kind]
        name = f"output_blocks.{place}{inner}{name[found.end() :]}"
    name = renamed(name, UNET)
    is_resnet = re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", name)
    return "model.diffusion_model." + (renamed(name, RESNET) if is_resnet else name)


def vae_name(name: str, vae: Any) -> str:
    last = len(vae.config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
    name = re.sub(r"((?:down|up)\.\d+)\.resnets", r"\1.block", name)
    return "first_stage_model." + renamed(name, VAE)


def open_clip(encoder: Any, prefix: str) -> Weights:
    given = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    made: Weights = {}
    for name, value in given.items():
        if name == "text_projection.weight":
            made[f"{prefix}text_projection"] = value.T.contiguous()
        elif found := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            joined = torch.cat([given[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
            made[f"{prefix}transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"] = joined
        elif not re.search(r"self_attn\.[kv]_proj", name):
            made[prefix + renamed(name, OPEN_CLIP)] = value
    return made


def clip(encoder: Any, prefix: str) -> Weights:
    state = encoder.state_dict().items()
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state}


def weights_of(pipe: Any) -> Weights:
    """The tensors of a Stable Diffusion; one whose second channel of text projects, or pads otherwise, is of 2.x."""
    made = {unet_name(name, pipe.unet): value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        # an attention of the VAE was one of 1 x 1 convolutions
        is_conv = "attentions" in name and value.ndim == 2
        made[vae_name(name, pipe.vae)] = value[:, :, None, None] if is_conv else value
    if hasattr(pipe, "text_encoder_2"):
        made |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        made |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.unet.config.use_linear_projection:
        made |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        made |= clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return made


def save(pipe: Any, file: Path, **more: torch.Tensor) -> Path:
    """Writes a pipeline's weights into one file, with `more` tensors, and returns the file."""
    save_file({name: value.contiguous() for name, value in {**weights_of(pipe), **more}.items()}, file)
    return file
