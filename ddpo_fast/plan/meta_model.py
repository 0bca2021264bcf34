"""A model's networks on PyTorch's `meta` device, from its config files, called as its family calls them.

On `meta` a tensor has a shape and a dtype but no values.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig, T5Config

from ddpo_fast.families import Family
from ddpo_fast.model_configs import ModelConfigs

# tokens that diffusers' pipelines give to T5, by the pipeline's class
T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}
# the lists of blocks of networks
BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")


def frozen_networks(configs: ModelConfigs, dtype: torch.dtype) -> dict[str, Any]:
    """The frozen networks of a run that computes in `dtype`, by name, in the precisions that the family wants."""
    found = {}
    for name in configs.family.frozen:
        if name in configs.parts:
            network = made(configs, name).eval().requires_grad_(False)
            found[name] = in_precision(network, configs.family.dtype_of(name, network.config, dtype))
    return found


def made(configs: ModelConfigs, part: str) -> Any:
    """A network by its part's name, in fp32."""
    kind, config = configs.family.parts[part][0], configs.parts[part]
    with torch.device("meta"):
        if hasattr(diffusers, kind):
            return getattr(diffusers, kind).from_config(config)
        settings: Any = T5Config if kind.startswith("T5") else CLIPTextConfig
        return getattr(transformers, kind)(settings(**config))


def in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a network's parameters without `network.to(dtype)`, for which diffusers prints a warning."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def family_of_network(
    configs: ModelConfigs, network: Any, frozen: dict[str, Any], steps: int, size: tuple[int | None, int | None]
) -> Family:
    """The family of a pipeline with these networks, ready to call the trained one for images of `size` (pixels)."""
    # encoders that a model lacks have a config of their family's others, and no weights
    parts = dict.fromkeys(configs.family.frozen) | frozen | {configs.family.network: network}
    family = configs.family(SimpleNamespace(**parts, scheduler=configs.sampling_scheduler))
    family.use(*size)
    family.set_steps(steps, "cpu")
    family.pipe.scheduler.timesteps = family.pipe.scheduler.timesteps.to("meta")
    return family


def embedding_shape(configs: ModelConfigs) -> tuple[int, int]:
    """(L, D) of a prompt's embedding, its rows that hold a pooled embedding included."""
    family, network = configs.family, configs.parts[configs.family.network]
    width = network.get("joint_attention_dim") or network["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    t5 = T5_TOKENS.get(family.pipelines[0], 0)
    # FLUX reads CLIP's pooled embedding and T5's tokens, the others read CLIP's tokens
    clip = 0 if family.pipelines[0] == "FluxPipeline" else configs.parts["text_encoder"]["max_position_embeddings"]
    pooled = network.get("pooled_projection_dim", 0)
    if network.get("addition_embed_type") == "text_time":
        pooled = configs.parts["text_encoder_2"]["projection_dim"]
    return clip + t5 - (-pooled // width), width


def largest_block(network: Any) -> int:
    """The number of weights of the network's largest block."""
    blocks: list[nn.Module] = []
    for name in BLOCKS:
        part = getattr(network, name, None)
        blocks += part if isinstance(part, nn.ModuleList) else [part] if part is not None else []
    return max(sum(p.numel() for p in block.parameters()) for block in blocks)


def encode(configs: ModelConfigs, name: str, encoder: Any, prompts: int) -> None:
    """Calls a text encoder on `meta` as the family's pipeline calls it."""
    t5 = T5_TOKENS.get(configs.family.pipelines[0], 0)
    is_t5 = "max_position_embeddings" not in configs.parts[name]
    length = t5 if is_t5 else configs.parts[name]["max_position_embeddings"]
    # SDXL and SD3 take the output of a CLIP's last layer but one, for which all are kept
    every = not is_t5 and "text_encoder_2" in configs.parts and configs.family.pipelines[0] != "FluxPipeline"
    encoder(torch.empty(prompts, length, dtype=torch.int64, device="meta"), output_hidden_states=every)


def bytes_of(network: nn.Module) -> int:
    """Bytes of a network's frozen weights, quantized ones included."""
    tensors = [*(p for p in network.parameters() if not p.requires_grad), *network.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
