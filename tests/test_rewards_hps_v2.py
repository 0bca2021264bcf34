"""CLIPs in open_clip's layout against a plain forward pass in it, and the rewards hps_v2 and hps_v2.1."""

from __future__ import annotations

import math

import pytest
import torch
from one_sentence import refused
from tiny_clip import IMAGE, LENGTH, PATCH, VOCABULARY, WIDTH, Malicious, examples, write_processor
from torch.nn import functional
from transformers import CLIPTokenizerFast

from ddpo_fast import tiny_sd
from ddpo_fast.rewards import score
from ddpo_fast.rewards.clip_images import ImageFormat
from ddpo_fast.rewards.hps_v2 import HpsV2, HpsV21
from ddpo_fast.rewards.open_clip_layout import config_of

PROMPTS = ("a cat", "", "a red dog in the snow")
EMBED = 16
FILE = "HPS_v2_compressed.pt"


def blocks(tower: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        name = f"{tower}transformer.resblocks.{i}."
        shapes |= {f"{name}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"{name}attn.in_proj_weight": (3 * width, width), f"{name}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{name}attn.out_proj.weight": (width, width), f"{name}attn.out_proj.bias": (width,)}
        shapes |= {f"{name}mlp.c_fc.weight": (4 * width, width), f"{name}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{name}mlp.c_proj.weight": (width, 4 * width), f"{name}mlp.c_proj.bias": (width,)}
    return shapes


def layout(
    *,
    width: int,
    layers: int,
    patch: int,
    image: int,
    text_width: int,
    text_layers: int,
    length: int,
    words: int,
    embed: int,
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an open_clip checkpoint's tensors."""
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    return {
        "positional_embedding": (length, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        "token_embedding.weight": (words, text_width),
        **{f"{norm}.{kind}": (size,) for norm, size in norms.items() for kind in ("weight", "bias")},
        **blocks("visual.", width, layers),
        **blocks("", text_width, text_layers),
    }


# the image encoder has two heads of 64, and the text encoder one
TINY = layout(
    width=2 * WIDTH, layers=2, patch=PATCH, image=IMAGE, text_width=WIDTH, text_layers=1, length=LENGTH,
    words=VOCABULARY, embed=EMBED,
)  # fmt: skip
VIT_H = layout(
    width=1280, layers=32, patch=14, image=224, text_width=1024, text_layers=24, length=77, words=49408, embed=1024
)


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in TINY.items()}
    for name in tensors:
        if "ln_" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def write(folder, seed: int = 0, file: str = FILE):
    """A folder with a checkpoint as it is published, and a tokenizer."""
    write_processor(folder)
    torch.save({"epoch": 1, "name": "run", "state_dict": random_tensors(seed)}, folder / file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write(tmp_path_factory.mktemp("hps")))


# open_clip's forward pass


def run_blocks(x: torch.Tensor, tensors: dict, tower: str, layers: int, heads: int, mask=None) -> torch.Tensor:
    width = x.shape[-1]
    for i in range(layers):
        own = {k.removeprefix(f"{tower}transformer.resblocks.{i}."): v for k, v in tensors.items()}
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True, dtype=x.dtype)
        attention.load_state_dict({k.removeprefix("attn."): v for k, v in own.items() if k.startswith("attn.")})
        y = functional.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = functional.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = functional.gelu(functional.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + functional.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


def norm(x: torch.Tensor, tensors: dict, name: str) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def encode_images(pixels: torch.Tensor, tensors: dict) -> torch.Tensor:
    patches = functional.conv2d(pixels, tensors["visual.conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([tensors["visual.class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    x = norm(x + tensors["visual.positional_embedding"], tensors, "visual.ln_pre")
    x = run_blocks(x, tensors, "visual.", 2, 2)
    return functional.normalize(norm(x[:, 0], tensors, "visual.ln_post") @ tensors["visual.proj"], dim=-1)


def encode_prompts(prompts: tuple[str, ...], tensors: dict) -> torch.Tensor:
    tokenizer = CLIPTokenizerFast.from_pretrained(tiny_sd.MODEL / "tokenizer")
    found = [tokenizer(prompt, truncation=True, max_length=LENGTH).input_ids for prompt in prompts]
    # open_clip fills up with zeros
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in found])
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    mask = torch.full((LENGTH, LENGTH), -math.inf, dtype=x.dtype).triu(1)
    x = norm(run_blocks(x, tensors, "", 1, 1, mask), tensors, "ln_final")
    return functional.normalize(x[range(len(ids)), ids.argmax(-1)] @ tensors["text_projection"], dim=-1)


def test_scores_are_those_of_a_forward_pass_in_open_clips_layout(folder):
    images, prompts = examples(4, 40)[..., :24], (*PROMPTS, "word " * 300)
    tensors = {name: tensor.double() for name, tensor in random_tensors().items()}
    pixels = ImageFormat(IMAGE, IMAGE, pads=True).pixels(images).double()
    with torch.no_grad():
        wanted = (encode_images(pixels, tensors) * encode_prompts(prompts, tensors)).sum(-1)
    rewards, info = HpsV2(model=folder, batch_size=3)(images, prompts, ({},) * 4)
    # fp32 rounds the sums of four layers
    torch.testing.assert_close(rewards.double(), wanted, rtol=0, atol=1e-4)
    assert info == {}
    assert wanted.std() > 0.05


def test_the_two_versions_are_two_files(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, "HPS_v2.1_compressed.pt")
    first = HpsV2(model=str(tmp_path))(examples(2), PROMPTS[:2], ({}, {}))[0]
    second = HpsV21(model=str(tmp_path))(examples(2), PROMPTS[:2], ({}, {}))[0]
    assert not torch.allclose(first, second, atol=0.01)
    assert torch.equal(HpsV2(model=str(tmp_path / FILE))(examples(2), PROMPTS[:2], ({}, {}))[0], first)


def test_sizes_of_the_published_checkpoint():
    # without a file its memory is told from its known sizes
    tensors = {name: torch.empty(shape, device="meta") for name, shape in VIT_H.items()}
    config, published = config_of(tensors), HpsV2().clip._config()
    assert config.to_dict() == published.to_dict()
    assert config.vision_config.num_attention_heads == 16
    # in millions, as open_clip gives it
    assert round(HpsV21().memory_bytes(torch.float16) / 2e6, 2) == 986.11


def test_memory_is_that_of_the_weights(folder):
    reward = HpsV2(model=folder)
    assert reward.memory_bytes(torch.float32) == 4 * sum(tensor.numel() for tensor in random_tensors().values())


@pytest.mark.parametrize("size", [1, 1024])
def test_images_of_any_size(folder, size):
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    rewards, _ = score(HpsV2(model=folder), images, ("", "word " * 300), ({}, {}))
    assert rewards.isfinite().all()
    assert rewards.abs().max() <= 1
    images[0, 0, 0, 0] = torch.nan
    with refused(ValueError, "returned nan for prompt ''"):
        score(HpsV2(model=folder), images, ("", "word"), ({}, {}))


# files


def test_another_file_is_refused_at_once(tmp_path):
    write(tmp_path)
    tensors = random_tensors()
    del tensors["visual.proj"]
    torch.save({"state_dict": tensors}, tmp_path / FILE)
    with refused(ValueError, "it has no visual.proj"):
        HpsV2(model=str(tmp_path))
    with refused(ValueError, "a folder without HPS_v2.1_compressed.pt"):
        HpsV21(model=str(tmp_path))


def test_a_lacking_layer_is_refused(tmp_path):
    write(tmp_path)
    tensors = random_tensors()
    del tensors["transformer.resblocks.0.ln_2.bias"]
    torch.save({"state_dict": tensors}, tmp_path / FILE)
    with refused(ValueError, "do not fit its config, such as text_model.encoder.layers.0.layer_norm2.bias"):
        HpsV2(model=str(tmp_path))(examples(1), ("",), ({},))


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    write(tmp_path)
    trace = tmp_path / "it ran"
    torch.save({"state_dict": random_tensors(), "optimizer": Malicious(trace)}, tmp_path / FILE)
    with refused(ValueError, "could run code", FILE):
        HpsV2(model=str(tmp_path))
    assert not trace.exists()
    torch.load(tmp_path / FILE, weights_only=False)
    assert trace.exists()
