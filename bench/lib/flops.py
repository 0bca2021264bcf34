"""FLOPs of a model, and the most FLOP/s that a device reaches in its vendor's library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lib.timing import Clock

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRL_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def flops_of(folder: Path, use_lora: bool) -> dict[str, float]:
    """FLOPs (two for a multiply-add) of a UNet row's forward pass, of its forward and backward pass, and of decoding an
    image.

    Counted on tensors without values. Norms, activations and the text encoder (less than 0.1 %) are left out.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import LoraConfig

    text = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        if use_lora:
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TRL_TARGETS))
        latents = torch.empty(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
        embeds = torch.empty(1, text["max_position_embeddings"], unet.config.cross_attention_dim)
        row = (latents, torch.ones(1), embeds)
        with torch.no_grad():
            forward = count_flops(lambda: unet(*row))
            decoded = count_flops(lambda: vae.decode(latents))
        trained = count_flops(lambda: unet(*row).sample.sum().backward())
    return {"forward": forward, "trained": trained, "decoded": decoded}


def count_flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak_tflops(device: str, precision: str, size: str) -> tuple[float, str]:
    """(TFLOP/s, what reached them): the best of a few matmuls and convolutions of the vendor's library."""
    if device == "cuda":
        # both trainers switch TF32 on for fp32
        torch.backends.cuda.matmul.allow_tf32 = True
    clock, rates = Clock(device), {}
    with torch.no_grad():
        for name, call, flops in library_calls(device, DTYPES[precision], size):
            repeats = clock.repeats(call, 0.05)
            rates[name] = flops / min(clock.sample(call, repeats) for _ in range(3)) / 1e6
    if device == "cuda":
        torch.cuda.empty_cache()
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


def library_calls(device: str, dtype: torch.dtype, size: str) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """(name, call, FLOPs) of a square matmul and of the UNet's frequent convolutions, large enough to keep it busy."""
    n, images = {"tiny": (512, 1), "cpu": (2048, 2), "cuda": (8192, 48)}[size if size == "tiny" else device]
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    yield f"mm {n} {dtype}", lambda: a @ b, 2.0 * n**3
    for channels, edge in ((320, 64), (640, 32)):
        x = torch.randn(images, channels, edge, edge, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        for k in (1, 3):
            weight = torch.randn(channels, channels, k, k, device=device, dtype=dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            name = f"conv {k}x{k} {images} x {channels} x {edge} x {edge} {dtype}"
            flops = 2.0 * images * (edge * channels * k) ** 2
            yield name, lambda x=x, weight=weight, k=k: F.conv2d(x, weight, padding=k // 2), flops
