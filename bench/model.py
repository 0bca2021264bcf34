"""A Stable Diffusion 1.5 of random weights, the FLOPs of a model, and the most that a device's library reaches.

    python bench/model.py [--device cpu|cuda] [--size tiny|full] [--output FILE.json]

makes the model that `throughput.py` measures, which takes a while, and writes down its FLOPs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from timing import Clock
from torch.utils.flop_counter import FlopCounterMode

from ddpo_fast.ops.extension import private_cache
from ddpo_fast.tiny_sd import MODEL as BUNDLED

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRL_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = default_model(options.device, options.size)
    flops = {name: flops_of(folder, use_lora) for name, use_lora in (("full", False), ("lora", True))}
    said = json.dumps({"folder": str(folder), **flops})
    print(said)
    if options.output:
        options.output.write_text(said + "\n")


def default_model(device: str, size: str) -> Path:
    """The bundled model on a CPU or at tiny size, else one of Stable Diffusion 1.5's size."""
    return sd15(device) if device == "cuda" and size == "full" else BUNDLED


def sd15(device: str) -> Path:
    """The folder of a pipeline of random weights, made at the first call."""
    cache = private_cache()
    folder = cache / "sd15_random"
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        # the weights in half precision, as the original's are mostly downloaded
        make_sd15(device).to("cpu", torch.float16).save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:
            # another process was faster
            shutil.rmtree(made)
    return folder


def make_sd15(device: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ddpo_fast.tiny_sd.build import pipeline

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=TOKENS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        **special,
    )
    with torch.device(device):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            sample_size=64,
            layers_per_block=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            latent_channels=4,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(text)
    return pipeline(vae, text_encoder, tokenizer, unet)


def flops_of(folder: Path, use_lora: bool) -> dict[str, float]:
    """FLOPs (two a multiply-add) of a UNet row forward, forward and backward, and of the decoding of an image.

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
            forward = counted(lambda: unet(*row))
            decoded = counted(lambda: vae.decode(latents))
        trained = counted(lambda: unet(*row).sample.sum().backward())
    return {"forward": forward, "trained": trained, "decoded": decoded}


def counted(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak_tflops(device: str, precision: str, size: str) -> tuple[float, str]:
    """(TFLOP/s, which): the best of a few matmuls and convolutions of the vendor's library in this precision."""
    if device == "cuda":
        # as both trainers set it: their fp32 is TF32
        torch.backends.cuda.matmul.allow_tf32 = True
    clock, rates = Clock(device), {}
    with torch.no_grad():
        for name, call, flops in candidates(device, DTYPES[precision], size):
            repeats = clock.repeats(call, 0.05)
            rates[name] = flops / min(clock.sample(call, repeats) for _ in range(3)) / 1e6
    if device == "cuda":
        torch.cuda.empty_cache()
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


def candidates(device: str, dtype: torch.dtype, size: str) -> Iterator[tuple[str, Callable[[], Any], float]]:
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


if __name__ == "__main__":
    main()
