"""Networks of published sizes on the device `meta`, in half precision, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib import random_families
from lib.sd15_random import make_sd15

HALF = torch.float16
LORA_RANK = 4
# name -> (pipeline, pixels of an image's side)
PIPELINES: dict[str, tuple[Callable[[], Any], int]] = {
    "sd1.5": (lambda: make_sd15("meta"), 512),
    "sdxl": (lambda: random_families.make("sdxl", "meta"), 1024),
    "sd3.5-medium": (lambda: random_families.make("sd3.5-medium", "meta"), 1024),
}
VARIANTS = ("eager", "fused", "compiled", "fused and compiled")


def make_network(name: str) -> nn.Module:
    """The network alone, trained with all weights."""
    pipeline = PIPELINES[name][0]()
    network = pipeline.transformer if name == "sd3.5-medium" else pipeline.unet
    return network.to(HALF).requires_grad_().eval()


def prepare(network: nn.Module, variant: str, lora: bool) -> nn.Module:
    """Adds an adapter of rank 4 to the attention, and fuses the network as training does on a GPU.

    'eager' is plain diffusers and PEFT, with contiguous images; the others run in channels_last. 'compiled' is the same
    with its repeated blocks compiled, to be called within `traffic_compiled.a_gpu`.
    """
    from ddpo_fast.unet.fused_layers import faster_layers, fuse_unet

    if lora:
        from peft import LoraConfig

        network.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        network.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
        network.to(HALF)
    if variant != "eager":
        network.to(memory_format=torch.channels_last)
    if "fused" in variant:
        fuse_unet(network, faster_layers("cuda"))
    if "compiled" in variant:
        from lib.traffic_compiled import compile_for_counting

        compile_for_counting(network)
    return network


def call_of(network: Any, name: str, rows: int, channels_last: bool) -> Callable[[], Tensor]:
    """A call of the network with `rows` rows, half of them with the negative prompt."""
    from ddpo_fast.unet.shared_halves import shares_halves

    config, edge = network.config, PIPELINES[name][1] // 8
    empty = partial(torch.empty, dtype=HALF, device="meta")
    # both rows of guidance have the same latents and timestep
    latent_rows = rows // 2 if shares_halves(network) else rows
    latents = empty(latent_rows, config.in_channels, edge, edge)
    if channels_last:
        latents = latents.to(memory_format=torch.channels_last)
    if name == "sd3.5-medium":
        # 77 tokens of the CLIPs and 256 of T5
        given = {
            "encoder_hidden_states": empty(rows, 77 + 256, config.joint_attention_dim),
            "pooled_projections": empty(rows, config.pooled_projection_dim),
        }
    else:
        given = {"encoder_hidden_states": empty(rows, 77, config.cross_attention_dim)}
    if config.get("addition_embed_type"):
        given["added_cond_kwargs"] = {"text_embeds": empty(rows, 1280), "time_ids": empty(rows, 6)}
    timesteps = torch.empty(latent_rows, dtype=torch.int64, device="meta")
    return lambda: network(latents, timestep=timesteps, return_dict=False, **given)[0]
