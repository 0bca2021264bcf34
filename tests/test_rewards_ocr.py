from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from ddpo_fast.rewards.ocr import TextShown, target_texts, text_score

pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def reward() -> TextShown:
    return TextShown()


def drawn(text: str, size: int, height: int, background: str = "white") -> torch.Tensor:
    """An image [3, size, size] that shows the text in letters of this height."""
    picture = Image.new("RGB", (size, size), background)
    corner = (size // 16, size // 4)
    ImageDraw.Draw(picture).multiline_text(corner, text, fill="black", font=ImageFont.load_default(height))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("size", "text", "height", "background"),
    [
        (64, "HELLO", 14, "white"),
        (256, "Hello World", 36, "white"),
        (256, "OPEN\nLATE", 70, "yellow"),
        (512, "New York City", 60, "white"),
        (512, "small text here", 18, "lightblue"),
        (1024, "STOP", 380, "red"),
    ],
)
def test_text_that_is_shown_scores_one(reward, size, text, height, background):
    image = drawn(text, size, height, background)
    prompts = (f'a sign that says "{text}"', 'a sign that says "QQQQQQQQQQQQQQQQ"')
    scores, info = reward(image.expand(2, -1, -1, -1), prompts, (None, {}))
    assert scores.tolist() == [1, 0]
    assert info["read"] == [text.replace("\n", " ")] * 2


def test_a_part_of_the_text_scores_its_share(reward):
    images = torch.stack([drawn(text, 256, 28) for text in ("SUMMER", "SUMMER SALE", "SUMMER SALE 50")])
    scores, _ = reward(images, ("“Summer Sale”",) * 3, ({},) * 3)
    torch.testing.assert_close(scores, torch.tensor([0.6, 1.0, 0.8]))


@pytest.mark.parametrize("size", [1, 2, 64, 1024])
def test_images_without_text_score_zero(reward, size, capfd, caplog):
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    with caplog.at_level(logging.INFO):
        scores, info = reward(images, ('"a"', '"b"'), ({}, {}))
    assert scores.tolist() == [0, 0]
    assert info == {"read": ["", ""]}
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_with_nan_are_refused(reward, value):
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"finite, but of 3 these have NaN or infinity: \[1\]"):
        reward(images, ('"a"',) * 3, ({},) * 3)


@pytest.mark.parametrize(
    ("prompt", "metadata", "texts"),
    [
        ('a cup with "Tea" on it', None, ["Tea"]),
        ("a cup with “Tea” on it", {}, ["Tea"]),
        ('"one" and “two” and „three“ and «four»', {}, ["one", "two", "three", "four"]),
        ('an empty "" and a full "cup"', {}, ["cup"]),
        ('a "cup"', {"text": "tea"}, ["tea"]),
        ('a 12" record', {"text": ("A side", "B side")}, ["A side", "B side"]),
        (f'"deep" {"word " * 300}', {"other": 1}, ["deep"]),
    ],
)
def test_the_text_of_a_prompt(prompt, metadata, texts):
    assert target_texts(prompt, metadata) == texts


@pytest.mark.parametrize(
    ("prompt", "metadata", "words"),
    [
        ("", None, "needs the text"),
        ("a cup", {}, "needs the text"),
        ('a cup " "', {}, "needs the text"),
        ('a 12" record that says "play"', {}, "odd number of quotation marks"),
        ('a "cup"', {"text": 3}, "must be a text or a list of texts"),
        ('a "cup"', {"text": " "}, "must be a text or a list of texts"),
        ('a "cup"', {"text": []}, "needs the text"),
    ],
)
def test_a_prompt_without_text_is_an_error(prompt, metadata, words):
    with pytest.raises(ValueError, match=words) as raised:
        target_texts(prompt, metadata)
    assert repr(prompt) in str(raised.value)


@pytest.mark.parametrize(
    ("read", "targets", "score"),
    [
        ("Tea", ["tea"], 1),
        ("T e\na", ["te a"], 1),
        ("", ["tea"], 0),
        ("tee", ["tea"], 2 / 3),
        ("a page full of other words", ["tea"], 0),
        # the order in which several texts stand in the image does not matter
        ("two one", ["one", "two"], 1),
        ("one", ["one", "two"], 0.5),
        ("b a c d e f", list("abcdef"), 4 / 6),
    ],
)
def test_the_score_is_the_share_of_letters_that_are_right(read, targets, score):
    assert text_score(read, targets) == pytest.approx(score)
