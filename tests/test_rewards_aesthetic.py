"""Aesthetic heads in all layouts, against LAION's own, and the reward that they make with a CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from one_sentence import refused
from safetensors.torch import save_file
from tiny_clip import Malicious, examples, write_clip
from torch import nn

from ddpo_fast.rewards import score
from ddpo_fast.rewards.aesthetic import AestheticScore
from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.rewards.head import MLP_WIDTHS, head_layers, head_width, read_head, scores

# LAION's heads and embeddings of ten photographs, which are not part of this repository
ROOT = Path(__file__).parents[1]
GOLDEN = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT) / "golden/aesthetic"
with_golden_data = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data are not here")
# numbers of layers in files, and whether ReLUs are between them
LAYOUTS = {"affine": ((0, 2, 4, 6, 7), False), "relu": ((0, 3, 6, 9, 11), True)}
WIDTH = 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clip"), WIDTH))


def golden_embeds(clip: str) -> torch.Tensor:
    return torch.from_numpy(
        np.concatenate([np.load(GOLDEN / f"rating{i}-{clip}.npy").reshape(1, -1) for i in range(10)])
    )


def mlp_tensors(layout: str, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """The tensors of LAION's second version, with random weights."""
    generator = torch.Generator().manual_seed(0)
    widths = [width, *MLP_WIDTHS]
    tensors = {}
    for number, inputs, outputs in zip(LAYOUTS[layout][0], widths, widths[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


# heads


@with_golden_data
def test_laions_second_head():
    # published to two decimals
    wanted = [1.66, 2.36, 3.07, 3.67, 4.24, 4.70, 5.07, 5.37, 5.58, 5.75]
    head = read_head(GOLDEN / "sac+logos+ava1-l14-linearMSE.pth")
    embeds = golden_embeds("vit-l-14").float()
    torch.testing.assert_close(scores(head, embeds), torch.tensor(wanted), rtol=0, atol=0.006)


@with_golden_data
@pytest.mark.parametrize(
    ("file", "embeds"), [("sa_0_4_vit_l_14_linear.pth", "vit-l-14"), ("sa_0_4_vit_b_32_linear.pth", "vit-b-32")]
)
def test_laions_first_heads(file, embeds):
    tensors, embeds = torch.load(GOLDEN / file, weights_only=True), golden_embeds(embeds)
    wanted = embeds.double() @ tensors["weight"].double().T + tensors["bias"].double()
    actual = scores(read_head(GOLDEN / file), embeds.float())
    torch.testing.assert_close(actual.double(), wanted.squeeze(1), rtol=0, atol=1e-4)
    # the embeddings are those of photographs in the order of their ratings
    assert (actual.diff() > 0).all()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_versions_of_the_second_layout(layout, ending, tmp_path):
    tensors, path = mlp_tensors(layout), tmp_path / f"head.{ending}"
    (save_file if ending == "safetensors" else torch.save)(tensors, path)
    embeds = torch.nn.functional.normalize(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    wanted = embeds
    numbers, relu = LAYOUTS[layout]
    for number in numbers:
        wanted = wanted @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
        if relu and number != numbers[-1]:
            wanted = wanted.clamp(min=0)
    head = read_head(path)
    torch.testing.assert_close(scores(head, embeds), wanted.squeeze(1))
    assert head_width(head) == WIDTH


def test_a_head_in_half_precision_computes_in_fp32(tmp_path):
    torch.save({"weight": torch.ones(1, 4).half(), "bias": torch.zeros(1).half()}, tmp_path / "head.pth")
    assert scores(read_head(tmp_path / "head.pth"), torch.ones(2, 4)).tolist() == [4, 4]


WEIGHT, BIAS = torch.ones(1, 4), torch.zeros(1)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "is no aesthetic head"),
        ({"weight": WEIGHT}, "it has weight where"),
        ({"weight": torch.ones(2, 4), "bias": torch.zeros(2)}, "gives 2 numbers"),
        ({"weight": WEIGHT, "bias": torch.zeros(3)}, "sizes of its layers do not fit"),
        ({"weight": torch.ones(4), "bias": BIAS}, "sizes of its layers do not fit"),
        ({"layers.0.weight": WEIGHT, "layers.0.bias": BIAS}, "is no aesthetic head"),
        ({**mlp_tensors("affine"), "layers.2.weight": torch.ones(128, 7)}, "sizes of its layers do not fit"),
        ({**mlp_tensors("affine"), "layers.0.other": BIAS}, "is no aesthetic head"),
        ([WEIGHT], "holds no weights"),
        ({"weight": 1.0, "bias": 0.0}, "holds no weights"),
    ],
)
def test_another_file_is_no_head(tensors, words, tmp_path):
    torch.save(tensors, tmp_path / "head.pth")
    with refused(ValueError, words, "head.pth"):
        read_head(tmp_path / "head.pth")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_no_head(content, tmp_path):
    (tmp_path / "head.pth").write_bytes(content)
    with refused(ValueError, "head.pth", "download"):
        AestheticScore(model=str(tmp_path / "head.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_head_that_would_run_code_is_refused_and_runs_nothing(zipped, tmp_path):
    trace, path = tmp_path / "it ran", tmp_path / "head.pth"
    torch.save({"weight": WEIGHT, "bias": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, "could run code", "head.pth"):
        AestheticScore(model=str(path))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


# the reward


@pytest.fixture
def folder(tmp_path):
    """A folder as of TRL's published head."""
    torch.save(mlp_tensors("affine"), tmp_path / "aesthetic-model.pth")
    return tmp_path


def test_the_reward_is_the_heads_score_of_the_embedding(clip, folder):
    images = examples(3)
    with torch.no_grad():
        wanted = scores(read_head(folder / "aesthetic-model.pth"), ClipNetwork(clip).image_embeds(images))
    for model in (folder, folder / "aesthetic-model.pth"):
        rewards, info = AestheticScore(model=str(model), clip=clip)(images, ("",) * 3, ({},) * 3)
        torch.testing.assert_close(rewards, wanted)
        assert info == {}
        assert not rewards.requires_grad
    half, _ = AestheticScore(model=str(folder), clip=clip, dtype=torch.bfloat16)(images, ("",) * 3, ({},) * 3)
    torch.testing.assert_close(half, wanted, rtol=0, atol=0.1)


def test_a_trained_head_says_which_clip_it_is_for(clip, tmp_path):
    save_file({"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"clip": clip, "kind": "linear"}))
    wanted = ClipNetwork(clip).image_embeds(examples(2)).sum(-1)
    for model in (tmp_path, tmp_path / "head.safetensors"):
        torch.testing.assert_close(AestheticScore(model=str(model))(examples(2), ("", ""), ({}, {}))[0], wanted)
    (tmp_path / "config.json").write_text("{}")
    with refused(ValueError, "does not say which CLIP"):
        AestheticScore(model=str(tmp_path))


@pytest.mark.parametrize("size", [1, 1024])
def test_images_of_any_size(clip, folder, size):
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    rewards, _ = score(AestheticScore(model=str(folder), clip=clip), images, ("", "word " * 300), ({}, {}))
    assert rewards.isfinite().all()
    assert rewards[0] != rewards[1]
    images[1, 2, 0, 0] = torch.nan
    with refused(ValueError, "returned nan for prompt 'word"):
        score(AestheticScore(model=str(folder), clip=clip), images, ("", "word"), ({}, {}))


def test_memory_is_that_of_image_encoder_and_head(clip, folder):
    reward = AestheticScore(model=str(folder), clip=clip)
    head = sum(tensor.numel() for tensor in mlp_tensors("affine").values())
    images_only = ClipNetwork(clip, text=False).memory_bytes(torch.float16)
    assert reward.memory_bytes(torch.float16) == images_only + 4 * head


def test_a_head_of_another_width_is_refused(clip, tmp_path):
    torch.save({"weight": WEIGHT, "bias": BIAS}, tmp_path / "head.pth")
    with refused(ValueError, "embeddings of width 4", "have 16", "give as clip"):
        AestheticScore(model=str(tmp_path / "head.pth"), clip=clip)(examples(1), ("",), ({},))


def test_what_is_not_there_is_refused(clip, tmp_path):
    with refused(ValueError, "a folder without head.safetensors or aesthetic-model.pth"):
        AestheticScore(model=str(tmp_path), clip=clip)
    torch.save({"weight": WEIGHT, "bias": BIAS}, tmp_path / "head.pth")
    with refused(ValueError, "clip is './nowhere', and there is no such folder"):
        AestheticScore(model=str(tmp_path / "head.pth"), clip="./nowhere")
    # the published head, where there is no network
    with refused(ValueError, "model 'trl-lib/ddpo-aesthetic-predictor' is no folder here"):
        AestheticScore()(examples(1), ("",), ({},))


def test_layers():
    assert [type(layer) for layer in head_layers([4, 2, 1], relu=True)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head_layers([4, 2, 1])] == [nn.Linear, nn.Linear]
