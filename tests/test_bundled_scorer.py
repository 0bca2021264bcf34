"""The CLIP that scores the bundled model's images: it knows the drawings, and noise or blur does not fool it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from compare_runs import same_bits
from transformers import CLIPTokenizer

from ddpo_fast.commands.train import read_options
from ddpo_fast.rewards.aesthetic import AestheticScore
from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.rewards.clip_score import ClipScore
from ddpo_fast.tiny_sd import SCORER, build_scorer, drawings
from ddpo_fast.tiny_sd.build_scorer import NAMES, broken, is_held_out, variation


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, list[str]]:
    """The drawings that training left out, each on two backgrounds, and what they show."""
    rng, images, names = np.random.default_rng(5), [], []
    for i, (name, drawing) in enumerate(drawings.load_drawings()):
        for colour in ("white", "green") if is_held_out(i) else ():
            images.append(variation(drawing, drawings.BACKGROUNDS[colour], rng))
            names.append(name)
    # whole quarters, for `broken`
    count = len(images) // 4 * 4
    return torch.from_numpy(np.stack(images[:count])).permute(0, 3, 1, 2).float() / 255, names[:count]


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SCORER.rglob("*") if path.is_file()) < 3e6


def test_held_out_drawings_are_recognised(held_out: tuple[torch.Tensor, list[str]]) -> None:
    images, names = held_out
    clip = ClipNetwork("bundled")
    cosines = clip.image_embeds(images) @ clip.text_embeds([drawings.with_article(name) for name in NAMES]).T
    found = [NAMES[at] for at in cosines.argmax(1).tolist()]
    assert np.mean([a == b for a, b in zip(found, names, strict=True)]) > 0.6


def test_broken_drawings_score_less(held_out: tuple[torch.Tensor, list[str]]) -> None:
    images, names = held_out
    spoilt = broken(images, torch.Generator().manual_seed(0))
    prompts = tuple(drawings.with_article(name) for name in names)
    for reward in (ClipScore(model="bundled"), AestheticScore(model="bundled")):
        whole, less = (reward(given, prompts, (None,) * len(prompts))[0] for given in (images, spoilt))
        # noise, blur, shuffled patches and mixed images, a quarter each
        falls = torch.stack([(a < b).float().mean() for a, b in zip(less.chunk(4), whole.chunk(4), strict=True)])
        assert falls.min() > 0.6
        assert falls.mean() > 0.75


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("--reward clip_score", "clip_score=bundled"),
        (
            "--reward clip_score:1,jpeg_compressibility:2 --eval_reward aesthetic",
            "clip_score=bundled,aesthetic=bundled",
        ),
        ("--reward clip_score --reward_model openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("--reward jpeg_compressibility", ""),
        ("--reward pickscore", ""),
        ("--reward clip_score --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5", ""),
    ],
)
def test_it_scores_the_bundled_models_images_unless_a_model_is_named(given, model):
    assert read_options(given.split())[0].reward_model == model


def test_its_config_names_no_folder_of_a_machine():
    assert not re.findall(r'": "/', (SCORER / "config.json").read_text("utf-8"))


def test_its_script_gives_the_same_bits_again(monkeypatch):
    """Two steps of training on drawings of a few names, as if the bundled model had drawn some of them."""
    few = NAMES[:12]
    monkeypatch.setattr(build_scorer, "NAMES", few)
    pictures = [np.asarray(drawing.convert("RGB")) for name, drawing in drawings.load_drawings() if name in few]
    images = torch.from_numpy(np.stack(pictures))[:, :64, :64].permute(0, 3, 1, 2).contiguous()
    names = torch.arange(len(images)) % len(few)
    none = torch.zeros_like(names)
    data = {"images": images, "names": names, "colours": none, "held_out": none.bool()}
    drawn = {"images": images, "names": names, "colours": none, "guidances": none + 3.0}
    tokenizer = CLIPTokenizer.from_pretrained(SCORER)
    first, again = (build_scorer.train(data, drawn, tokenizer, steps=2).state_dict() for _ in range(2))
    assert same_bits(first, again)
    assert not same_bits(first, build_scorer.make_model().state_dict())
