"""Trains the bundled flow-matching model: `python -m ddpo_fast.tiny_sd.build_flow --work-dir build/flow`.

A Stable Diffusion 3 of 2.3 million weights, T5 left out, that draws the animals of the bundled model: it has that
model's autoencoder and vocabulary, and its first text encoder began as that model's. A quarter of an hour on one CPU
core; all draws are seeded, so the same machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ddpo_fast.tiny_sd import FLOW_MODEL, MODEL, drawings
from ddpo_fast.tiny_sd.build import batch_indices, cosine, once

# the longest prompt: the longest caption has 14 tokens
TOKENS = 16
WIDTHS = (64, 32)
LAYERS, HEADS, HEAD_WIDTH = 4, 3, 32
# Fluent Emoji and its flat form, which show each animal in one pose, and variations of each drawing that differ by
# little but the background: what can be learnt in minutes
SETS, REPEATS = (1, 2), 12
VARIED = {"sizes": (0.9, 0.97), "degrees": 0.0, "mirrored": 0.0}
# of each round the steps, and the largest learning rate as a multiple
ROUNDS = ((700, 1.0), (300, 0.7))
TRAINED = ("transformer", "text_encoder", "text_encoder_2")
# Numbers of rows of zeros that a training step has in T5's place. Diffusers gives 256, which would be three quarters of
# the work of a model of this size; that a caller may leave them out is learnt, too.
ZERO_ROWS = (0, 32, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("build/flow"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=FLOW_MODEL)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = once(args.work_dir / "latents.pt", make_latents)
    pipeline = make_pipeline(data["latents"])
    for i, (steps, rate) in enumerate(ROUNDS):
        path = args.work_dir / f"round_{i}.pt"
        states = once(path, lambda i=i, steps=steps, rate=rate: train(pipeline, data, i, steps, rate, args.batch_size))
        for part, state in states.items():
            getattr(pipeline, part).load_state_dict(state)
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)


@torch.no_grad()
def make_latents() -> dict[str, Any]:
    """The drawings' latents as the bundled autoencoder encodes them, [N, C, H, W], and their captions."""
    rng = np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    sheet, count = drawings.load_drawings(), len(drawings.CODE_POINTS)
    chosen = [drawing for i in SETS for drawing in sheet[i * count : (i + 1) * count]]
    varied = [drawings.variation(*drawing, rng, **VARIED) for _ in range(REPEATS) for drawing in chosen]
    captions, images = zip(*varied, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pixels.split(32)]
    return {"latents": torch.cat(parts), "captions": list(captions)}


def make_pipeline(latents: Tensor) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    moments = {"scaling_factor": float(1 / latents.std()), "shift_factor": float(latents.mean())}
    # the path that it came from is of this machine
    vae.register_to_config(**moments, _name_or_path="")
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer", model_max_length=TOKENS)
    text_encoder, text_encoder_2 = (make_text_encoder(tokenizer, width) for width in WIDTHS)
    bundled = CLIPTextModelWithProjection.from_pretrained(MODEL / "text_encoder", ignore_mismatched_sizes=True)
    known = bundled.state_dict()
    known["text_model.embeddings.position_embedding.weight"] = known["text_model.embeddings.position_embedding.weight"][
        :TOKENS
    ]
    text_encoder.load_state_dict(known)
    transformer = SD3Transformer2DModel(
        sample_size=drawings.IMAGE_SIZE // 4,
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        # twice the size
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    # each block is the identity at first, as in DiT (arXiv 2212.09748)
    for name, module in transformer.named_modules():
        if name.endswith((".linear", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return StableDiffusion3Pipeline(
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        text_encoder_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModelWithProjection(config)
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    return text_encoder


def train(
    pipeline: StableDiffusion3Pipeline, data: dict[str, Any], number: int, steps: int, rate: float, batch_size: int
) -> dict[str, dict[str, Tensor]]:
    """One round of rectified flow, with SD3's logit-normal times (arXiv 2403.03206), a tenth of it without captions.

    Returns the averaged weights of the parts that it trains.
    """
    transformer, *encoders = (getattr(pipeline, part).train() for part in TRAINED)
    parameters = [p for module in (transformer, *encoders) for p in module.parameters() if p.requires_grad]
    matrices = [p for name, p in transformer.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    muon, of_muon = Muon(matrices), {id(p) for p in matrices}
    adam = torch.optim.AdamW([p for p in parameters if id(p) not in of_muon], betas=(0.9, 0.95), weight_decay=1e-2)
    ema = EMAModel(parameters, decay=0.998)
    config = pipeline.vae.config
    latents = (data["latents"] - config.shift_factor) * config.scaling_factor
    tokens = pipeline.tokenizer(data["captions"], padding="max_length", return_tensors="pt").input_ids
    no_caption = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    assert tokens.shape[1] == TOKENS
    generator = torch.Generator().manual_seed(1 + number)
    batches = batch_indices(len(latents), batch_size, generator)
    running = 0.0
    for step in range(steps):
        rows = next(batches)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        ids = torch.where(torch.rand((len(rows), 1), generator=generator) < 0.1, no_caption, tokens[rows])
        # one time from each of equally likely slices: less variance than independent draws
        shares = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        times = (1.4142 * torch.erfinv((2 * shares - 1).clamp(-0.9999, 0.9999))).sigmoid()
        s = times.view(-1, 1, 1, 1)
        zeros = torch.tensor(ZERO_ROWS)[torch.randint(len(ZERO_ROWS), (len(rows),), generator=generator)]
        predicted = velocity(transformer, encoders, (1 - s) * clean + s * noise, 1000 * times, ids, zeros)
        loss = (predicted - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step(cosine(step, steps, peak=6e-3 * rate))
        adam.param_groups[0]["lr"] = cosine(step, steps, peak=2e-3 * rate)
        adam.step()
        for parameter in parameters:
            parameter.grad = None
        ema.step(parameters)
        running += loss.item()
        if step % 50 == 49:
            print(f"{number}:{step + 1:5d}  loss {running / 50:.4f}", flush=True)
            running = 0.0
    ema.copy_to(parameters)
    return {part: getattr(pipeline, part).state_dict() for part in TRAINED}


class Muon:
    """Steps along the nearest orthogonal matrix to each matrix's momentum (github.com/KellerJordan/Muon).

    It takes about half as many steps as AdamW here. Matrices of one shape are computed together.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        shapes = dict.fromkeys(p.shape for p in matrices)
        self.groups = [[p for p in matrices if p.shape == shape] for shape in shapes]
        self.averages = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, average in zip(self.groups, self.averages, strict=True):
            # the last block has weights that nothing reads
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            average.lerp_(gradient, 1 - self.momentum)
            direction = orthogonal(gradient.lerp(average, self.momentum))
            # as large as a step of AdamW (arXiv 2502.16982)
            direction *= 0.2 * max(direction.shape[1:]) ** 0.5
            for parameter, change in zip(group, direction, strict=True):
                parameter.mul_(1 - 0.01 * lr).sub_(change, alpha=lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices [N, A, B] with singular values near 1, by five Newton-Schulz iterations."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x


def velocity(
    transformer: SD3Transformer2DModel,
    encoders: list[CLIPTextModelWithProjection],
    noisy: Tensor,
    timesteps: Tensor,
    ids: Tensor,
    zeros: Tensor,
) -> Tensor:
    """The transformer's output for captions `ids` [B, L], with `zeros` [B] rows of zeros after theirs.

    Such rows stay alike in all layers, so one of them, with its attention logits raised by the logarithm of their
    number, has the effect of all.
    """
    encoded = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([out.hidden_states[-2] for out in encoded], dim=-1)
    pooled = torch.cat([out.text_embeds for out in encoded], dim=-1)
    patches = noisy.shape[-2] * noisy.shape[-1] // transformer.config.patch_size**2
    logits = torch.zeros(len(noisy), 1, 1, patches + hidden.shape[1] + 1)
    logits[..., -1] = zeros.log().view(-1, 1, 1)
    attention = F.scaled_dot_product_attention

    def with_logits(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return attention(query, key, value, attn_mask=logits)

    with mock.patch.object(F, "scaled_dot_product_attention", with_logits):
        return transformer(noisy, F.pad(hidden, (0, 0, 0, 1)), pooled, timesteps).sample


if __name__ == "__main__":
    main()
