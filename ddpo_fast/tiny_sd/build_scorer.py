"""Trains the bundled scorer: `python -m ddpo_fast.tiny_sd.build_scorer --work-dir build/scorer`.

A CLIP of a million weights that says how well an image of the bundled model's kind shows what a caption names. It
learns from the drawings, and from images that the bundled model draws, as those are what it has to judge. Some
minutes on one CPU core; all draws are seeded, so the same machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from ddpo_fast.tiny_sd import MODEL, SCORER
from ddpo_fast.tiny_sd.build import cosine, once
from ddpo_fast.tiny_sd.drawings import BACKGROUNDS, CODE_POINTS, IMAGE_SIZE, load_drawings, with_article

NAMES, COLOURS = list(CODE_POINTS), list(BACKGROUNDS)
# an image whose background is not known
NO_COLOUR = -1
# variations of each drawing, and images of each name that the bundled model draws at a guidance scale
REPEATS = 16
DRAWN = {3.0: 8, 1.0: 4}
# How good an example of its caption an image is, relative to a drawing. The model's own images are worth less, those
# without guidance much less, and a broken image nothing: so the score ranks the model's images of one prompt.
QUALITY = {"drawing": 1.0, 3.0: 0.3, 1.0: 0.1, "broken": 0.0}
# what the bundled head says of an image, by its quality
RATINGS = dict(zip(QUALITY.values(), (10.0, 7.0, 4.0, 1.0), strict=True))
WIDTH, LAYERS, PATCH, EMBEDDING = 128, 4, 8, 96
# the logits' scale, fixed: a learned one grows, and the cosines of good and bad images come close to each other
LOGIT_SCALE = 16.0
# the share of an image's patches that a training step sees, at a like share of the time
KEPT_PATCHES = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("build/scorer"))
    parser.add_argument("--steps", type=int, default=760)
    parser.add_argument("--out", type=Path, default=SCORER)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = once(args.work_dir / "drawings.pt", make_drawings)
    drawn = once(args.work_dir / "drawn.pt", lambda: draw(DRAWN, seed=0))
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    weights = once(args.work_dir / "weights.pt", lambda: train(data, drawn, tokenizer, args.steps).state_dict())
    scorer = make_model().eval()
    scorer.load_state_dict(weights)
    head = make_head(scorer, data, drawn)
    save(scorer, tokenizer, head, args.out)
    fresh = once(args.work_dir / "fresh.pt", lambda: draw({3.0: 1, 1.0: 1}, seed=1))
    report(scorer, tokenizer, head, data, fresh)


# Images are a dict of `images` [N, 3, H, W] in uint8 and, for each, its `names` and `colours` by their numbers; and
# whether it is `held_out`, or with which of the `guidances` it was drawn.


def is_held_out(drawing: int) -> bool:
    """Whether a drawing of the sheet is kept from training: of every third name one of the four."""
    icon_set, name = divmod(drawing, len(NAMES))
    return name % 3 == 0 and name // 3 % 4 == icon_set


@torch.no_grad()
def make_drawings() -> dict[str, torch.Tensor]:
    """`REPEATS` variations of each drawing, on plain backgrounds; half as the bundled autoencoder shows them."""
    rng = np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    images, names, colours, held_out = [], [], [], []
    for _ in range(REPEATS):
        for i, (name, drawing) in enumerate(load_drawings()):
            colour = int(rng.integers(len(COLOURS)))
            images.append(variation(drawing, BACKGROUNDS[COLOURS[colour]], rng))
            names.append(NAMES.index(name))
            colours.append(colour)
            held_out.append(is_held_out(i))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for rows in torch.arange(len(pixels) // 2).split(64):
        latents = vae.encode(pixels[rows].float() / 127.5 - 1).latent_dist.mean
        pixels[rows] = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return {
        "images": pixels.contiguous(),
        "names": torch.tensor(names),
        "colours": torch.tensor(colours),
        "held_out": torch.tensor(held_out),
    }


def variation(drawing: Image.Image, background: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """The drawing in a random size and place, mirrored or not, as uint8 [H, W, 3]."""
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    size = round(IMAGE_SIZE * rng.uniform(0.7, 1.0))
    figure = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else drawing
    figure = figure.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    figure = figure.resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(figure, (round(rng.uniform(0, IMAGE_SIZE - size)), round(rng.uniform(0, IMAGE_SIZE - size))), figure)
    return np.asarray(canvas)


def draw(counts: dict[float, int], seed: int) -> dict[str, torch.Tensor]:
    """Images of every name by the bundled model, as many as `counts` says at each guidance scale, in 20 steps.

    Every other prompt names a background.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images, names, colours, guidances = [], [], [], []
    for guidance, count in counts.items():
        for i in range(count):
            chosen = [int(torch.randint(len(COLOURS), (), generator=generator)) for _ in NAMES]
            chosen = [c if (i + at) % 2 else NO_COLOUR for at, c in enumerate(chosen)]
            prompts = [caption(name, colour) for name, colour in zip(NAMES, chosen, strict=True)]
            drawn = pipeline(
                prompts,
                num_inference_steps=20,
                guidance_scale=guidance,
                eta=1.0,
                generator=generator,
                output_type="pt",
            ).images
            images.append((drawn * 255).round().to(torch.uint8))
            names += range(len(NAMES))
            colours += chosen
            guidances += [guidance] * len(NAMES)
    return {
        "images": torch.cat(images),
        "names": torch.tensor(names),
        "colours": torch.tensor(colours),
        "guidances": torch.tensor(guidances),
    }


def caption(name: str, colour: int = NO_COLOUR, form: int = 0) -> str:
    """The captions that the bundled model knows."""
    noun = with_article(name)
    subject = (noun, noun, name, f"a photo of {noun}", f"a drawing of {noun}")[form]
    return subject if colour == NO_COLOUR else f"{subject} on {with_article(COLOURS[colour])} background"


# training


def make_model() -> CLIPModel:
    """A CLIP whose text encoder is the bundled model's, to begin with, and whose image encoder is untrained."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=EMBEDDING,
    )
    text = text_encoder.config.to_dict() | {"projection_dim": EMBEDDING, "_name_or_path": ""}  # no folder of a machine
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=EMBEDDING))
    model.text_model.load_state_dict(text_encoder.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(np.log(LOGIT_SCALE))
    return model


def train(
    data: dict[str, torch.Tensor], drawn: dict[str, torch.Tensor], tokenizer: CLIPTokenizer, steps: int
) -> CLIPModel:
    """CLIP's loss in both directions, with an image's share of a caption by its quality and whether it shows it."""
    model = make_model()
    named = {name: p for name, p in model.named_parameters() if name != "logit_scale"}
    parameters = list(named.values())
    # Muon (arXiv 2502.16982) for the layers' matrices, AdamW for all else
    matrices = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05),
    )
    ema = EMAModel(parameters, decay=0.99)
    generator = torch.Generator().manual_seed(0)
    running = 0.0
    for step in range(steps):
        images, names, colours, quality = batch(data, drawn, generator)
        # the captions of the drawings, which come first; half of them name the background
        forms = torch.randint(5, (len(NAMES),), generator=generator).tolist()
        places = torch.where(torch.rand(len(NAMES), generator=generator) < 0.5, colours[: len(NAMES)], NO_COLOUR)
        captions = [
            caption(NAMES[n], c, form)
            for n, c, form in zip(names[: len(NAMES)].tolist(), places.tolist(), forms, strict=True)
        ]
        # the last tenth of the steps sees whole images, as the scorer will
        kept = KEPT_PATCHES if step < 0.9 * steps else 1.0
        texts = text_embeds(model, tokenizer, captions)
        similarity = LOGIT_SCALE * image_embeds(model, images, kept, generator) @ texts.T
        same_name = names[:, None] == names[None, : len(NAMES)]
        same_place = (places == NO_COLOUR) | (colours[:, None] == places)
        # whether an image without a known background shows the caption's is not known: the pair is left out
        similarity = similarity.masked_fill(same_name & ~same_place & (colours[:, None] == NO_COLOUR), -1e4)
        share = quality[:, None] * same_name * same_place
        by_caption = F.cross_entropy(similarity.T, (share / share.sum(0)).T)
        by_image = -(share * similarity.log_softmax(1)).sum() / share.sum()
        loss = (by_caption + by_image) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, steps, peak=2e-3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        running += loss.item()
        if step % 25 == 24:
            print(f"scorer {step + 1:5d}  loss {running / 25:.3f}", flush=True)
            running = 0.0
    ema.copy_to(parameters)
    return model


def batch(
    data: dict[str, torch.Tensor], drawn: dict[str, torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Images [B, 3, H, W] in [0, 1], their names and colours [B], and their quality [B].

    A drawing of each name, then images that the bundled model drew, then broken copies of some of both.
    """
    rows = []
    for name in range(len(NAMES)):
        found = ((data["names"] == name) & ~data["held_out"]).nonzero().flatten()
        rows.append(found[torch.randint(len(found), (), generator=generator)])
    drawings = torch.stack(rows)
    own = torch.randperm(len(drawn["images"]), generator=generator)[:48]
    images = torch.cat([data["images"][drawings], drawn["images"][own]]).float() / 255
    names = torch.cat([data["names"][drawings], drawn["names"][own]])
    colours = torch.cat([data["colours"][drawings], drawn["colours"][own]])
    own_quality = torch.tensor([QUALITY[guidance] for guidance in drawn["guidances"][own].tolist()])
    quality = torch.cat([torch.full((len(drawings),), QUALITY["drawing"]), own_quality])
    images = augmented(images, generator)
    to_break = torch.randperm(len(images), generator=generator)[:32]
    return (
        torch.cat([images, broken(images[to_break], generator)]),
        torch.cat([names, names[to_break]]),
        torch.cat([colours, colours[to_break]]),
        torch.cat([quality, torch.full((32,), QUALITY["broken"])]),
    )


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images moved, scaled, turned and mirrored, with their colours changed a little and a little noise."""
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    scale, angle = uniform(0.9, 1.2), uniform(-0.2, 0.2)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    across = torch.stack([mirror * cos, -sin, uniform(-0.12, 0.12)], 1)
    down = torch.stack([mirror * sin, cos, uniform(-0.12, 0.12)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = 1 + 0.15 * (2 * torch.rand((count, 3, 1, 1), generator=generator) - 1)
    images = images * gain + uniform(-0.08, 0.08).view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(-0.04, 0.04).clamp(min=0).view(-1, 1, 1, 1)
    return (images + noise).clamp(0, 1)


def broken(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images spoilt, a quarter each: noise, blur, patches in another order, and two images mixed."""
    quarter = len(images) // 4
    noisy, blurred, shuffled, mixed = images.split(quarter)
    strength = 0.12 + 0.4 * torch.rand((quarter, 1, 1, 1), generator=generator)
    noisy = noisy + strength * torch.randn(noisy.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(blurred, 8), scale_factor=8, mode="bilinear")
    blocks = F.unfold(shuffled, 16, stride=16)
    order = torch.randperm(blocks.shape[-1], generator=generator)
    shuffled = F.fold(blocks[..., order], (IMAGE_SIZE, IMAGE_SIZE), 16, stride=16)
    mixed = (mixed + mixed.roll(1, 0).flip(-1)) / 2
    return torch.cat([noisy, blurred, shuffled, mixed]).clamp(0, 1)


def image_embeds(
    model: CLIPModel, images: torch.Tensor, kept: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Unit embeddings [B, D] from a share `kept` of the patches, drawn for each image (arXiv 2212.00794)."""
    vision = model.vision_model
    hidden = vision.embeddings((images - 0.5) / 0.5)
    if kept < 1:
        patches = hidden.shape[1] - 1
        order = torch.rand((len(images), patches), generator=generator).argsort(1)[:, : int(kept * patches)] + 1
        order = torch.cat([torch.zeros((len(images), 1), dtype=torch.long), order], 1)
        hidden = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def text_embeds(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Unit embeddings [B, D]."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


# the result


def save(model: CLIPModel, tokenizer: CLIPTokenizer, head: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the CLIP in half precision and, in the folder `head`, the head in the form of `ddpo-fast train-reward`."""
    model.half().save_pretrained(folder)
    model.float()
    (folder / "head").mkdir(exist_ok=True)
    save_file(head, folder / "head" / "head.safetensors")
    (folder / "head" / "config.json").write_text(json.dumps({"clip": "bundled", "head": "linear"}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


@torch.no_grad()
def make_head(
    model: CLIPModel, data: dict[str, torch.Tensor], drawn: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A linear head for the reward `aesthetic`, by ridge regression: how cleanly an image is drawn, from 1 to 10.

    A drawing has 10, an image of the bundled model 7, one without guidance 4, a broken image 1.
    """
    generator = torch.Generator().manual_seed(3)
    embeds, ratings = [], []
    for _ in range(8):
        images, _, _, quality = batch(data, drawn, generator)
        embeds.append(image_embeds(model, images))
        ratings.append(torch.tensor([RATINGS[round(q, 3)] for q in quality.tolist()]))
    x, y = torch.cat(embeds).double(), torch.cat(ratings).double()
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean) / len(x)
    weight = torch.linalg.solve(gram + 1e-4 * torch.eye(len(gram)), (x - mean).T @ (y - y.mean()) / len(x))
    return {"weight": weight[None].float(), "bias": (y.mean() - weight @ mean)[None].float()}


@torch.no_grad()
def report(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    head: dict[str, torch.Tensor],
    data: dict[str, torch.Tensor],
    drawn: dict[str, torch.Tensor],
) -> None:
    """Prints accuracies over all names, mean cosines with the right caption, and mean ratings."""
    texts = text_embeds(model, tokenizer, [caption(name) for name in NAMES])
    held_out, trained = data["held_out"].nonzero().flatten(), (~data["held_out"]).nonzero().flatten()[::7]
    held_out = held_out[: len(held_out) // 4 * 4]
    spoilt = broken(data["images"][held_out].float() / 255, torch.Generator().manual_seed(2))
    kinds = [f"{kind}, held out" for kind in ("noisy", "blurred", "shuffled", "mixed")]
    quarters = zip(kinds, spoilt.chunk(4), data["names"][held_out].chunk(4), strict=True)
    for label, images, names in (
        ("drawings, held out", data["images"][held_out].float() / 255, data["names"][held_out]),
        ("drawings, trained on", data["images"][trained].float() / 255, data["names"][trained]),
        *quarters,
        *(
            (f"drawn by the model, guidance {guidance:g}", drawn["images"][own].float() / 255, drawn["names"][own])
            for guidance in drawn["guidances"].unique().tolist()
            for own in [drawn["guidances"] == guidance]
        ),
    ):
        embeds = torch.cat([image_embeds(model, chunk) for chunk in images.split(64)])
        cosines = embeds @ texts.T
        right = (cosines.argmax(1) == names).float().mean()
        own_cosines = cosines.gather(1, names[:, None])
        ratings = embeds @ head["weight"][0] + head["bias"]
        print(
            f"{label}: {right:.1%} of {len(images)} right, cosine {own_cosines.mean():.3f} (deviation "
            f"{own_cosines.std():.3f}), rating {ratings.mean():.1f}"
        )


if __name__ == "__main__":
    main()
