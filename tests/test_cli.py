from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from one_sentence import error_of_command
from PIL import Image
from run_process import ROOT, finish

from ddpo_fast import DDPOConfig, cli
from ddpo_fast.commands import early_checks
from ddpo_fast.commands import options as command_options
from ddpo_fast.commands import train as train_command
from ddpo_fast.run_folder import checkpoint, folder_lock, hub, pictures
from ddpo_fast.run_folder.run_log import output_folder
from ddpo_fast.trainer import DDPOTrainer

OPTIONS = (
    "--recipe trl --num-epochs 1 --sample_num_steps 2 --sample_batch_size 2 --mixed_precision no --prompts animals "
    "--save_freq 1 --train_learning_rate 1e-3"
).split()
CODE = (
    "import pathlib\n"
    "pathlib.Path(__file__).with_suffix('.ran').touch()\n"
    "def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n"
    "def other(images, prompts, metadata): return images[:, 2].mean((1, 2)), {}\n"
    "def prompt(): return 'a $cat_', {'n': 1}\n"
)


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """A folder with a run and, beside it, the module `users_code.py` of its functions; and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "users_code.py").write_text(CODE)
    here = os.getcwd()
    os.chdir(folder)
    try:
        cli.main(
            [
                *("train", *OPTIONS, "--output_dir", "run", "--pretrained_model", os.path.relpath(model_dir)),
                *("--reward", "users_code:reward", "--prompts", "users_code:prompt", "--negative_prompts", "a dog"),
            ]
        )
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """A copy of that folder as the working directory; its module is not imported yet."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in (str(tmp_path), str(trained))])
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    yield tmp_path
    sys.modules.pop("users_code", None)


# options


@pytest.mark.parametrize(
    "command", [[sys.executable, "ddpo_fast/train.py"], [str(Path(sys.executable).parent / "ddpo-fast"), "train"]]
)
def test_help_lists_every_field(command):
    done = finish([*command, "--help-all"], cwd=ROOT)
    for name in [f.name for f in fields(DDPOConfig)] + [f.name for f in fields(command_options.RunArguments)]:
        assert f"  --{name}" in done.stdout


def test_options_with_dashes_underscores_and_json():
    _, config = train_command.read_options(
        ["--train-clip-range", "0.1", "--tracker_kwargs", '{"wandb": {"name": "x"}}']
    )
    assert config.train_clip_range == 0.1
    assert config.tracker_kwargs == {"wandb": {"name": "x"}}
    _, config = train_command.read_options(["--no_train_cfg", "--per_prompt_stat_tracking", "--gpu_memory", "None"])
    assert (config.train_cfg, config.per_prompt_stat_tracking, config.gpu_memory) == (False, True, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num_epoch 3", "there is no option --num_epoch: did you mean --num_epochs?"),
        ("--learning-rate 3", "did you mean --train_learning_rate?"),
        ("--model x", "did you mean --pretrained_model or --reward_model?"),
        ("--zzz", "there is no option --zzz (`ddpo-fast train --help` lists the options)"),
        ("stray", "'stray' belongs to no option"),
        ("--num_epochs many", "--num_epochs is 'many' but must be a whole number"),
        ("--train_cfg perhaps", "--train_cfg: Truthy value expected"),
        ("--offload disk", "--offload: invalid choice: 'disk'"),
        ("--seed", "--seed: expected one argument"),
        ("--full-finetune --lora_rank 8", "--full-finetune trains all weights, and --lora_rank is of a LoRA"),
        ("--full-finetune --lora-target-modules to_q", "--lora_target_modules is of a LoRA"),
        ("--lora_target_modules ,", "must name a layer"),
    ],
)
def test_wrong_options_are_refused(options, said):
    assert said in error_of_command(["train", *options.split()])


@pytest.mark.parametrize(("words", "status"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_help_lists_the_commands(words, status, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == status
    assert capsys.readouterr().out.startswith("usage: ddpo-fast COMMAND")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "ddpo-fast: error: there is no command 'trian': did you mean train?\n"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ValueError("one\n  two"), 2, "ddpo-fast info: error: one two\n"),
        (RuntimeError(""), 2, "ddpo-fast info: error: RuntimeError\n"),
        (PermissionError(13, "denied", "x"), 2, "ddpo-fast info: error: [Errno 13] denied: 'x'\n"),
        (KeyboardInterrupt(), 130, "\nddpo-fast info: interrupted\n"),
    ],
)
def test_exit_status_and_message_of_each_error(raised, status, said, monkeypatch, capsys):
    def fail(arguments):
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "info", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["info"])
    assert (caught.value.code, capsys.readouterr().err) == (status, said)
    if status == 2:
        monkeypatch.setenv(cli.TRACEBACK, "1")
        with pytest.raises(type(raised)):
            cli.main(["info"])


def test_a_closed_pipe_is_not_an_error():
    code = "from ddpo_fast import cli; cli.COMMANDS['info'] = lambda _: [print('x' * 99) for _ in range(9999)]; "
    command = f"{sys.executable} -c \"{code}cli.main(['info'])\" | head -n 1 ; exit ${{PIPESTATUS[0]}}"
    assert finish(["bash", "-c", command], status=141, cwd=ROOT).stderr == ""


@pytest.mark.parametrize(
    ("told", "given", "precision"),
    [("bf16", [], "bf16"), ("no", [], "no"), ("bf16", ["--mixed_precision", "fp16"], "fp16"), (None, [], "here")],
)
def test_the_precision_of_accelerates_config_is_the_default(told, given, precision, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    here = "fp16" if torch.cuda.is_available() else "no"
    assert train_command.read_options(given)[1].mixed_precision == (here if precision == "here" else precision)
    # a plan is for a GPU, wherever it is made
    planned = command_options.plan_parser().parse(given).mixed_precision
    on_gpu = command_options.precision_or_default(planned, on_gpu=True)
    assert on_gpu == ("fp16" if precision == "here" else precision)
    # in a script the default is TRL's
    assert DDPOConfig().mixed_precision == "fp16"


@pytest.mark.parametrize(
    ("speedup", "precision", "given", "device", "suggested"),
    [
        (2.41, "no", set(), "cpu", True),
        (0.55, "no", set(), "cpu", False),
        (1.1, "no", set(), "cpu", False),
        (2.41, "no", {"mixed_precision"}, "cpu", False),
        (2.41, "bf16", set(), "cpu", False),
        (2.41, "no", set(), "cuda", False),
    ],
)
def test_bf16_is_suggested_where_it_is_faster(speedup, precision, given, device, suggested, monkeypatch):
    monkeypatch.setattr(train_command, "bf16_speedup", lambda: speedup)
    hint = train_command.precision_hint(DDPOConfig(mixed_precision=precision), given, device)
    assert ("with --mixed_precision bf16 this processor computes layers 2.4 times as fast" in hint) == suggested


def test_an_unknown_precision_of_accelerates_config_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "accelerate's mixed_precision is 'fp8'" in error_of_command(["train"])


# where a run writes


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (["--run_name", "mine"], "runs/mine"),
        (["--run_name", "mine", "--logdir", "logs"], "logs/mine"),
        (["--logdir", "logs"], r"logs/jpeg_compressibility-\d{8}-\d{6}"),
        (["--reward", "a.b:c"], r"runs/a.b.c-\d{8}-\d{6}"),
        (["--exp_name", "try"], r"runs/try-\d{8}-\d{6}"),
        (["--project_kwargs", '{"project_dir": "there"}', "--run_name", "mine"], "there"),
        (["--project_kwargs", '{"project_dir": "there"}', "--output_dir", "here"], "here"),
    ],
)
def test_where_a_run_writes(options, folder):
    assert re.fullmatch(folder, str(output_folder(train_command.read_options(options)[1])))


def test_a_resumed_run_stays_in_its_folder_by_any_path(copied):
    (copied / "link").symlink_to("run")
    (copied / "elsewhere").mkdir()
    for named in ("run", "link", "elsewhere/../run", "run/checkpoints/checkpoint_1", "run/checkpoints"):
        options = ["--resume_from", named, "--trust_run"]
        assert output_folder(train_command.read_options(options)[1]) == copied / "run"
    for folder in ("link", "elsewhere/../run"):
        _, config = train_command.read_options([*options, "--output_dir", folder])
        early_checks.check_before_loading(command_options.RunArguments(), config)
    assert str(output_folder(train_command.read_options([*options, "--run_name", "b"])[1])) == "runs/b"


def test_a_folder_that_cannot_be_written(tmp_path, no_model):
    (tmp_path / "file").touch()
    folders = [tmp_path / "file" / "run"]
    if Path("/proc/version").exists():
        folders.append(Path("/proc/run"))
    for folder in folders:
        sentence = error_of_command(["train", "--output_dir", str(folder)])
        assert f"output_dir is '{folder}', but nothing can be written in" in sentence


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(train_command, "make_pipeline", refuse)


# refused before a model is loaded


def test_the_reward_is_tried_on_images_of_the_models_size(no_model, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sized.py").write_text(
        "def reward(images, prompts, metadata): raise KeyError(str(tuple(images.shape)))\n"
    )
    monkeypatch.delitem(sys.modules, "sized", raising=False)
    sentence = error_of_command(["train", "--reward", "sized:reward", "--pretrained_model", model_dir])
    assert "(2, 3, 16, 16)" in sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_cuda_graphs_without_a_gpu(no_model):
    assert "cuda_graphs is True, but" in error_of_command(["train", "--cuda_graphs"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "nobody is logged in: run `hf auth login`"),
        (ConnectionError("no route"), "the Hub does not answer (no route)"),
    ],
)
def test_push_to_hub_without_a_login_is_refused(error, said, no_model, monkeypatch):
    def refuse(token=None):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: error and "token")
    monkeypatch.setattr(hub, "whoami", refuse)
    assert said in error_of_command(["train", "--push_to_hub"])


# training, resuming, sampling


def test_what_a_run_leaves(trained, model_dir):
    run = trained / "run"
    saved = json.loads((run / "config.json").read_text())
    assert saved["reward"] == "users_code:reward"
    assert saved["import_folders"] == {"reward": str(trained), "prompts": str(trained)}
    assert saved["pretrained_model"] == model_dir
    assert saved["use_lora"] is True
    for name in ("metrics.jsonl", "rewards.png", "before_after.png", "before.pt", "final/model_index.json"):
        assert (run / name).stat().st_size > 0
    # the page has been written after the picture
    written = [(run / name).stat().st_mtime_ns for name in ("before_after.png", "report.html")]
    assert written == sorted(written)
    assert [path.name for path in run.glob(".*")] == [folder_lock.LOCK]


def test_a_run_that_trains_all_weights(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = [*OPTIONS, "--full-finetune", "--output_dir", "run", "--pretrained_model", model_dir]
    cli.main(["train", *options, "--prompts", "prompts.txt"])
    printed = capsys.readouterr().out
    assert "4 images per epoch (2 batches of 2), 2 denoising steps each" in printed
    assert "2 (image, timestep) pairs per update" in printed
    assert "4 updates per epoch" in printed
    # built-in rewards and files of prompts need no --trust_run, and are found from any working directory
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run, config = train_command.read_options(["--resume_from", "../run", "--num_epochs", "7"])
    assert run.full_finetune
    assert (run.pretrained_model, run.prompts) == (model_dir, str(tmp_path / "prompts.txt"))
    assert (config.num_epochs, config.sample_num_steps, config.train_learning_rate) == (7, 2, 1e-3)
    assert output_folder(config) == tmp_path / "run"
    for option, said in (("--full-finetune=False", "trained all weights"), ("--lora_rank=2", "is of a LoRA")):
        assert said in error_of_command(["train", "--resume_from", "../run", option])


def test_the_model_is_saved_before_pictures_are_drawn(model_dir, tmp_path, monkeypatch, capsys, caplog):
    def broken(*args, **kwargs):
        assert (tmp_path / "run" / "checkpoints" / "checkpoint_1").is_dir()
        raise KeyError("no pictures today")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    cli.main(["train", *OPTIONS, "--output_dir", str(tmp_path / "run"), "--pretrained_model", model_dir])
    assert (tmp_path / "run" / "final" / "model_index.json").exists()
    assert "a picture could not be drawn (KeyError" in caplog.text
    assert "before_after.png" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [["train", "--num_epochs=2", "--resume_from"], ["sample"]])
def test_functions_that_a_run_names_are_not_imported_without_trust(command, copied):
    (copied / "users_code.ran").unlink(missing_ok=True)
    sentence = error_of_command([*command, "run"])
    assert "prompts='users_code:prompt'" in sentence
    assert "--trust_run" in sentence
    if command[0] == "train":
        assert "reward='users_code:reward'" in sentence
        assert "prompts=" not in error_of_command([*command, "run", "--prompts", "animals"])
    assert not (copied / "users_code.ran").exists()


HARMFUL = {
    "deepspeed": "theirs.json",
    "tracker_kwargs": {"wandb": {"dir": "/tmp"}},
    "accelerator_kwargs": {"cpu": True},
    "project_kwargs": {"logging_dir": "/tmp", "project_dir": "/tmp"},
    "push_to_hub": True,
    "log_with": "wandb",
    "tracker_project_name": "../../x",
}


def write_state(path: Path, state: dict) -> None:
    """Writes a state with a valid digest, as an attacker can."""
    path.write_text(json.dumps({**state, checkpoint.DIGEST: checkpoint._state_digest(state)}) + "\n")


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_settings_of_a_run_need_trust(name, copied):
    path = copied / "run" / "checkpoints" / "checkpoint_1" / "state.json"
    state = json.loads(path.read_text())
    own = {"reward": "jpeg_compressibility", "prompts": "animals"}
    state["config"] = {**state["config"], "output_dir": "/elsewhere", "logdir": "/elsewhere", "run_name": "../x"}
    write_state(path, {**state, **own})
    assert output_folder(train_command.read_options(["--resume_from", "run"])[1]) == copied / "run"
    state["config"][name] = HARMFUL[name]
    write_state(path, {**state, **own})
    sentence = error_of_command(["train", "--resume_from", "run"])
    assert f"{name}=" in sentence
    assert "/elsewhere" not in sentence


def test_links_in_a_run_need_trust(copied):
    (copied / "precious").write_text("mine\n")
    (copied / "run" / "metrics.jsonl").unlink()
    (copied / "run" / "metrics.jsonl").symlink_to(copied / "precious")
    given = ["--reward", "jpeg_compressibility", "--prompts", "animals"]
    assert "a link 'metrics.jsonl'" in error_of_command(["train", "--resume_from", "run", *given])
    assert (copied / "precious").read_text() == "mine\n"


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/checkpoint_1"])
def test_a_link_to_another_runs_checkpoints_needs_trust(copied, linked):
    # a run that is resumed there would overwrite and remove another run's files
    (copied / "run" / linked).rename(copied / "precious")
    (copied / "run" / linked).symlink_to(copied / "precious")
    given = ["--reward", "jpeg_compressibility", "--prompts", "animals"]
    assert f"a link '{linked}'" in error_of_command(["train", "--resume_from", "run", *given])


def test_a_trusted_run_is_resumed_from_any_working_directory(copied, monkeypatch, capsys):
    # its module is imported from where it was, even if this directory has a module of the same name
    (copied / "users_code.py").write_text("raise ImportError('another module of this name')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main(["train", "--resume_from", "run", "--num_epochs", "2", "--trust_run"])
    assert (copied / "run" / "checkpoints" / "checkpoint_2").is_dir()
    assert "before_after.png" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "said"), [("--lora_alpha=8", "a run with lora_alpha 4: leave out --lora_alpha 8")])
def test_another_adapter_on_resume_is_refused(option, said, copied):
    assert said in error_of_command(["train", "--resume_from", "run", "--trust_run", option])


def resumed(folder: Path, *options: str) -> None:
    cli.main(["train", "--resume_from", "run", "--trust_run", "--num_epochs", "2", *options])


def test_a_damaged_file_of_first_images_does_not_stop_the_run(copied, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", list(sys.path))
    damaged = (copied / "run" / "before.pt").read_bytes()[:999]
    (copied / "run" / "before.pt").write_bytes(damaged)
    resumed(copied)
    assert "before.pt cannot be read" in caplog.text
    # images of a trained model are not saved as the first ones
    assert (copied / "run" / "before.pt").read_bytes() == damaged
    assert (copied / "run" / "epoch_1_after.png").exists()


def test_another_reward_begins_a_new_run_with_its_own_comparison(copied, monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = {name: (copied / "run" / name).read_bytes() for name in ("before.pt", "before_after.png")}
    other = ["--trust_run", "--num_epochs", "2", "--reward", "users_code:other"]
    sentence = error_of_command(["train", "--resume_from", "run", *other])
    assert "begin a new run from there with another output_dir" in sentence
    cli.main(["train", "--resume_from", "run", *other, "--output_dir", "new"])
    assert "epoch_1_after.png will compare with the model after 1 epochs" in caplog.text
    assert " epoch 1, " in capsys.readouterr().out
    assert kept == {name: (copied / "run" / name).read_bytes() for name in kept}
    assert not (copied / "new" / "before.pt").exists()
    begun = (copied / "new" / "epoch_1.pt").read_bytes()
    # the next resumed run compares with the same images
    cli.main(["train", "--resume_from", "new", "--trust_run", "--num_epochs", "3"])
    assert (copied / "new" / "epoch_1.pt").read_bytes() == begun
    assert not (copied / "new" / "epoch_2.pt").exists()


def test_sample_draws_the_base_and_the_trained_model(copied, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda *given: drawn.append(given))
    seen = []
    generate = train_command.DefaultDDPOStableDiffusionPipeline.__call__

    def call(self, **kwargs):
        seen.append((len(kwargs["prompt"]), set(kwargs["negative_prompt"])))
        return generate(self, **kwargs)

    monkeypatch.setattr(train_command.DefaultDDPOStableDiffusionPipeline, "__call__", call)
    cli.main(["sample", "run", "--num-images", "11", "--trust_run"])
    assert seen == [(8, {"a dog"}), (3, {"a dog"})] * 2
    [(prompts, rows, path)] = drawn
    assert path == copied / "run" / "samples.png"
    for name, (label, images, scores) in zip(("base", "trained"), rows, strict=True):
        assert (label, len(images), len(prompts)) == (name, 11, 11)
        torch.testing.assert_close(torch.tensor(scores), images.mean((1, 2, 3)))
    # without --trust_run no rewards are shown, and nothing is imported
    sys.modules.pop("users_code")
    cli.main(["sample", "run", "--num-images", "2", "--prompts", "animals"])
    assert [scores for _, _, scores in drawn[-1][1]] == [None, None]
    assert "users_code" not in sys.modules
    assert "no rewards are shown" in capsys.readouterr().out


def test_files_that_sample_writes(copied):
    asked = ["sample", "run", "--num-images", "1", "--prompts", "animals", "--reward", "jpeg_compressibility"]
    cli.main(asked)
    first = (copied / "run" / "samples.png").read_bytes()
    cli.main([*asked, "--seed", "1"])
    assert (copied / "run" / "samples.png").read_bytes() == first
    assert (copied / "run" / "samples_2.png").exists()
    cli.main([*asked, "--output", "grid.jpg"])
    with Image.open("grid.jpg") as image:
        assert image.format == "JPEG"
    assert "which exists" in error_of_command([*asked, "--output", "grid.jpg"])
    cli.main([*asked, "--output", "grid.jpg", "--overwrite"])


def test_sample_compares_checkpoints(copied, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main(["train", "--resume_from", "run", "--trust_run", "--num_epochs", "2"])
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda *given: drawn.append(given))
    asked = ["sample", "run", "--num-images", "2", "--trust_run"]
    for wanted, names in (("all", ["epoch 1", "epoch 2"]), ("1", ["epoch 1"]), ("last", ["epoch 2"])):
        cli.main([*asked, "--checkpoint", wanted])
        assert [name for name, _, _ in drawn[-1][1]] == ["base", *names]
    # each from the same noise, whatever was drawn before
    (_, base, _), (_, first, _), (_, second, _) = drawn[0][1]
    assert torch.equal(first, drawn[1][1][1][1])
    assert torch.equal(second, drawn[2][1][1][1])
    assert not torch.equal(first, second)
    cli.main([*asked, "--checkpoint", "best", "--format", "images", "--output", "compared"])
    found = json.loads(next(Path("compared").glob("epoch_*/samples.json")).read_text())
    assert [entry["file"] for entry in found["samples"]] == ["000.png", "001.png"]
    with Image.open("compared/base/000.png") as image:
        assert np.abs(np.asarray(image) / 255 - base[0].permute(1, 2, 0).numpy()).max() < 0.003
    assert "which is not empty" in error_of_command([*asked, "--format", "images", "--output", "compared"])
    assert "has the checkpoints 1, 2: choose among these" in error_of_command([*asked, "--checkpoint", "7"])
    assert "must be all, best, last or numbers" in error_of_command([*asked, "--checkpoint", "frist"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("run --num-images 0", "--num-images is 0 but must be a whole number of at least 1"),
        ("run --seed -1", "--seed is -1 but must be"),
        ("run --seed 4294967296", "--seed is 4294967296 but must be"),
        ("run --output grid.txt", "--output is 'grid.txt' but must end in .png, .jpg"),
        ("run --output grid", "must end in"),
        ("run --output nowhere/grid.png", "there is no folder 'nowhere'"),
        ("run --output run/metrics.jsonl", "must end in"),
        ("nowhere", "error: run is 'nowhere', which does not exist"),
        ("run/final", "error: run is 'run/final', which holds no checkpoint"),
        ("", "the following arguments are required: run"),
        ("run --num_image 3", "did you mean --num-images?"),
    ],
)
def test_wrong_options_of_sample_are_refused(options, said, copied):
    assert said in error_of_command(["sample", *options.split()])


def test_the_picture_of_an_interrupted_run_is_not_drawn(model_dir, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DDPOTrainer, "train", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *OPTIONS, "--output_dir", str(tmp_path / "run"), "--pretrained_model", model_dir])
    assert caught.value.code == 130
