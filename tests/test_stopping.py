"""After Ctrl-C, SIGTERM or an error there is a checkpoint of the last whole epoch to continue from; a folder has one
writer; what a run may be resumed with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compare_runs import as_bytes, metrics_of, without_timings
from diffusers import UNet2DConditionModel
from one_sentence import refused
from run_process import UNCOMPILED
from tiny_run import SETTINGS, Prompts, brightness

from ddpo_fast import DDPOConfig
from ddpo_fast.interruption import SIGNALS, Interruption
from ddpo_fast.prompts import load_prompts
from ddpo_fast.run_folder import checkpoint, folder_lock
from ddpo_fast.run_folder.resume_checks import refuse_changes

BATCHES = SETTINGS["sample_num_batches_per_epoch"]
QUICK = {"sample_num_steps": 2}


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_interrupts_the_program(number, raised):
    before = handlers()
    with pytest.raises(raised) as ended, Interruption():
        signal.raise_signal(number)
    assert handlers() == before
    assert raised is KeyboardInterrupt or ended.value.code == 128 + number


def test_a_signal_is_delayed_while_it_is_held_and_a_second_one_is_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ddpo_fast.interruption.time.monotonic", lambda: now[0])
    done = []

    def work(seconds_between):
        with Interruption() as interruption, interruption.deferred():
            signal.raise_signal(signal.SIGINT)
            now[0] += seconds_between
            signal.raise_signal(signal.SIGINT)
            done.append(seconds_between)

    # a launcher passes the terminal's signal on, so that it arrives twice at once: that counts as one
    for seconds in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            work(seconds)
    assert done == [0]


def test_a_signal_whose_exception_is_swallowed_is_raised_again():
    with Interruption() as interruption:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            interruption.check()


def test_handlers_of_others_are_kept():
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption():
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        seen = []
        thread = threading.Thread(target=lambda: [seen.append(handlers()) for _ in [0] if Interruption().__enter__()])
        before_thread = handlers()
        thread.start()
        thread.join()
        assert seen == [before_thread]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hup)


def progress(trainer) -> tuple[int, int]:
    """(epochs, updates) of a run so far, which its last checkpoint has too."""
    state = checkpoint.read_state(checkpoint.find(trainer.output_dir))
    assert state["epochs"] == trainer.first_epoch
    return state["epochs"], state["global_step"]


@pytest.mark.parametrize(("number", "save_freq"), [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_stopped_in_an_update_it_ends_with_the_same_bits(make_trainer, tmp_path, number, save_freq, capsys):
    """Stopped in the third epoch, and continued by calling `train` again and by a new trainer."""
    settings = {**QUICK, "num_epochs": 3, "save_freq": save_freq}

    def make(name, **more):
        prompts = load_prompts("animals")
        return make_trainer(output_dir=str(tmp_path / name), prompts=prompts, **settings, **more)

    make("whole").train()
    stopped = make("stopped")
    step, updates = stopped.engine.step, []

    def step_then_stop():
        updates.append(1)
        metrics = step()
        if len(updates) == 5:
            signal.raise_signal(number)
        return metrics

    stopped.engine.step = step_then_stop
    before = handlers()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.train()
    assert handlers() == before
    assert progress(stopped) == (2, 4)
    assert f"checkpoint_2 is there: go on with --resume_from {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert checkpoint.find(tmp_path / "stopped").name == "checkpoint_2"
    checkpoint.verify(checkpoint.find(tmp_path / "stopped"))
    other = make("other", resume_from=str(tmp_path / "stopped"))
    other.train()
    stopped.train()
    ends = [checkpoint.find(tmp_path / name) for name in ("whole", "stopped", "other")]
    assert {end.name for end in ends} == {"checkpoint_3"}
    whole, *others = [(checkpoint.read_training(end), checkpoint.read_random_state(end, 0)) for end in ends]
    assert [as_bytes(one) for one in others] == [as_bytes(whole)] * 2
    kept, expected = (list(map(without_timings, metrics_of(tmp_path / name))) for name in ("stopped", "whole"))
    assert kept == expected


def test_stopped_while_a_reward_runs_in_a_thread(make_trainer, tmp_path):
    """The reward returns only after `train` has returned, so `train` must not wait for it."""
    given_up, calls = threading.Event(), []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 1 + BATCHES:
            os.kill(os.getpid(), signal.SIGINT)
            given_up.wait(300)
        return brightness(images, prompts, metadata)

    trainer = make_trainer(reward=reward, num_epochs=3, reward_overlap=True, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not given_up.is_set()
    assert checkpoint.find(tmp_path / "run").name == "checkpoint_1"
    given_up.set()
    trainer.train()
    assert progress(trainer) == (3, 6)
    assert [r["epoch"] for r in metrics_of(tmp_path / "run", "epoch")] == [0, 1, 2]
    assert [r["update"] for r in metrics_of(tmp_path / "run", "update")] == list(range(6))


def test_an_error_leaves_a_checkpoint_of_the_last_whole_epoch(make_trainer, tmp_path):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 1 + 2 * BATCHES:
            raise KeyError("a bug that is repaired in the next cell")
        return brightness(images, prompts, metadata)

    trainer = make_trainer(reward=reward, num_epochs=3, save_freq=10, reward_overlap=False, **QUICK)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_2"]
    trainer.train()
    assert progress(trainer) == (3, 6)


def test_a_second_call_trains_as_many_epochs_again(make_trainer, tmp_path):
    """As in TRL, but the epochs' numbers continue."""
    trainer = make_trainer(num_epochs=1, **QUICK)
    trainer.train()
    trainer.train()
    assert progress(trainer) == (2, 4)
    trainer.train(epochs=2)
    assert progress(trainer) == (4, 8)
    assert [r["update"] for r in metrics_of(tmp_path / "run", "update")] == list(range(8))


REWARD = """
import time
calls = []
def reward(images, prompts, metadata):
    calls.append(1)
    if len(calls) == 6:
        print("waiting", flush=True)
        time.sleep(3600)
    return images.float().mean((1, 2, 3)), {}
"""


def test_the_command_ends_at_once_and_without_a_traceback(model_dir, tmp_path):
    """Interrupted in a reward that takes an hour. Its sixth call is in the second epoch: before it come one for the
    trial, one for the first images, and two for each epoch's batches."""
    (tmp_path / "slow.py").write_text(REWARD)
    options = ["--pretrained_model", model_dir, "--reward", "slow:reward", "--output_dir", "run", "--num_epochs", "3"]
    options += ["--recipe", "trl", "--sample_num_steps", "2", "--mixed_precision", "no", "--reward_overlap", "True"]
    # images to look at would be scored by it too
    options += ["--sample_freq", "0"]
    paths = os.pathsep.join([str(Path(checkpoint.__file__).parents[1]), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpo_fast.cli", "train", *options],
        cwd=tmp_path,
        env=os.environ | UNCOMPILED | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"checkpoint_1 is there: go on with --resume_from {tmp_path / 'run'}" in said.splitlines()[-1]


# one writer


HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("folder_lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pathlib import Path
print(repr(module.lock(Path(sys.argv[2]))), flush=True)
sys.stdin.read()
"""


def hold(folder):
    command = [sys.executable, "-c", HOLDER, folder_lock.__file__, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    process, answer = hold(tmp_path / "run")
    assert answer == "''"
    try:
        for name in ("run", "link", "link/../run"):
            with refused(ValueError, f"is being written to by process {process.pid} on"):
                make_trainer(output_dir=str(tmp_path / name))
    finally:
        process.kill()
        process.wait()
    trainer = make_trainer()
    assert hold(tmp_path / "run")[1].startswith('"') or "is being written to" in hold(tmp_path / "run")[1]
    assert trainer.output_dir == tmp_path / "run"


def test_each_new_folder_is_made_by_one_caller(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(folder_lock.make_new, [tmp_path / "a" / "run"] * 24))
    assert len(set(made)) == 24
    assert all(folder.is_dir() for folder in made)


def test_two_runs_that_start_in_one_second_have_two_folders(make_trainer, tmp_path, monkeypatch):
    class Still:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2024, 1, 1)

    monkeypatch.setattr("ddpo_fast.run_folder.run_log.datetime", Still)
    one = make_trainer(output_dir=None, logdir=str(tmp_path))
    other = make_trainer(output_dir=None, logdir=str(tmp_path))
    assert one.output_dir != other.output_dir
    assert Path(other.accelerator.logging_dir) == other.output_dir


# what a run may be resumed with


@pytest.mark.parametrize(
    ("changes", "in_place", "words"),
    [
        ({}, True, ""),
        ({"train_learning_rate": 1.0}, True, ""),
        ({"lora_alpha": 8}, False, "lora_alpha is 8"),
        ({"pretrained_model": "/m/other"}, False, "pretrained_model is '/m/other'"),
        ({"pretrained_model": "/m/other", "base": "b"}, False, ""),
        ({"base": "c"}, False, "has other weights"),
        ({"prediction_type": "v_prediction"}, False, "prediction_type"),
        ({"reward": "redness"}, True, "reward is 'redness'.*another output_dir"),
        ({"reward": "redness"}, False, ""),
        ({"sample_num_steps": 7}, True, "sample_num_steps is 7.*has 50"),
        ({"prompts": "animals"}, True, "prompts is 'animals'"),
        ({"lora_target_modules": ["to_q", "to_k"]}, True, ""),
    ],
)
def test_what_a_run_may_be_resumed_with(changes, in_place, words):
    config = vars(DDPOConfig())
    saved = {"lora_alpha": 4, "pretrained_model": "/m/sd", "prediction_type": "epsilon", "reward": "blueness"}
    saved |= {"prompts": "x", "lora_target_modules": ["to_k", "to_q"], "base": "b"}
    present = {**config, **{k: v for k, v in saved.items() if k != "base"}, **changes}
    if not words:
        return refuse_changes("runs/a", {"config": config, **saved}, present, in_place)
    with refused(ValueError, words):
        refuse_changes("runs/a", {"config": config, **saved}, present, in_place)
    return None


def test_another_base_model_is_refused_and_a_moved_one_is_not(make_trainer, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(model_dir).parent)
    trainer = make_trainer(use_lora=True, model=f"./{Path(model_dir).name}", num_epochs=1, **QUICK)
    trainer.train()
    assert checkpoint.read_state(checkpoint.find(tmp_path / "run"))["pretrained_model"] == str(Path(model_dir))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "moved")
    options = {
        "use_lora": True,
        "model": str(tmp_path / "moved"),
        "resume_from": "run",
        "output_dir": "../" + tmp_path.name + "/run",
    }
    assert make_trainer(num_epochs=2, **options, **QUICK).first_epoch == 1
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "moved" / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 1
    unet.save_pretrained(tmp_path / "moved" / "unet")
    with pytest.raises(ValueError, match="pretrained_model"):
        make_trainer(num_epochs=2, **options, **QUICK)


def test_another_number_of_steps_needs_a_new_run(make_trainer, tmp_path):
    make_trainer(num_epochs=1, **QUICK).train()
    with pytest.raises(ValueError, match=r"sample_num_steps is 3, but .* has 2: leave .* another output_dir"):
        make_trainer(resume_from=str(tmp_path / "run"), sample_num_steps=3)
    branch = make_trainer(resume_from=str(tmp_path / "run"), sample_num_steps=3, output_dir=str(tmp_path / "branch"))
    assert branch.first_epoch == 1
    assert not (branch.output_dir / "metrics.jsonl").exists()


def test_a_run_that_is_complete_says_so(make_trainer, tmp_path, caplog):
    make_trainer(num_epochs=1, **QUICK).train()
    again = make_trainer(resume_from=str(tmp_path / "run"), num_epochs=1, **QUICK)
    assert "nothing is left to train; raise num_epochs" in caplog.text
    again.train()
    assert again.first_epoch == 1


def test_a_run_cannot_write_into_a_checkpoint(make_trainer, tmp_path):
    make_trainer(num_epochs=1, prompts=Prompts(), **QUICK).train()
    shutil.copytree(tmp_path / "run" / "checkpoints" / "checkpoint_1", tmp_path / "best")
    before = sorted(p.name for p in (tmp_path / "best").iterdir())
    for folder in (str(tmp_path / "best"), None):
        with pytest.raises(ValueError, match="which is a checkpoint: give the run a folder of its own"):
            make_trainer(resume_from=str(tmp_path / "best"), output_dir=folder, num_epochs=2, **QUICK)
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == before
    new = make_trainer(resume_from=str(tmp_path / "best"), output_dir=str(tmp_path / "new"), num_epochs=2, **QUICK)
    assert new.first_epoch == 1


def test_stopped_before_the_first_epoch_it_prints_how_to_resume(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "trial_save", lambda *_: signal.raise_signal(signal.SIGINT))
    trainer = make_trainer(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert f"there is no checkpoint yet: go on with --resume_from {trainer.output_dir}" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["reward", "prompts"])
def test_a_signal_in_a_users_function_is_not_reported_as_its_error(make_trainer, capsys, place):
    calls = []

    def signalled(*_):
        calls.append(place)
        if len(calls) > 1:
            signal.raise_signal(signal.SIGTERM)
        return ("a cat", {}) if place == "prompts" else brightness(*_)

    trainer = make_trainer(**QUICK, **{place: signalled})
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"go on with --resume_from {trainer.output_dir}" in capsys.readouterr().err


def test_stopped_after_training_it_prints_how_to_resume(make_trainer, capsys):
    trainer = make_trainer(**QUICK, num_epochs=1)
    trainer.train()
    with pytest.raises(SystemExit), trainer.finishing():
        signal.raise_signal(signal.SIGTERM)
    said = f"checkpoint_1 is there: go on with --resume_from {trainer.output_dir}"
    assert said in capsys.readouterr().err
