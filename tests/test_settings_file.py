"""A file of settings means the same as its options on a command line; `init` and a run write such files."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import yaml

from ddpo_fast import cli, recipes
from ddpo_fast.commands import init, option_groups, settings_file
from ddpo_fast.commands import train as train_command
from ddpo_fast.commands.options import RunArguments, plan_parser, train_parser
from ddpo_fast.config import PLACE_FIELDS, DDPOConfig


def read(path, *options):
    """What `train FILE.yaml OPTIONS` reads, as one dict without where it writes."""
    run, config = train_command.read_options(settings_file.expanded([str(path), *options], train_parser()))
    return {k: v for k, v in {**vars(run), **vars(config)}.items() if k not in PLACE_FIELDS}


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return written


def test_a_file_is_its_options(write):
    text = """
full_finetune: true
train_learning_rate: 1e-5     # a number of YAML 1.2
mixed_precision: no
gpu_memory: null
train_cfg: false
sde_window: [0, 3]
negative_prompts: [blurry, dark]
tracker_kwargs: {wandb: {name: -x}}
reward: jpeg_incompressibility
"""
    found = read(write(text), "--seed", "7", "--reward=jpeg_compressibility")
    words = "--full_finetune --train_learning_rate 1e-5 --mixed_precision no --gpu_memory None --no_train_cfg"
    own = train_command.read_options(
        [
            *words.split(),
            *"--seed 7 --sde_window 0 3".split(),
            "--negative_prompts=blurry,dark",
            '--tracker_kwargs={"wandb": {"name": "-x"}}',
        ]
    )
    assert found == {k: v for part in own for k, v in vars(part).items() if k not in PLACE_FIELDS}
    assert (found["train_learning_rate"], found["mixed_precision"], found["seed"]) == (1e-5, "no", 7)
    # the recipe gives way to the file as to the command line
    assert recipes.load("bundled-full").settings["train_learning_rate"] != 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1e-4", "run.yaml': there is no option --learning_rate: did you mean --train_learning_rate?"),
        ("training:\n  seed: 1", "there is no option --training"),
        ("- seed", "holds ['seed'] but must have options with values"),
        ("seed: [", "cannot be read as YAML"),
        ("seed: many", "--seed is 'many' but must be a whole number"),
        ("description: x\nknown: []\nsettings: {}", "is a recipe: give it by --recipe"),
    ],
)
def test_wrong_files_are_refused(text, said, write):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(write(text))


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "none.yaml"])
    assert "the settings file is 'none.yaml', and there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--full-finetune", "--sample_group_size", "8", "--seed", "3"]], ids=str)
def test_what_init_writes_starts_the_run_of_its_options(options, write):
    text = init.settings_file(options)
    path = write(text)
    run, config = train_command.read_options(options)
    assert read(path) == {k: v for k, v in {**vars(run), **vars(config)}.items() if k not in PLACE_FIELDS}
    # every option has a line, and all of them can be set as they stand, but those that the machine decides
    lines = [line.removeprefix("#") for line in text.splitlines() if line.removeprefix("#")[:1].isalpha()]
    everything = yaml.safe_load("\n".join(line for line in lines if ": " in line))
    left_out = {"resume_from", *(recipes.LORA_SETTINGS if options else ())}
    assert set(everything) == {f.name for kind in (RunArguments, DDPOConfig) for f in fields(kind)} - left_out
    assert read(write("\n".join(lines))) == read(write(text))


def test_a_run_writes_a_file_that_starts_it_again(tmp_path, capsys):
    small = "--num_epochs 1 --sample_num_steps 2 --sample_batch_size 2 --sample_num_batches_per_epoch 1"
    options = [*small.split(), "--train_batch_size", "2", "--sample_group_size", "1", "--train_learning_rate", "1e-5"]
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options += ["--prompts", str(tmp_path / "prompts.txt"), "--mixed_precision", "no"]
    cli.main(["train", *options, "--dry_run", "--output_dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "2 images per epoch" in printed
    assert "training" in printed.split("predicted memory")[1]
    assert not (tmp_path / "run").exists()
    cli.main(["train", *options, "--output_dir", str(tmp_path / "run")])
    capsys.readouterr()
    run, config = train_command.read_options(options)
    assert read(tmp_path / "run" / "config.yaml") == {
        k: v for k, v in {**vars(run), **vars(config)}.items() if k not in PLACE_FIELDS
    }


@pytest.mark.parametrize("parser", [train_parser(), plan_parser()], ids=["train", "plan"])
def test_every_option_is_in_a_group(parser):
    known = {action.dest for action in parser._actions} - {"help", "help_all", "local_rank"}
    groups = option_groups.grouped(sorted(known))
    assert sorted(name for _, names in groups for name in names) == sorted(known)


def test_help_has_the_usual_options_and_help_all_the_rest(capsys):
    def printed(word):
        with pytest.raises(SystemExit) as caught:
            train_parser().parse([word])
        assert caught.value.code == 0
        return capsys.readouterr().out

    short, long = printed("--help"), printed("--help-all")
    assert "--num_epochs" in short
    assert "--help-all" in short
    assert "--train_adam_beta2" not in short
    assert "--train_adam_beta2" in long
    assert short.index("sampling:") < short.index("--sample_num_steps") < short.index("training:")
