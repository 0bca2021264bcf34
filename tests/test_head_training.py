"""`ddpo-fast train-reward`: data, division, agreement, and heads that rank as the known preference does."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from one_sentence import error_of_command, refused
from PIL import Image

from ddpo_fast.commands import train_reward
from ddpo_fast.commands.options import HeadArguments
from ddpo_fast.head_training import agreement, features, fit
from ddpo_fast.head_training.rows import ava_score, read_rows
from ddpo_fast.head_training.split import groups_of, validation_rows
from ddpo_fast.rewards import load
from ddpo_fast.tiny_sd.drawings import load_drawings


@pytest.fixture(scope="session")
def rated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with 120 drawings on backgrounds from black to red, as 0.png and so on, and how red each is."""
    folder, rng = tmp_path_factory.mktemp("rated"), np.random.default_rng(0)
    drawings, redness = load_drawings(), rng.uniform(0, 1, 120).tolist()
    for i, red in enumerate(redness):
        image = Image.new("RGB", (64, 64), (round(255 * red), 60, 60))
        figure = drawings[i][1].resize((40, 40))
        image.paste(figure, (12, 12), figure)
        image.save(folder / f"{i}.png")
    return folder, redness


def run(data: Path, out: Path, **options: object) -> dict:
    train_reward.run(HeadArguments(**{"data": str(data), "clip": "bundled", "output_dir": str(out), **options}))
    return json.loads((out / "config.json").read_text())


def write_csv(path: Path, header: str, rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(), *rows])
    return path


def write_ava(path: Path, scores: list[float], name: str = "{}") -> Path:
    """A line for each score of 1 to 10, given by 100 people, half of them to each neighbouring whole number."""
    lines = []
    for i, score in enumerate(scores):
        counts = [0] * 10
        high = round(100 * (score - int(score)))
        counts[int(score) - 1] += 100 - high
        if high:
            counts[int(score)] += high
        lines.append(" ".join(map(str, [i + 1, name.format(i), *counts, 0, 22, 1396])))
    path.write_text("\n".join(lines) + "\n")
    return path


def rank_agreement(folder: Path, **options: object) -> float:
    """Spearman's correlation between the redness of plain images and what a trained head says of them."""
    red = torch.linspace(0, 1, 9)
    images = torch.full((9, 3, 64, 64), 60 / 255)
    images[:, 0] = red[:, None, None]
    images[:, :, 20:44, 20:44] = torch.tensor([0.9, 0.8, 0.3])[:, None, None]
    rewards, _ = load("aesthetic", model=str(folder), **options)(images, ("",) * 9, (None,) * 9)
    return agreement.spearman(rewards.numpy(), red.numpy())


# end to end


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_head_of_an_ava_file_with_broken_rows_ranks_as_its_ratings(
    rated: tuple[Path, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture, head: str
) -> None:
    folder, redness = rated
    images = tmp_path / "images"
    images.mkdir()
    for i in range(len(redness)):
        Image.open(folder / f"{i}.png").save(images / f"{i}.jpg", quality=95)
    ava = write_ava(tmp_path / "AVA.txt", [1 + 9 * red for red in redness])
    lines = ava.read_text().splitlines()
    lines[3] += " 7"
    (images / "5.jpg").write_bytes((images / "5.jpg").read_bytes()[:400])
    ava.write_text("\n".join(lines))
    config = run(ava, tmp_path / "out", head=head, learning_rate=3e-3)
    assert config["rows"]["skipped"] == 2
    printed = capsys.readouterr().out
    assert "skipped 2 rows" in printed
    assert "AVA.txt line 4: 16 columns and not AVA's 15" in printed
    assert "AVA.txt line 6: 5.jpg: the image cannot be read" in (tmp_path / "out" / "skipped.txt").read_text()
    low, high = config["validation"]["spearman_interval"]
    assert low < config["validation"]["spearman"] < high
    assert config["validation"]["spearman"] > 0.8
    assert (tmp_path / "out" / "predicted.png").stat().st_size > 1000
    assert rank_agreement(tmp_path / "out") > 0.9


def test_pairs_with_ties_in_a_parquet_file_train_a_head(rated: tuple[Path, list[float]], tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder, redness = rated
    rows = []
    for i in range(0, len(redness), 2):
        first = 0.5 if abs(redness[i] - redness[i + 1]) < 0.1 else float(redness[i] > redness[i + 1])
        stored = [(folder / f"{j}.png").read_bytes() for j in (i, i + 1)]
        rows.append(
            {"caption": f"pair {i}", "jpg_0": stored[0], "jpg_1": stored[1], "label_0": first, "label_1": 1 - first}
        )
    data = tmp_path / "pairs.parquet"
    # several row groups, as in large files
    parquet.write_table(pyarrow.Table.from_pylist(rows), data, row_group_size=16)
    config = run(data, tmp_path / "out", validation_share=0.2)
    assert config["loss"] == "bradley_terry"
    assert config["validation"]["pairwise_accuracy"] > 0.8
    assert (tmp_path / "out" / "predicted.png").stat().st_size > 1000
    assert rank_agreement(tmp_path / "out") > 0.9


def test_jsonl_and_a_killed_run(
    rated: tuple[Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was embedded before a kill is not embedded again, and the head is the same to the last bit."""
    folder, redness = rated
    data = folder / "rated.jsonl"
    data.write_text("".join(json.dumps({"image": f"{i}.png", "score": red}) + "\n" for i, red in enumerate(redness)))
    whole = run(data, tmp_path / "whole", clip_batch_size=16)
    assert rank_agreement(tmp_path / "whole") > 0.9

    loaded, real = [], features.load

    def stopping(picture: object, edge: int) -> object:
        loaded.append(picture)
        if len(loaded) > 60:
            raise KeyboardInterrupt
        return real(picture, edge)

    monkeypatch.setattr(features, "THREADS", 1)
    monkeypatch.setattr(features, "load", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "killed", clip_batch_size=16)
    before = len(loaded)
    monkeypatch.setattr(features, "load", lambda picture, edge: (loaded.append(picture), real(picture, edge))[1])
    assert run(data, tmp_path / "killed", clip_batch_size=16) == whole
    # the batches of 16 that were complete at the kill are kept
    assert len(loaded) - before == len(redness) - 48
    heads = [(tmp_path / name / "head.safetensors").read_bytes() for name in ("whole", "killed")]
    assert heads[0] == heads[1]
    with refused(ValueError, "overwrite"):
        run(data, tmp_path / "killed")


# broken data


def test_each_kind_of_broken_row_is_named(rated: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, _ = rated
    data = write_csv(
        tmp_path / "data.csv",
        "image score",
        [("0.png", 1), ("1.png", "nan"), ("2.png",), ("none.png", 3), ("4.png", "good"), ("5.png", 1, 2), ("", 3)],
    )
    rows = read_rows(data, folder)
    assert len(rows.usable) == 1
    for line, words in zip(
        rows.broken,
        ("nan", "1 cells and not the header's 2", "no file none.png", "'good'", "3 cells and not", "path of an image"),
        strict=True,
    ):
        assert words in line
    assert rows.broken[0].startswith("data.csv line 3: ")
    with refused(ValueError, "6 of 7 rows cannot be used", "max_broken_share", "data.csv line 3"):
        run(data, tmp_path / "out", images=str(folder))
    pairs = tmp_path / "pairs.jsonl"
    fine = {"caption": "a cat", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 1, "label_1": 0}
    lines = [fine, {**fine, "label_1": 1}, {**fine, "label_0": None}, {"caption": "a cat"}]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n[]\n")
    broken = read_rows(pairs, folder).broken
    assert len(broken) == 5
    for line, words in zip(broken, ("two shares", "label_0 is 'None'", "no jpg_0", "no JSON (", "object"), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("data.csv", "", "its columns are: none"),
        ("data.csv", "image,score\n", "has no rows"),
        ("data.csv", "image,rating\n0.png,1\n", "its columns are: image, rating"),
        ("data.csv", "image,score\n0.png,1\n", "1 usable rows"),
        ("data.csv", "image,score\n" + "".join(f"{i}.png,5\n" for i in range(20)), "all 20 scores are 5"),
        ("data.csv", "image,score\n" + "".join(f"{i % 1}.png,{i}\n" for i in range(20)), "all rows share images"),
        ("data.jsonl", "", "has no rows"),
        ("data.parquet", "no parquet", "cannot be read as parquet"),
        ("data.xlsx", "", "must end in .txt"),
        ("AVA.txt", "1 2 3\n", "no folder"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    rated: tuple[Path, list[float]], tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    options = {} if name == "AVA.txt" else {"images": str(rated[0])}
    with refused(ValueError, "", words):
        run(tmp_path / name, tmp_path / "out", **options)


def test_options_are_checked(tmp_path: Path) -> None:
    for name, value in {"validation_share": 0, "max_broken_share": 1, "epochs": 0, "learning_rate": -1}.items():
        with refused(ValueError, f"^{name} is {value} "):
            HeadArguments(data="data.csv", **{name: value})
    sentence = error_of_command(["train-reward", "--data", str(tmp_path / "none.csv"), "--clip", "bundled"])
    assert "none.csv' does not exist" in sentence
    sentence = error_of_command(["train-reward", "--data", "data.csv", "--validation_shar", "0.2"])
    assert "did you mean --validation_share" in sentence


def test_ava_scores() -> None:
    assert ava_score("0 1 5 17 38 36 15 6 5 1".split()) == pytest.approx(5.637, abs=1e-3)
    for counts, words in (("0 " * 10, "nobody"), ("1 " * 9 + "-1", "no whole numbers"), ("1 " * 9 + "1.5", "whole")):
        with pytest.raises(ValueError, match=words):
            ava_score(counts.split())


@pytest.mark.parametrize("size", [(1, 1), (1024, 700)])
def test_images_of_any_size_and_mode_are_loaded(tmp_path: Path, size: tuple[int, int]) -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, size).save(path)
        rows = read_rows(write_csv(tmp_path / "data.csv", "image score", [(path.name, 1)]), None)
        digest, pixels = features.load(rows.usable[0].pictures[0], 64)
        assert pixels.shape == (3, 64, 64)
        assert pixels.dtype == torch.uint8
        assert len(digest) == 64


# division


def test_rows_that_share_an_image_or_a_caption_stay_together() -> None:
    """So do rows that are linked by a third one; a head would else be measured on what it has seen."""
    rows = [["a", "b"], ["c"], ["b", "d"], ["e"], ["d", "f"], ["c", "g"]]
    groups = groups_of(rows)
    assert groups[0] == groups[2] == groups[4]
    assert groups[1] == groups[5]
    assert len(set(groups.tolist())) == 3
    rng = np.random.default_rng(0)
    keys = [[str(key) for key in rng.integers(0, 300, 2)] for _ in range(300)]
    keys = [*keys, *([[f"own {i}"] for i in range(400)])]
    groups = groups_of(keys)
    aside = validation_rows(groups, keys, 0.2, seed=1)
    sides = [{key for row, there in zip(keys, aside, strict=True) if there == side for key in row} for side in (0, 1)]
    assert not sides[0] & sides[1]
    assert 0.1 < aside.mean() <= 0.2
    # the order of the rows does not matter
    turned = validation_rows(groups[::-1], keys[::-1], 0.2, seed=1)
    assert (turned[::-1] == aside).all()
    assert (validation_rows(groups, keys, 0.2, seed=2) != aside).any()


# agreement


def test_known_values_of_agreement() -> None:
    assert agreement.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    # the textbook's example of IQ and hours of television: -29/165
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert agreement.spearman(iq, hours) == pytest.approx(-29 / 165)
    assert agreement.spearman(iq, np.ones(10)) is None
    assert agreement.ordered_right(np.array([1.0, 2, 2, 0]), np.array([1.0, 2, 3, 3]))[0] == pytest.approx(2.5 / 5)
    assert agreement.ordered_right(np.arange(10.0), np.arange(10.0)) == (1, 5)
    assert agreement.ordered_right(np.arange(10.0), np.ones(10)) is None
    # Wilson's interval of 8 of 10 successes
    assert agreement.share_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_intervals_hold_the_truth_19_times_in_20() -> None:
    """Over normal pairs with a known rank correlation, 6/pi arcsin(r/2), and share in order, 1/2 + arcsin(r)/pi."""
    rng, held = np.random.default_rng(0), np.zeros(2)
    rho, share = 6 / np.pi * np.arcsin(0.6 / 2), 0.5 + np.arcsin(0.6) / np.pi
    for _ in range(400):
        a = rng.normal(size=40)
        b = 0.6 * a + 0.8 * rng.normal(size=40)
        found = agreement.of_ratings(a, b, np.arange(40))
        for i, (name, truth) in enumerate((("spearman", rho), ("pairwise_accuracy", share))):
            low, high = found[f"{name}_interval"]
            held[i] += low < truth < high
    assert (held / 400 > 0.92).all()
    assert (held / 400 < 0.98).all()


# heads


def unit(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=shape)).float() + 1, dim=-1)


@pytest.mark.parametrize("are_pairs", [False, True])
def test_a_linear_head_finds_known_weights(are_pairs: bool) -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.normal(size=8)).float()
    embeds = unit(rng, 2000, 2, 8) if are_pairs else unit(rng, 300, 8)
    if are_pairs:
        chance = (5 * (embeds[:, 0] - embeds[:, 1]) @ truth).sigmoid()
        targets = (torch.from_numpy(rng.random(2000)).float() < chance).float()
    else:
        targets = embeds @ truth + 3
    head, _ = fit.fit_linear(embeds, targets, np.arange(len(embeds)), seed=0)
    found = head[0].weight[0]
    # a unit vector's scores do not change with a multiple of the vector that all of them have in common
    assert torch.nn.functional.cosine_similarity(found, truth, dim=0) > (0.95 if are_pairs else 0.999)
    if not are_pairs:
        assert fit.predicted(head, embeds).sub(targets).abs().max() < 0.01


def test_heads_are_read_back_as_they_were(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ddpo_fast.rewards.head import read_head

    rng = np.random.default_rng(0)
    embeds = unit(rng, 64, 8)
    targets = embeds[:, 0]
    linear, _ = fit.fit_linear(embeds, targets, np.arange(64), seed=0)
    mlp = fit.fit_mlp(embeds, targets, epochs=2, batch_size=16, learning_rate=1e-3, seed=0)
    again = fit.fit_mlp(embeds, targets, epochs=2, batch_size=16, learning_rate=1e-3, seed=0)
    for head in (linear, mlp):
        save_file(fit.head_tensors(head), tmp_path / "head.safetensors")
        read = read_head(tmp_path / "head.safetensors")
        assert torch.equal(fit.predicted(read, embeds), fit.predicted(head, embeds))
    assert torch.equal(fit.predicted(mlp, embeds), fit.predicted(again, embeds))


def test_damaged_embeddings_are_named(rated: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, redness = rated
    data = write_csv(tmp_path / "data.csv", "image score", [(f"{i}.png", redness[i]) for i in range(12)])
    run(data, tmp_path / "out", images=str(folder))
    kept = next((tmp_path / "out" / "features").rglob("*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:50])
    with refused(ValueError, "are damaged", kept.name, "delete that file"):
        run(data, tmp_path / "out", images=str(folder), overwrite=True)


def test_more_broken_images_than_allowed_stop_the_run(rated: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, redness = rated
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    rows = [(str(folder / f"{i}.png"), redness[i]) for i in range(20)]
    for i in range(4):
        (tmp_path / f"cut{i}.png").write_bytes(buffer.getvalue()[: 40 + i])
        rows.append((f"cut{i}.png", 0.1))
    data = write_csv(tmp_path / "data.csv", "image score", rows)
    with refused(ValueError, "images cannot be read", "max_broken_share", "cut"):
        run(data, tmp_path / "out")
    assert run(data, tmp_path / "out", max_broken_share=0.2)["rows"]["skipped"] == 4
