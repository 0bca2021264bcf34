"""`ddpo-fast report`: what its page says of whole, damaged and running runs, and that it is one safe file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects
import pytest
from compare_runs import metrics_of
from plotly.offline import get_plotlyjs
from recorded_run import ODD_PROMPTS, epoch_records, write_run, write_samples
from report_page import Page, page_of
from tiny_run import build_trainer

from ddpo_fast.report import curves, images, overview, page, prompts, remarks, settings
from ddpo_fast.report.run_records import read, read_all


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine")
    write_samples(folder)
    return folder


# a whole run


def test_a_real_run_writes_its_page(model_dir, tmp_path):
    """Its metrics are those that the page reads, and a second call of the trainer replaces the page."""
    trainer = build_trainer(model_dir, tmp_path / "run", draws=True)
    trainer.train()
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    shown = Page(text)
    epoch, last = metrics_of(trainer, "epoch")
    names = ("reward_min", "reward_p25", "reward_median", "reward_p75", "reward_max")
    quantiles = [epoch[name] for name in names]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] < epoch["reward_mean"] < quantiles[-1]
    assert epoch["host_gb"] > 0.1
    assert epoch["clip_range"] == 1e-4
    of_prompts = epoch["prompt_rewards"].values()
    assert sum(images for _, images in of_prompts) == epoch["images"] == 8
    mean = sum(mean * images for mean, images in of_prompts) / 8
    assert mean == pytest.approx(epoch["reward_mean"])
    titles = {chart["title"] for chart in shown.data["charts"]}
    assert {"Reward", "Gradient norm, before clipping", "Images per second", "Memory, GB"} <= titles
    assert f"{epoch['reward_mean']:.4g} to {last['reward_mean']:.4g}" in shown.text
    trainer.train(1)
    assert (tmp_path / "run" / "report.html").read_text("utf-8") != text


def test_the_page_has_every_part(run):
    shown = page_of(run)
    found = {chart["title"]: chart for chart in shown.data["charts"]}
    assert found.keys() >= {
        "Reward",
        "Reward one",
        "Reward two",
        "Held-out one",
        "KL from the policy that sampled",
        "Share of clipped ratios",
        "Ratio drift before the first update",
        "Gradient norm, before clipping",
        "Share of pairs without a gradient",
        "How much a prompt's images differ",
        "Images per second",
        "Where the time of an epoch goes, seconds",
        "Memory, GB",
    }
    # the lowest to the highest, the middle half, and the mean on top
    reward = found["Reward"]
    assert [trace.get("fill") for trace in reward["data"]] == [None, "tonexty", None, "tonexty", None]
    assert reward["data"][-1]["x"] == list(range(1, 10))
    assert reward["xs"][-1]["images"] == list(range(16, 160, 16))
    assert reward["xs"][-1]["minutes"] == pytest.approx([epoch / 10 for epoch in range(1, 10)])
    assert found["Held-out one"]["data"][-1]["x"] == [0, 3, 6, 9]
    assert found["Held-out one"]["xs"][-1]["images"] == [0, 48, 96, 144]
    # updates share their epoch
    kl = found["KL from the policy that sampled"]
    assert kl["data"][0]["x"][:3] == [0.5, 1, 1.5]
    assert kl["xs"][0]["images"][:3] == [8, 16, 24]
    stages = {trace["name"]: trace["y"] for trace in found["Where the time of an epoch goes, seconds"]["data"]}
    assert stages["training"] == [3.0] * 9
    assert stages["evaluating, saving, the rest"] == pytest.approx([0.9] * 9)
    # the clip range is a line in the drift's chart
    (shape,) = found["Ratio drift before the first update"]["layout"]["shapes"]
    assert shape["y0"] == 1e-4
    assert "all 9 epochs" in shown.text
    assert "train_learning_rate" not in " ".join(name for name, _ in settings.changed(read(run)))


def test_charts_are_what_plotly_draws(run):
    for chart in page_of(run).data["charts"]:
        # raises for a property that plotly does not have
        plotly.graph_objects.Figure({"data": chart["data"], "layout": chart["layout"]})
        lengths = [
            (len(trace["y"]), *map(len, xs.values())) for trace, xs in zip(chart["data"], chart["xs"], strict=True)
        ]
        assert all(len(set(each)) == 1 for each in lengths)


def test_images_and_scores_are_embedded(run):
    shown = page_of(run)
    (epochs,) = shown.data["samples"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 3, 9]
    assert [sample["prompt"] for sample in epochs[0]["samples"]] == list(ODD_PROMPTS)
    assert epochs[1]["samples"][2]["reward"] == pytest.approx(0.3)
    assert all(sample["src"].startswith("data:image/jpeg;base64,") for epoch in epochs for sample in epoch["samples"])
    assert "Best of the images that epoch 9 was trained on" in shown.text
    assert "worst <i>cat</i>" in shown.text
    alternatives = [attributes.get("alt") for tag, attributes in shown.tags if tag == "img"]
    assert len(alternatives) == 2
    assert all(alternatives)


def test_many_large_images_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BUDGET", 30_000)
    monkeypatch.setattr(images, "MOST_EPOCHS", 8)
    folder = write_run(tmp_path / "run")
    write_samples(folder, tuple(range(0, 200, 10)), size=500)
    epochs, kept = images.sample_epochs(folder)
    assert kept == 20
    assert 2 <= len(epochs) < 8
    assert (epochs[0]["epoch"], epochs[-1]["epoch"]) == (0, 190)
    assert sum(len(sample["src"]) for epoch in epochs for sample in epoch["samples"]) < 60_000
    assert f"{len(epochs)} of 20 epochs are shown" in page_of(folder).text


def test_a_picture_stands_in_for_kept_images(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "kept no images" in page_of(folder).text
    write_samples(tmp_path / "other")
    (tmp_path / "other/samples/epoch_00000/000.jpg").rename(folder / "before_after.png")
    assert [a["alt"] for tag, a in page_of(folder).tags if tag == "img" and a["src"].startswith("data:image/")]


# one file, and safe


def test_nothing_is_loaded_from_elsewhere(run):
    html = page.render([run])
    shown = Page(html)
    for tag, attributes in shown.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if tag != "body" and name in attributes and not name.startswith("data-"):
                assert (attributes[name] or "").startswith(("data:", "#")), (tag, attributes)
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    policy = next(a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    # of the page's own, as plotly's script holds addresses that it would use for maps
    own = html.replace(get_plotlyjs(), "")
    assert len(own) < 200_000
    assert not re.search(r"https?://", own)
    assert len(html) < 6e6


def test_texts_of_a_run_are_only_text(tmp_path):
    evil = '"><img src=x onerror=alert(1)></script>'
    folder = write_run(tmp_path / "<i>run & co", None, run_label=evil, tracker_kwargs={"api_key": "s3cret"})
    write_samples(folder)
    shown = page_of(folder)
    assert [attributes.get("type") for tag, attributes in shown.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    assert not [tag for tag, _ in shown.tags if tag in ("i", "b")]
    assert not any("onerror" in attributes for _, attributes in shown.tags)
    assert evil in " ".join(shown.texts)
    for prompt in ODD_PROMPTS:
        # rows of the table and names in the data
        assert " ".join(prompt.split()) in shown.text
        assert prompt in [sample["prompt"] for sample in shown.data["samples"][0][0]["samples"]]
    assert "s3cret" not in page.render([folder])
    # plotly reads tags in names
    assert shown.data["charts"][0]["data"][-1]["name"] == "&lt;i&gt;run &amp; co"


def test_addresses_are_shown_without_passwords():
    assert settings.shown("https://me:pass@host/reward") == "https://host/reward"


# damaged, missing, unfinished


def test_a_killed_run_is_read_to_its_last_whole_line(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[:-40])
    found = read(folder)
    assert (len(found.epochs), found.lost, found.problems) == (9, 0, [])
    # cut at every byte, as a run may be read while it writes
    for size in range(0, len(whole), 97):
        (folder / "metrics.jsonl").write_bytes(whole[:size])
        cut = read(folder)
        assert cut.lost == 0
        assert cut.epochs == found.epochs[: len(cut.epochs)]
        curves.update_charts([cut]), curves.speed_charts([cut]), remarks.remarks_on(cut)
    assert "the 3 epochs so far" in page_of(write_run(tmp_path / "short", epoch_records(3))).text


def test_damaged_lines_and_files_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    lines[3] = lines[3][:20]
    lines[4] = json.dumps({"kind": "epoch", "epoch": "two", "reward_mean": "high"})
    lines[5] = json.dumps({"kind": "update", "epoch": 1, "grad_norm": float("inf"), "approx_kl": None, "loss": [1]})
    lines[6:6] = ["", "null", "[]", "\x00"]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "config.json").write_text("{", "utf-8")
    write_samples(folder)
    (folder / "samples/epoch_00003/samples.json").write_text('{"epoch": 3, "samples": [{"fi', "utf-8")
    (folder / "samples/epoch_00009/000.jpg").write_bytes(b"\xff\xd8 no image")
    listed = json.loads((folder / "samples/epoch_00009/samples.json").read_text())
    listed["samples"] += [7, {"file": "../../config.json"}, {"file": None}, {"file": "gone.jpg", "prompt": 1}]
    (folder / "samples/epoch_00009/samples.json").write_text(json.dumps(listed), "utf-8")
    shown = page_of(folder)
    assert "5 of the lines of metrics.jsonl are damaged" in shown.text
    assert "settings are not known" in shown.text
    (epochs,) = shown.data["samples"]
    assert [(epoch["epoch"], len(epoch["samples"])) for epoch in epochs] == [(0, 4), (9, 3)]
    json.dumps(shown.data, allow_nan=False)


ODD_VALUES = (None, "x", [1], {"a": 1}, True, -1, 1e308, float("nan"))


def test_values_of_any_kind_are_read(tmp_path):
    """Each value of each kind of line is replaced by each odd one: nothing raises, and all numbers are finite."""
    lines = epoch_records(3, ODD_PROMPTS[:1])
    folder = write_run(tmp_path / "run")
    for kind in ("update", "epoch", "eval"):
        (*_, example) = (record for record in lines if record["kind"] == kind)
        for name in example:
            for odd in ODD_VALUES:
                changed = [{**record, name: odd} if record["kind"] == kind else record for record in lines[:-1]]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed), "utf-8")
                run = read(folder)
                charts = [curves.reward_charts([run]), curves.update_charts([run]), curves.speed_charts([run])]
                json.dumps(charts, allow_nan=False)
                remarks.remarks_on(run), overview.sentence(run), overview.tiles(run), prompts.table(run)
    for odd in ODD_VALUES:
        for name in ("num_epochs", "train_clip_range", "pretrained_model", "reward", "use_lora", "config"):
            (folder / "config.json").write_text(json.dumps({"config": {name: odd}, name: odd}), "utf-8")
            page._view(read(folder), 0)


def test_a_run_without_an_epoch_has_a_page(tmp_path):
    assert "No epoch has ended yet" in page_of(write_run(tmp_path / "run", [])).text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "No epoch has ended yet" in page_of(tmp_path / "run").text


def test_records_from_before_there_were_quantiles(tmp_path):
    new = {"reward_min", "reward_p25", "reward_median", "reward_p75", "reward_max", "prompt_rewards", "clip_range"}
    old = [{name: value for name, value in record.items() if name not in new} for record in epoch_records()]
    shown = page_of(write_run(tmp_path / "run", old))
    assert [trace.get("fill") for trace in shown.data["charts"][0]["data"]] == [None, "tonexty", None]
    assert "By prompt" not in shown.text


def test_long_runs_are_thinned(tmp_path):
    lines = epoch_records(2000, ("a cat",), grad_norm=lambda epoch: float(epoch == 777))
    charts = {chart["title"]: chart for chart in curves.update_charts([read(write_run(tmp_path / "run", lines))])}
    low, high, line = charts["Gradient norm, before clipping"]["data"]
    assert len(line["y"]) == len(high["y"]) <= curves.MOST_POINTS
    # a single high value is not averaged away
    assert max(line["y"]) == max(high["y"]) == 1.0
    assert line["x"][-1] == 2000
    # an epoch's updates have 0 and 1e-4
    low, high, line = charts["KL from the policy that sampled"]["data"]
    assert (low["y"][5], line["y"][5], high["y"][5]) == (0, 5e-5, 1e-4)
    # which only an epoch's first update has
    assert None not in charts["Ratio drift before the first update"]["data"][-1]["y"]


# several runs


def test_several_runs_side_by_side(tmp_path):
    one = write_run(tmp_path / "a" / "run", train_learning_rate=1e-3)
    two = write_run(tmp_path / "b" / "run", epoch_records(5), train_learning_rate=1e-4, train_guard=True)
    runs = read_all([one, two])
    assert [each.name for each in runs] == ["a/run", "b/run"]
    assert settings.differences(runs) == [("train_guard", ["", "yes"]), ("train_learning_rate", ["0.001", "0.0001"])]
    shown = page_of(one, two)
    assert "2 runs compared" in shown.text
    reward = shown.data["charts"][0]
    assert [trace["name"] for trace in reward["data"] if "name" in trace] == ["a/run", "b/run"]
    assert [len(trace["y"]) for trace in reward["data"] if "name" in trace] == [9, 5]
    same = page_of(one, write_run(tmp_path / "c" / "run", train_learning_rate=1e-3))
    assert "All recorded settings are the same." in same.text
