from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ddpo_fast.run_folder import pictures

ODD = [
    "a sign that says $5_ and $10",
    "a rapper named Ba$$in on stage",
    r"$\frac{1}{$ \undefined{} %",
    "",
    "\x00\x07\x1b[31mred\nnext\tline\u2028",
    "一只可爱的猫坐在窗台上看着外面的雨和远处的山",
    "😀🐈 a cat 🏳️‍🌈 \ud800",
    "W" * 300,
    "a photo of an extraordinarily long prompt about many things, one after the other, without end",
]
WHITE = torch.ones(9, 3, 4, 4)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("usetex", [False, True])
def test_any_text_is_drawn_without_a_word(usetex, tmp_path, caplog):
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": usetex}):
        warnings.simplefilter("error")
        pictures.draw_grid(
            ODD, [("x$_", WHITE, [float("nan"), 1e30, *range(7)]), ("after", WHITE, None)], tmp_path / "a.png"
        )
        epochs = [{"kind": "epoch", "reward_mean": 1.0, "reward_std": 0.5, "images": 4, "elapsed_s": 60.0}] * 2
        pictures.draw_rewards(epochs, tmp_path / "b.png", label="$_{ \n 报酬 😀")
    assert not caplog.records
    for name in ("a.png", "b.png"):
        assert len(np.unique(pixels(tmp_path / name))) > 1


def test_titles_do_not_meet(tmp_path, monkeypatch):
    boxes = []
    write = pictures._write

    def recorded(axis, x, y, text, *style, **options):
        write(axis, x, y, text, *style, **options)
        boxes.append((x, axis.texts[-1]))

    def measured(figure, path, dpi):
        renderer = FigureCanvasAgg(figure).get_renderer()
        for x, text in boxes:
            if text.get_text() and x > pictures.MARGIN:
                widest = text.get_window_extent(renderer).width / figure.dpi
                assert widest <= pictures.CELL + 2 * pictures.GAP, text.get_text()

    monkeypatch.setattr(pictures, "_write", recorded)
    monkeypatch.setattr(pictures, "_save", measured)
    pictures.draw_grid(
        [*ODD, "Wm" * 80, "MMMM WWWW @@@@ %%%%" * 9], [("a", torch.ones(11, 3, 4, 4), [1.0] * 11)], tmp_path / "x"
    )
    assert len(boxes) > 11


def test_rows_are_near_each_other(tmp_path):
    """Black images on white: between two rows there is one line of captions, and no more."""
    pictures.draw_grid(
        ["a", "b"], [("before", 0 * WHITE, [1.0] * 2), ("after", 0 * WHITE, [2.0] * 2)], tmp_path / "x.png"
    )
    column = pixels(tmp_path / "x.png")[:, int((pictures.MARGIN + 0.1) * pictures.DPI)].mean(-1)
    dark = np.flatnonzero(column < 128)
    assert len(dark) == pytest.approx(2 * pictures.CELL * pictures.DPI, abs=4)
    between = np.diff(dark).max() / pictures.DPI
    assert between == pytest.approx(pictures.LINE + pictures.GAP, abs=0.04)


def test_the_images_are_where_they_belong(tmp_path):
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    pictures.draw_grid(["r", "g", "b"], [("a", colours, None), ("b", colours.flip(0), None)], tmp_path / "x.png")
    drawn = pixels(tmp_path / "x.png")
    y = int((pictures.LINE + pictures.GAP + pictures.CELL / 2) * pictures.DPI)
    for column in range(3):
        x = int((pictures.MARGIN + column * (pictures.CELL + pictures.GAP) + pictures.CELL / 2) * pictures.DPI)
        below = int((pictures.CELL + pictures.GAP) * pictures.DPI)
        assert drawn[y, x].argmax() == column
        assert drawn[y + below, x].argmax() == 2 - column


def test_many_images_go_into_blocks(tmp_path):
    pictures.draw_grid(["a"] * 30, [("a", torch.ones(30, 3, 4, 4), None)], tmp_path / "x.png")
    height, width, _ = pixels(tmp_path / "x.png").shape
    assert width == pytest.approx(pictures.DPI * (pictures.MARGIN + 8 * (pictures.CELL + pictures.GAP)), abs=2)
    assert 4 * pictures.CELL * pictures.DPI < height < 4 * 1.4 * pictures.CELL * pictures.DPI


@pytest.mark.parametrize(("ending", "kind"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP"), (".png", "PNG")])
def test_a_file_is_what_its_name_says(ending, kind, tmp_path):
    pictures.draw_grid(["a"], [("a", WHITE, None)], tmp_path / f"x{ending}")
    with Image.open(tmp_path / f"x{ending}") as image:
        assert image.format == kind
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize("name", ["x", "x.txt", "x.png.", ".png", "x.gif"])
def test_other_endings_are_refused(name):
    with pytest.raises(ValueError, match=r"--output is '.*' but must end in \.png, .* or \.svg"):
        pictures.check_ending(Path(name), "--output")


def test_what_cannot_be_drawn_is_a_warning(tmp_path, caplog):
    assert pictures.attempt(pictures.draw_rewards, [{}], tmp_path / "x.png") is None
    assert "a picture could not be drawn (KeyError: 'kind')" in caplog.text


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat", "a cat"),
        ("one two three four", "one two\nthree\nfour"),
        ("one two three four five", "one two\nthree\nfour…"),
        ("abcdefghijkl", "abcdefgh\nijkl"),
        ("abcdefghijklnopqrstuvxyzabc", "abcdefgh\nijklnopq\nrstuvxy…"),
        ("猫猫猫猫猫", "猫猫猫猫\n猫"),
        ("", ""),
    ],
)
def test_wrapping(text, lines):
    assert pictures.wrapped(text, 8) == lines
