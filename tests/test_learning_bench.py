"""The benchmark of learning: its statistics, its contenders, its colour reward, and a tiny run that can be resumed."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from run_process import ROOT, environment, finish


@pytest.fixture
def bench(monkeypatch):
    """`bench("stem")` imports a module of the folder bench/lib."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return lambda stem: importlib.import_module(f"lib.{stem}")


def curve(rewards, size=32, diversity=None, std=0.0):
    """Epochs of `size` images that take a second each."""
    spread = diversity or [0.3] * len(rewards)
    return [
        {"images": size * (i + 1), "seconds": i + 1.0, "reward": r, "reward_std": std, "diversity": d}
        for i, (r, d) in enumerate(zip(rewards, spread, strict=True))
    ]


def record(rewards, contender, seed, size=32, **others):
    """A record of a learning run whose baseline has epochs of 32 images."""
    row = {"bench": "learning", "contender": contender, "seed": seed, "reward": "colour", "kind": "full"}
    row |= {"images": size * len(rewards), "epochs": curve(rewards, size), "evaluations": [], "stopped": None}
    row |= {"trainer": "ours", "seconds_of": "ours", "commit": "abc"}
    row["settings"] = {"sample_batch_size": size // 2, "sample_num_batches_per_epoch": 2}
    return {**row, **others}


def test_smoothing_weighs_epochs_by_their_images(bench):
    stats = bench("learning_statistics")
    means = [point.value for point in stats.smoothed(curve([1.0, 3.0, 5.0]), "reward", 64)]
    assert means == [2.0, 4.0]
    # epochs of half the size: the same images have the same means, at twice as many points
    halves = stats.smoothed(curve([0.0, 2.0, 2.0, 4.0, 4.0, 6.0], size=16), "reward", 64)
    assert [point.value for point in halves if point.images % 32 == 0] == means
    # an epoch of 48 images counts by the 16 that are in the window
    (_, last) = stats.smoothed([*curve([1.0], 48), {**curve([5.0], 96)[0]}], "reward", 64, whole=False)
    assert last.value == pytest.approx((16 * 1 + 48 * 5) / 64)
    assert [p.images for p in stats.smoothed(curve([1.0, 3.0]), "reward", 64, whole=False)] == [32, 64]


def test_speed_up_counts_images_and_seconds(bench):
    stats = bench("learning_statistics")
    theirs = stats.smoothed(curve([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "reward", 64)
    mine = stats.smoothed(curve([0.0, 4.0, 8.0, 8.0, 8.0, 8.0]), "reward", 64)
    found = stats.speed_up(theirs, mine)
    assert (found["target"], found["baseline_images"], found["images"]) == (4.5, 192, 96)
    assert (found["images_ratio"], found["seconds_ratio"], found["never"]) == (2.0, 2.0, False)
    never = stats.speed_up(theirs, stats.smoothed(curve([0.0] * 12), "reward", 64))
    assert (never["never"], never["images"], never["images_ratio"]) == (True, 384, 0.5)
    # a baseline that falls at the end reached its last reward earlier, and gets no credit for the images after that
    falling = stats.smoothed(curve([0.0, 4.0, 8.0, 8.0, 6.0, 2.0]), "reward", 64)
    found = stats.speed_up(falling, mine)
    assert (found["baseline_images"], found["images_ratio"], found["images_ratio_of_whole_run"]) == (96, 1.0, 2.0)


@pytest.mark.parametrize(
    ("df", "p", "quantile"),
    # tables of Student's t
    [(1, 0.975, 12.706205), (2, 0.975, 4.302653), (4, 0.975, 2.776445), (9, 0.975, 2.262157), (4, 0.995, 4.604095)],
)
def test_students_t_is_that_of_the_tables(bench, df, p, quantile):
    stats = bench("learning_statistics")
    assert stats.student_t_quantile(p, df) == pytest.approx(quantile, abs=1e-6)
    assert stats.student_t_cdf(-quantile, df) == pytest.approx(1 - p, abs=1e-7)


def test_intervals(bench):
    stats = bench("learning_statistics")
    # mean 3, standard error sqrt(2.5 / 5)
    found = stats.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(0.5)
    assert found[:3] == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-5)
    # t = 4.2426 with 4 degrees of freedom
    assert found.p == pytest.approx(0.013236, abs=1e-6)
    ratio = stats.geometric_interval([2.0, 8.0])
    assert ratio.mean == pytest.approx(4.0)
    assert math.log(ratio.high / ratio.mean) == pytest.approx(12.706205 * math.log(2.0), rel=1e-6)
    assert math.isnan(stats.t_interval([1.0]).low)


def test_an_interval_has_its_mean_in_95_of_100_experiments(bench):
    stats, draw = bench("learning_statistics"), random.Random(0)
    experiments = [stats.t_interval([draw.gauss(1.0, 2.0) for _ in range(5)]) for _ in range(2000)]
    inside = sum(found.low < 1.0 < found.high for found in experiments) / len(experiments)
    # three standard errors of a share of 2000
    assert inside == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_collapse_is_a_loss_that_lasts(bench):
    stats = bench("learning_statistics")
    rise = [0.0, 1.0, 2.0, 3.0, 4.0]
    lasting = stats.collapse(curve([*rise, *[2.0] * 6]), 64)
    assert lasting["reward_collapsed"]
    assert lasting["largest_loss"] == pytest.approx(1.5)
    assert lasting["gain"] == pytest.approx(3.5)
    # three points below are no collapse yet, a fourth is; smoothing takes the first epoch's fall
    short, longer = [*rise, *[2.0] * 4, 4.0, 4.0], [*rise, *[2.0] * 5, 4.0, 4.0]
    assert not stats.collapse(curve(short), 64)["reward_collapsed"]
    assert stats.collapse(curve(longer), 64)["reward_collapsed"]
    # as long in images, in epochs of half the size
    shorter = [*rise, *[2.0] * 3, 4.0, 4.0]
    assert not stats.collapse(curve([reward for reward in shorter for _ in "ab"], 16), 64)["reward_collapsed"]
    assert stats.collapse(curve([reward for reward in longer for _ in "ab"], 16), 64)["reward_collapsed"]
    # less than a fifth of the gain, and what the spread of rewards explains
    assert not stats.collapse(curve([*rise, *[3.0] * 6]), 64)["reward_collapsed"]
    assert not stats.collapse(curve([*rise, *[2.0] * 6], std=8.0), 64)["reward_collapsed"]
    # a reward that only falls has lost without a gain
    assert stats.collapse(curve([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0]), 64)["reward_collapsed"]


def test_collapse_of_diversity(bench):
    stats, rewards = bench("learning_statistics"), [0.0, 1.0, 2.0, 3.0]
    assert not stats.collapse(curve(rewards, diversity=[0.3, 0.2, 0.12, 0.12]), 64)["diversity_collapsed"]
    found = stats.collapse(curve(rewards, diversity=[0.3, 0.2, 0.09, 0.09]), 64)
    assert found["diversity_collapsed"]
    assert found["least_diversity_share"] == pytest.approx(0.3)
    assert not stats.collapse(curve(rewards, diversity=[None] * 4), 64)["diversity_collapsed"]


def test_summaries_are_paired_over_seeds(bench):
    report = bench("learning_report")
    shift = [0.0, 10.0, -5.0]
    rows = [record([s, s + 1, s + 2, s + 3], "trl", seed) for seed, s in enumerate(shift)]
    rows += [record([s, s + 3, s + 4, s + 4], "mine", seed) for seed, s in enumerate(shift)]
    # a seed that trl has not run is in the contender's own figures only
    rows += [record([0.0, 0.0, 0.0, 0.0], "mine", 7)]
    theirs, mine = report.summaries(rows, "trl")
    assert (theirs["contender"], mine["contender"]) == ("trl", "mine")
    assert "differences" not in theirs
    assert mine["seeds"] == [0, 1, 2, 7]
    difference = mine["differences"]["training"]
    assert difference["per_seed"] == [1.5, 1.5, 1.5]
    assert (difference["low"], difference["high"], difference["p"]) == (1.5, 1.5, 0.0)
    assert [speed["images"] for speed in mine["speed_ups"]] == [96, 96, 96]
    assert mine["images_ratio"]["mean"] == pytest.approx(128 / 96)


def test_a_seed_that_never_reaches_the_reward_is_counted(bench, capsys):
    report = bench("learning_report")
    rows = [record([0.0, 1.0, 2.0, 3.0], "trl", seed) for seed in range(2)]
    rows += [record([0.0, 4.0, 4.0, 4.0], "mine", 0), record([0.0, 0.0, 0.0, 0.0], "mine", 1)]
    found = report.summaries(rows, "trl")
    mine = found[1]
    assert mine["never"] == 1
    assert mine["images_ratio"]["per_seed"] == [pytest.approx(128 / 96), 1.0]
    report.print_tables(found, "trl")
    said = capsys.readouterr().out
    assert "<=" in said
    assert ">128 (128)" in said


def test_trls_seconds_are_those_of_its_package(bench):
    report = bench("learning_report")
    rows = [record([0.0, 1.0], "trl", 0), record([0.0, 1.0], "trl", 1), record([0.0, 1.0], "mine", 0)]
    rows.append({"bench": "seconds", "kind": "full", "seed": 0, "seconds_per_image": 0.5, "processor_s_per_image": 0.4})
    measured, not_measured, mine = report.with_seconds(rows, "wall")
    assert [epoch["seconds"] for epoch in measured["epochs"]] == [16.0, 32.0]
    assert "measured in turn" in measured["seconds_of"]
    assert [epoch["seconds"] for epoch in not_measured["epochs"]] == [None, None]
    assert [epoch["seconds"] for epoch in mine["epochs"]] == [1.0, 2.0]
    # without trl's seconds of a seed there is no ratio, rather than one of fewer seeds
    found = report.summaries([measured, not_measured, mine, record([0.0, 1.0], "mine", 1)], "trl")
    assert found[1]["seconds_ratio"] is None
    assert found[1]["images_ratio"] is not None


def test_another_kind_can_be_the_baseline(bench):
    report = bench("learning_report")
    rows = [record([0.0, 1.0, 2.0], "recipe", 0), record([0.0, 0.5, 1.0], "recipe", 0, kind="lora")]
    full, lora = report.summaries(rows, "recipe@lora")
    assert full["differences"]["training"]["mean"] == pytest.approx(0.75)
    assert "differences" not in lora


def test_a_contender_may_have_fewer_images_than_the_baseline(bench):
    report, picture = bench("learning_report"), bench("learning_picture")
    slow, fast = record([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], "trl", 0), record([0.0, 1.0, 1.0], "mine", 0)
    for row, count in ((slow, 6), (fast, 3)):
        rewards = row["epochs"][-1]["reward"]
        drawn = {"images": 32 * count, "seconds": None, "trained": {"reward": rewards}, "held_out": {"reward": rewards}}
        row["evaluations"] = [{**drawn, "images": 0}, drawn]
    mine = next(row for row in report.summaries([slow, fast], "trl") if row["contender"] == "mine")
    # the mean of 64 images reaches TRL's last 0.9 after 96 of its 192 images
    assert mine["speed_ups"][0]["images"] == 96
    assert mine["images_ratio"]["mean"] == 2
    assert mine["evaluated_ratio"]["mean"] == 2
    assert list(picture.columns([slow, fast])[("colour", "full")]) == ["mine", "trl"]
    # of runs of several lengths the one of the same length is the baseline
    same = record([0.0, 0.0, 0.5], "trl", 0)
    mine = next(row for row in report.summaries([slow, same, fast], "trl") if row["contender"] == "mine")
    assert mine["speed_ups"][0]["target"] == 0.25


def test_contenders_by_name_and_by_settings(bench):
    module = bench("learning_contenders")
    (trl,) = module.contenders(["trl"], [], ["full"], {})
    # git show af34cb4:Makefile
    demo = {"sample_num_steps": 20, "sample_guidance_scale": 3.0, "train_learning_rate": 4e-4, "train_clip_range": 5e-3}
    demo |= {"train_warmup_steps": 10, "train_timestep_fraction": 0.5, "train_adam_beta2": 0.99, "train_batch_size": 16}
    assert demo.items() <= trl.settings.items()
    assert trl.images == 32
    own = ["name=mine,step_credit=equal,train_target_update=0.05,per_prompt_stat_tracking=False"]
    found = module.contenders(["trl"], own, ["full", "lora"], {"sample_num_steps": 50})
    assert [(c.name, c.use_lora) for c in found] == [("trl", False), ("mine", False), ("trl", True), ("mine", True)]
    changed = {key: value for key, value in found[1].settings.items() if trl.settings.get(key) != value}
    assert changed == {
        "step_credit": "equal",
        "train_target_update": 0.05,
        "per_prompt_stat_tracking": False,
        "sample_num_steps": 50,
    }
    only = module.contenders(["trl@lora"], ["name=x,kind=full"], ["full", "lora"], {})
    assert [(c.name, c.use_lora) for c in only] == [("x", False), ("trl", True)]


def test_recipes_are_contenders_at_tiny_size(bench):
    """An epoch has fewer images there than a recipe's group."""
    contenders = bench("learning_contenders")
    for made in contenders.contenders(
        ["trl", "recipe"], [], ["full", "lora"], contenders.forced_settings("tiny", None, None)
    ):
        images = made.settings["sample_batch_size"] * made.settings["sample_num_batches_per_epoch"]
        assert images % made.settings.get("sample_group_size", 1) == 0


def test_recipes_are_contenders(bench):
    module = bench("learning_contenders")
    full, own, lora = module.contenders(["recipe"], ["name=own,base=recipe,ema_decay=0.9,kind=full"], module.KINDS, {})
    assert (full.name, full.use_lora, lora.name, lora.use_lora) == ("recipe", False, "recipe", True)
    assert full.settings != lora.settings
    assert own.settings == {**full.settings, "ema_decay": 0.9}
    # a recipe's name says its kind
    named = module.contenders(["bundled-full", "bundled-lora"], [], module.KINDS, {})
    assert [(c.name, c.settings) for c in named] == [("bundled-full", full.settings), ("bundled-lora", lora.settings)]
    assert module.lora_settings({"lora_rank": 8, "lora_target_modules": "to_q, to_k", "seed": 1}) == {
        "lora_rank": 8,
        "lora_target_modules": ["to_q", "to_k"],
    }


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("step_credit=equal", "name=NAME"),
        ("name=a,step_credit", "name=NAME"),
        ("name=a,step_credit=much", "step_credit"),
        ("name=a,nonsense=1", "nonsense"),
        ("name=a,base=nowhere", "nowhere"),
        ("name=trl", "two contenders"),
    ],
)
def test_a_wrong_contender_is_refused_in_one_sentence(bench, own, said):
    module = bench("learning_contenders")
    with pytest.raises(module.UnknownContender, match=said) as refused:
        module.contenders(["trl"], [own], ["full"], {})
    assert "\n" not in str(refused.value)


def test_colour_reward_has_its_optimum_at_the_prompts_colour(bench):
    module = bench("colour_reward")
    prompts = ("a lion", "an owl", "a Panda face", "a penguin")
    flat = torch.tensor([module.colour_of(prompt) for prompt in prompts])[:, :, None, None].expand(4, 3, 8, 8)
    rewards, _ = module.colour(flat, prompts, None)
    assert rewards.tolist() == pytest.approx([0.0] * 4, abs=1e-5)
    # only the mean counts
    textured = flat + 0.05 * torch.tensor([1.0, -1.0]).repeat(4)
    assert module.colour(textured, prompts, None)[0].tolist() == pytest.approx([0.0] * 4, abs=1e-5)
    # 0.1 off in every channel
    assert module.colour(flat - 0.1, prompts, None)[0].tolist() == pytest.approx([-1.0] * 4, abs=1e-5)
    assert (module.colour(flat.flip(0), prompts, None)[0] < -1).all()
    # another prompt has one of the colours, the same in every process
    assert module.colour_of("a cat") == (0.9, 0.3, 0.3)
    assert module.colour(flat.double(), prompts, None)[0].dtype == torch.float32


def test_diversity_is_a_distance_within_prompts(bench):
    run = bench("learning_run")
    images = torch.zeros(5, 3, 32, 32)
    images[1] = 0.4
    images[3:] = 0.9
    prompts = ("a", "a", "b", "a", "c")
    # the distances within "a" are 0.4, 0.9 and 0.5; "b" and "c" have one image each
    assert run.diversity(images, prompts) == pytest.approx(0.6)
    assert run.diversity(images[2:], ("a", "b", "c")) is None
    # a texture finer than a 16th of the image is no diversity
    fine = images.clone()
    fine[0, :, ::2] += 0.2
    fine[0, :, 1::2] -= 0.2
    assert run.diversity(fine, prompts) == pytest.approx(0.6)


def test_an_existing_record_is_skipped_if_its_settings_are_the_same(bench, tmp_path):
    schedule = bench("learning_schedule")
    options = SimpleNamespace(
        **{
            "prompts": "demo_animals",
            "first_seed": 0,
            "seeds": 2,
            "device": "cpu",
            "model": None,
            "rewards": ["colour"],
        },
        **{"records": tmp_path, "images": 64, "evaluate_every": 64, "evaluation_images": 16},
        **{"trl_package": False, "no_trl_seconds": False},
    )
    contenders = bench("learning_contenders").contenders(["trl"], ["name=a"], ["full"], {})
    runs = list(schedule.planned(options, contenders))
    order = [(r.spec["bench"], r.spec["contender"], r.spec["seed"]) for r in runs]
    # trl's seconds in each round; the contenders' order turns
    assert order[:3] == [("seconds", "trl", 0), ("learning", "trl", 0), ("learning", "a", 0)]
    assert order[3:] == [("seconds", "trl", 1), ("learning", "a", 1), ("learning", "trl", 1)]
    assert not set(runs[1].spec["prompts"]) & set(runs[1].spec["held_out"])
    assert len({run.path for run in runs}) == len(runs)
    assert not any(map(schedule.is_done, runs))
    runs[1].path.parent.mkdir()
    runs[1].path.write_text(json.dumps({**runs[1].spec, "epochs": []}))
    assert [schedule.is_done(run) for run in runs[:3]] == [False, True, False]
    options.images = 128
    with pytest.raises(schedule.OtherRecord, match="another images"):
        schedule.is_done(list(schedule.planned(options, contenders))[1])


def learning(*options: str, status: int | None = 0):
    command = [sys.executable, "bench/learning.py", "--device", "cpu", "--quick", *options]
    return finish(command, status, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT)


@pytest.mark.benchmark
def test_runs_are_recorded_resumed_and_drawn(tmp_path):
    folder = tmp_path / "records"
    options = ["--contender", "name=mine,train_clip_range=0.1", "--rewards", "colour", "--records", str(folder)]
    first = learning(*options, "--jobs", "2")
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*.json")}
    assert set(paths) == {"seconds/full-trl-seed0.json", "colour/full-trl-seed0.json", "colour/full-mine-seed0.json"}
    assert not list(folder.glob("*/*.log"))
    trl, mine = (json.loads(paths[f"colour/full-{name}-seed0.json"].read_text()) for name in ("trl", "mine"))
    for row in (trl, mine):
        assert [epoch["images"] for epoch in row["epochs"]] == [4, 8]
        assert [found["images"] for found in row["evaluations"]] == [0, 4, 8]
        assert row["epochs"][0]["rewards"]["colour"] == pytest.approx(row["epochs"][0]["reward"])
        assert row["epochs"][0]["diversity"] is None or row["epochs"][0]["diversity"] > 0
        assert row["evaluations"][0]["held_out"]["rewards"].keys() == row["epochs"][0]["rewards"].keys()
        assert row["commit"]
    # the first images are those of the untrained model, from the same prompts and noise
    assert trl["epochs"][0]["reward"] == mine["epochs"][0]["reward"]
    assert trl["evaluations"][0]["held_out"] == mine["evaluations"][0]["held_out"]
    assert json.loads(paths["seconds/full-trl-seed0.json"].read_text())["seconds_per_image"] > 0
    assert (folder / "learning.png").stat().st_size > 1000
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["contender"] for row in summary] == ["mine", "trl"]
    # a lost record is made again, the others stay; then nothing is left to run
    before = paths["colour/full-trl-seed0.json"].stat().st_mtime_ns
    paths["colour/full-mine-seed0.json"].unlink()
    assert "1 of 3 runs" in learning(*options).stderr
    assert paths["colour/full-trl-seed0.json"].stat().st_mtime_ns == before
    again = json.loads(paths["colour/full-mine-seed0.json"].read_text())
    assert [epoch["reward"] for epoch in again["epochs"]] == [epoch["reward"] for epoch in mine["epochs"]]
    assert "0 of 3 runs" in learning(*options).stderr
    assert "colour, all weights, 8 images" in first.stdout
    assert "colour, all weights" in learning("--records", str(folder), "--show").stdout


@pytest.mark.benchmark
def test_the_trl_package_learns_the_same(tmp_path):
    folder, options = tmp_path / "records", ["--contenders", "trl", "--rewards", "colour"]
    learning(*options, "--records", str(folder), "--no_trl_seconds")
    learning(*options, "--records", str(tmp_path / "package"), "--trl_package")
    ours, trl = (
        json.loads((path / "colour/full-trl-seed0.json").read_text()) for path in (folder, tmp_path / "package")
    )
    assert (ours["trainer"], trl["trainer"]) == ("ours", "trl")
    assert trl["evaluations"] == []
    for mine, theirs in zip(ours["epochs"], trl["epochs"], strict=True):
        # rounding alone: prompts, noise and warm-up are the same
        assert mine["reward"] == pytest.approx(theirs["reward"], abs=0.02)


@pytest.mark.benchmark
def test_a_run_that_fails_stops_no_other(tmp_path):
    (tmp_path / "broken_reward.py").write_text("def broken(images, prompts, metadata):\n    raise OSError('no disk')\n")
    folder = tmp_path / "records"
    options = ["--contenders", "trl", "--rewards", "broken_reward:broken", "colour", "--no_trl_seconds"]
    command = [sys.executable, str(ROOT / "bench/learning.py"), "--device", "cpu", "--quick", *options]
    done = finish([*command, "--records", folder], 1, env=environment(OMP_NUM_THREADS="1"), cwd=tmp_path)
    assert "no disk" in done.stderr
    assert (folder / "colour/full-trl-seed0.json").exists()
    assert "colour" in done.stdout
