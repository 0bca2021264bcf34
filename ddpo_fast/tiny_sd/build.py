"""Trains the bundled model: `torchrun --nproc_per_node 2 -m ddpo_fast.tiny_sd.build --work-dir build/tiny_sd`.

Four stages, each of which writes a file that the next one reads (delete a file to redo its stage): the tokenizer
and captioned images, the autoencoder, its latents, then the denoiser and the text encoder together. The result is
a plain diffusers folder in half precision. About two hours on two CPU cores, minutes on a GPU; all draws are seeded,
so the same machine and process count give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_fast.tiny_sd import MODEL, drawings

# the longest prompt, and the text encoder's width
TOKENS = 32
TEXT_WIDTH = 64
# variations of each drawing in the training set
REPEATS = 64
VAE_ROUNDS = ((1600, 64), (2600, 24))  # (steps, images per step over all processes)
# Stable Diffusion 1.x: the DDIM settings that its pipelines are sampled with
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny_sd"))
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=48, help="images per step over all processes")
    parser.add_argument("--out", type=Path, default=MODEL)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    data = once(args.work_dir / "images.pt", lambda: make_images(REPEATS))
    tokenizer = make_tokenizer(sorted(set(data["captions"])))
    vae_state = once(args.work_dir / "vae.pt", lambda: train_vae(data["images"], args), on_all_ranks=True)
    vae = make_vae().to(device())
    vae.load_state_dict(vae_state)
    latents = once(args.work_dir / "latents.pt", lambda: encode(vae, data["images"]))
    vae.register_to_config(scaling_factor=float(1 / latents["mean"].std()))
    unet, text_encoder = train_unet(latents, data["captions"], vae, tokenizer, args)
    if rank() == 0:
        pipeline(vae, text_encoder, tokenizer, unet).to(dtype=torch.float16).save_pretrained(args.out)


def once(path: Path, make, on_all_ranks: bool = False):
    """What `make` returns, kept in the file `path`: made by rank 0, or by all ranks together, and read by all."""
    if not path.exists():
        made = make() if on_all_ranks or rank() == 0 else None
        if rank() == 0:
            torch.save(made, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        if dist.is_initialized():
            dist.barrier()
    return torch.load(path, map_location="cpu", weights_only=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_images(repeats: int) -> dict:
    captions, images = zip(*drawings.training_set(repeats, np.random.default_rng(0)), strict=True)
    return {"captions": list(captions), "images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()}


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer of CLIP's kind whose merges come from the captions: most words are one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    words = [word for caption in captions for word in caption.split()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    symbols = sorted(alphabet) + [s + "</w>" for s in sorted(alphabet)] + ["".join(merge) for merge in merges]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


# the autoencoder: 64x64 pixels to 16x16x4 latents


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=drawings.IMAGE_SIZE,
    )


def train_vae(images: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Two rounds: large batches find the latent space, many small steps then sharpen it."""
    torch.manual_seed(0)
    vae = make_vae().to(device(), memory_format=torch.channels_last)
    for i, (steps, batch_size) in enumerate(VAE_ROUNDS):
        state = once(
            args.work_dir / f"vae_{i}.pt",
            lambda i=i, steps=steps, batch_size=batch_size: vae_round(vae, images, i, steps, batch_size),
            on_all_ranks=True,
        )
        vae.load_state_dict(state)
    return {name: value.cpu() for name, value in vae.state_dict().items()}


def vae_round(vae: AutoencoderKL, images: torch.Tensor, number: int, steps: int, batch_size: int) -> dict:
    """Random 32x32 crops first (a quarter of the work per image), whole images for the last fifth."""
    parameters = list(vae.parameters())
    peak = 1.5e-3 if number == 0 else 1e-3
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(parameters, decay=0.995)
    rng = np.random.default_rng(1 + rank() + 100 * number)
    for step in range(steps):
        whole = step >= 0.8 * steps
        count = batch_size // world_size() // (4 if whole else 1)
        pixels = pick_pixels(images, rng, count, drawings.IMAGE_SIZE if whole else drawings.IMAGE_SIZE // 2)
        pixels = pixels.to(device(), memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # a loss of pixels alone blurs outlines: the differences of neighbouring pixels have a term of their own
        loss = F.l1_loss(decoded, pixels) + 0.5 * edge_loss(decoded, pixels) + 1e-6 * posterior.kl().mean()
        optimizer_step(optimizer, loss, parameters, cosine(step, steps, peak))
        ema.step(parameters)
        if step % 50 == 0 and rank() == 0:
            psnr = -10 * math.log10(F.mse_loss(decoded.detach(), pixels).item() / 4)
            print(f"vae {number}:{step:5d}  loss {loss.item():.4f}  psnr {psnr:.1f} dB", flush=True)
    ema.copy_to(parameters)
    return {name: value.cpu() for name, value in vae.state_dict().items()}


def pick_pixels(images: torch.Tensor, rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """`count` random images in [-1, 1], each cut to a random square of `size` pixels."""
    corners = rng.integers(0, images.shape[-1] - size + 1, (count, 2))
    picked = rng.integers(0, len(images), count)
    cuts = [images[i, :, y : y + size, x : x + size] for i, (y, x) in zip(picked, corners, strict=True)]
    return torch.stack(cuts).float() / 127.5 - 1


def edge_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The mean absolute error of the differences between neighbouring pixels, along both axes."""
    difference = decoded - pixels
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means and standard deviations of the images' latents, from which each training step draws anew."""
    means, stds = [], []
    for chunk in images.split(64):
        posterior = vae.encode(chunk.to(device()).float() / 127.5 - 1).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return {"mean": torch.cat(means), "std": torch.cat(stds)}


# the denoiser and the text encoder


def make_unet() -> UNet2DConditionModel:
    # two heads of 40 and of 64 channels: 40 is a head size of Stable Diffusion 1.x, and no power of two
    return UNet2DConditionModel(
        sample_size=drawings.IMAGE_SIZE // 4,
        block_out_channels=(48, 80, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    # with CLIP's own 0.02 a model of this size does not tell words apart for the first thousand steps
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    return text_encoder


def train_unet(
    latents: dict[str, torch.Tensor],
    captions: list[str],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    args: argparse.Namespace,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Epsilon prediction with min-SNR-5 weights (arXiv 2303.09556); the caption is dropped in a tenth of the rows."""
    torch.manual_seed(0)
    unet, text_encoder = make_unet().to(device()), make_text_encoder(tokenizer).to(device())
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    ema = EMAModel(parameters, decay=0.9985)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    no_caption = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device())
    generator = torch.Generator().manual_seed(1 + rank())
    state_path = args.work_dir / "unet.pt"
    count, running = args.batch_size // world_size(), 0.0
    batches = batch_indices(len(captions), count, generator)
    for step in range(args.unet_steps):
        rows = next(batches)
        noise = torch.randn((2, count, *latents["mean"].shape[1:]), generator=generator)
        clean = (latents["mean"][rows] + latents["std"][rows] * noise[0]).mul(vae.config.scaling_factor).to(device())
        ids = torch.where(torch.rand((count, 1), generator=generator) < 0.1, no_caption, tokens[rows]).to(device())
        # one timestep from each of `count` equal slices: less variance than independent draws
        times = ((torch.arange(count) + torch.rand(count, generator=generator)) / count * len(alphas)).long()
        alpha = alphas[times.to(device())].view(-1, 1, 1, 1)
        target = noise[1].to(device())
        predicted = unet(
            alpha.sqrt() * clean + (1 - alpha).sqrt() * target, times.to(device()), text_encoder(ids).last_hidden_state
        ).sample
        snr = (alpha / (1 - alpha)).flatten()
        loss = ((predicted - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        optimizer_step(optimizer, loss, parameters, cosine(step, args.unet_steps, peak=1.2e-3))
        ema.step(parameters)
        running += loss.item()
        if step % 100 == 99 and rank() == 0:
            print(f"unet {step + 1:5d}  loss {running / 100:.4f}", flush=True)
            running = 0.0
            if step % 500 == 499:
                torch.save([p.clone() for p in ema.shadow_params], state_path)
    ema.copy_to(parameters)
    return unet, text_encoder


def batch_indices(length: int, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of `count` indices, each pass over the data in a new order, without an incomplete last batch."""
    while True:
        yield from torch.randperm(length, generator=generator)[: length // count * count].split(count)


def optimizer_step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.nn.Parameter], lr: float
) -> None:
    """One AdamW step on gradients averaged over all processes."""
    loss.backward()
    if world_size() > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(piece.view_as(p) / world_size())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cosine(step: int, steps: int, peak: float) -> float:
    """The learning rate at a step: 100 steps of linear warm-up, then a cosine from `peak` down to a fiftieth of it."""
    warm_up = min(1.0, (step + 1) / 100)
    return peak * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
