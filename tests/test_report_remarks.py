"""What a report says is unusual about a run, and the options that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recorded_run import epoch_records, write_run
from report_page import page_of

from ddpo_fast.commands.options import train_parser
from ddpo_fast.report import remarks
from ddpo_fast.report.run_records import read


def falling(epoch):
    return 0.25 if epoch < 3 else 0.02


@pytest.mark.parametrize(
    ("changes", "config", "title", "option"),
    [
        ({"image_spread": falling}, {}, "images of a prompt have become alike", "--train_target_update"),
        ({"reward_spread": falling}, {}, "rewards of a prompt have become alike", "--train_kl_weight"),
        ({"reward_std": 0.0}, {}, "All rewards were equal in 9 of 9 epochs", "--reward"),
        ({"reward_median": 1.4, "reward_max": 1.4}, {}, "saturated", "--reward"),
        ({"reward_mean": lambda epoch: 1 - epoch / 9}, {}, "has fallen", "--train_learning_rate"),
        ({"reward_mean": lambda epoch: 1 - abs(epoch - 4) / 4}, {}, "better before the end", "--export best"),
        ({"reward_mean": lambda epoch: 0.5 + 0.01 * (-1) ** epoch}, {}, "not clearly risen", "--recipe"),
        ({"ratio_drift": 9e-5}, {}, "drift is near the clip range", "--train_recompute_log_probs"),
        ({"approx_kl": 0.5}, {}, "moved far", "--train_num_inner_epochs"),
        ({"clipfrac": 0.99}, {}, "99% of the ratios", "--train_clip_range"),
        ({"zero_gradient": 0.7}, {}, "70% of the pairs", "--sample_redraws"),
        (
            {"reward_s": 4.0, "elapsed_s": lambda epoch: 9.0 * (epoch + 1)},
            {},
            "waits for the reward 44%",
            "--reward_device",
        ),
        ({"elapsed_s": lambda epoch: 20.0 * (epoch + 1)}, {}, "goes into checkpoints", "--save_freq"),
        ({"reward/two_mean": lambda epoch: -epoch}, {}, "One of the rewards has fallen: two", "--reward"),
    ],
)
def test_what_is_unusual_is_said(tmp_path, changes, config, title, option):
    folder = write_run(tmp_path / "run", epoch_records(**changes), **config)
    found = remarks.remarks_on(read(folder))
    (remark,) = [remark for remark in found if title in remark.title]
    assert option in dict(remark.options)
    assert remark.title in page_of(folder).text


def test_options_that_are_on_are_not_named(tmp_path):
    run = write_run(tmp_path / "run", epoch_records(image_spread=falling), train_guard=True)
    (remark,) = remarks.remarks_on(read(run))
    assert [option for option, _ in remark.options] == ["--train_target_update", "--train_kl_weight"]


def test_a_held_out_reward_that_falls_is_said(tmp_path):
    lines = epoch_records()
    for record, mean in zip([r for r in lines if r["kind"] == "eval"], (0.1, 0.9, 0.5, 0.1), strict=True):
        record["eval/one_mean"] = mean
    (remark,) = remarks.remarks_on(read(write_run(tmp_path / "run", lines)))
    assert "held-out reward one falls" in remark.title


def test_a_good_run_has_no_remarks(tmp_path):
    run = write_run(tmp_path / "run")
    assert remarks.remarks_on(read(run)) == []
    assert "Nothing: the reward" in page_of(run).text
    # the ratio of a moving average's images is no measure of rounding
    averaged = write_run(tmp_path / "averaged", epoch_records(ratio_drift=9e-5), ema_sampling=True)
    assert remarks.remarks_on(read(averaged)) == []


def test_options_in_remarks_exist():
    source = Path(remarks.__file__).read_text("utf-8")
    options = set(train_parser()._option_string_actions)
    named = set(re.findall(r"--[a-z]\w+", source))
    assert len(named) > 10
    assert named <= options
