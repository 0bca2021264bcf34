"""Recipes: the shipped files, their choice, what they give way to, files of a user's own, and a run that has one."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
from one_sentence import error_of_command, refused

from ddpo_fast import DDPOConfig, cli, config_rules, package_rules, recipes
from ddpo_fast.commands import options as command_options
from ddpo_fast.commands import plan, train
from ddpo_fast.recipes.fit import BATCH_SIZES
from ddpo_fast.tiny_sd import FLOW_MODEL, MODEL

DEFAULTS = DDPOConfig()
SHIPPED = recipes.names()
each_recipe = pytest.mark.parametrize("name", SHIPPED)
OTHER_MODEL = ["--pretrained_model", "someone/sd15"]


def read(*options: str) -> DDPOConfig:
    return train.read_options(options)[1]


def described(*options: str) -> str:
    """What `train` with these options prints about its recipe."""
    return "\n".join(train.recipe_lines(*train.read_options(options), command_options.given_options(options)))


def config_settings(name: str) -> dict:
    return {k: v for k, v in recipes.load(name).settings.items() if k not in recipes.LORA_SETTINGS}


# the shipped files

# settings of the paper that are written in a recipe although TRL's default is the same
PAPERS = ("sample_num_steps", "sample_guidance_scale", "per_prompt_stat_tracking_min_count", "train_learning_rate")


def test_the_shipped_recipes():
    kinds = ("bundled-flow", "bundled", "flux", "sd", "sd3", "sdxl")
    assert [*(f"{kind}-{weights}" for kind in kinds for weights in ("full", "lora")), "trl"] == SHIPPED


@each_recipe
def test_a_shipped_recipe_is_whole_and_valid(name):
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert all(sentence.endswith(".") for sentence in recipe.known)
    config = DDPOConfig(**config_settings(name))
    command_options.RunArguments(**{k: v for k, v in recipe.settings.items() if k in recipes.LORA_SETTINGS})
    # alone, no setting gives way, and a run on the command line has each of them
    full, bundled = name.endswith("full"), name.startswith("bundled")
    given = ["--full-finetune"] if full else []
    run, parsed = train.read_options([*given, *(() if bundled else OTHER_MODEL), "--recipe", name])
    for key, value in recipe.settings.items():
        assert getattr(run if key in recipes.LORA_SETTINGS else parsed, key) == value
        if key not in recipes.LORA_SETTINGS:
            assert getattr(config, key) == value
            assert value != getattr(DEFAULTS, key) or key in (*BATCH_SIZES, *PAPERS), f"{key} says nothing"


@each_recipe
def test_each_setting_of_a_shipped_recipe_has_a_reason(name):
    """A comment stands above every setting or group of settings, or the file says which other file has the reasons."""
    text = recipes.path_of(name).read_text("utf-8")
    assert all(len(line) <= 120 for line in text.splitlines())
    settings = text.partition("settings:\n")[2]
    assert not settings or settings.lstrip().startswith("#")


# which recipe a command has


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "bundled-lora"),
        (["--full-finetune"], "bundled-full"),
        (["--pretrained_model", str(MODEL)], "bundled-lora"),
        (["--pretrained_model", "bundled-flow"], "bundled-flow-lora"),
        (["--pretrained_model", str(FLOW_MODEL), "--full-finetune"], "bundled-flow-full"),
        (OTHER_MODEL, "sd-lora"),
        ([*OTHER_MODEL, "--full-finetune"], "sd-full"),
        ([*OTHER_MODEL, "--full-finetune=False"], "sd-lora"),
        (["--recipe", "sd-full"], "sd-full"),
        (["--recipe", "trl", "--full-finetune"], "trl"),
    ],
)
def test_the_recipe_follows_from_model_and_weights(options, name):
    run, config = train.read_options(options)
    assert run.recipe == name
    for key, value in config_settings(name).items():
        assert getattr(config, key) == value


def test_the_recipe_trl_has_the_defaults_of_the_api():
    config = read("--recipe", "trl", "--mixed_precision", "fp16")
    differing = {f.name for f in fields(DDPOConfig) if getattr(config, f.name) != getattr(DEFAULTS, f.name)}
    # the command line's own: the folder for runs, its name, the best checkpoint, and images to look at
    assert differing == {"logdir", "exp_name", "keep_best_checkpoint", "sample_freq"}
    assert recipes.load("trl").settings == {}
    assert DDPOConfig().train_batch_size == 1, "the API keeps TRL's defaults"


# what a recipe gives way to


def test_options_of_the_user_come_before_the_recipe():
    assert recipes.load("bundled-full").settings["train_learning_rate"] != 7e-6
    for options in (["--train_learning_rate", "7e-6"], ["--train-learning-rate=7e-6"]):
        config = read("--full-finetune", *options, "--train_guard", "False")
        assert config.train_learning_rate == 7e-6
        assert not config.train_guard
        assert config.step_credit == recipes.load("bundled-full").settings["step_credit"]
    # also where the given value is the command's default
    assert read("--full-finetune", "--sample_num_steps", "50").sample_num_steps == 50


def test_updates_move_images_as_far_with_another_number_of_steps():
    """The variance of a path of n steps, each shifted by d of its standard deviations: n d^2 of one step's."""
    recipe = recipes.load("sd-full").settings
    found = recipes.config("sd-full", sample_num_steps=20)
    moved = [c["sample_num_steps"] * c["train_target_update"] ** 2 for c in (recipe, vars(found))]
    assert moved[1] == pytest.approx(moved[0], rel=1e-2)
    assert recipes.config("sd-full", sample_num_steps=20, train_target_update=0.3).train_target_update == 0.3
    assert recipes.config("sd-full", sample_num_steps=50).train_target_update == recipe["train_target_update"]
    assert recipes.config("trl", sample_num_steps=20).train_target_update == 0


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        # sampling batch, sampling batches, training batch, accumulation; the recipe has 16, 2, 16, 1
        ({}, (16, 2, 16, 1)),
        ({"sample_batch_size": 4}, (4, 8, 4, 4)),
        ({"sample_batch_size": 3}, (3, 10, 3, 5)),
        ({"sample_batch_size": 64}, (64, 1, 16, 1)),
        ({"train_batch_size": 4}, (16, 2, 4, 4)),
        ({"train_batch_size": 6}, (18, 2, 6, 3)),
        ({"sample_num_batches_per_epoch": 8}, (16, 8, 16, 1)),
        ({"train_gradient_accumulation_steps": 4}, (16, 2, 4, 4)),
        ({"sample_batch_size": 4, "train_batch_size": 4}, (4, 8, 4, 4)),
        ({"sample_batch_size": 4, "sample_num_batches_per_epoch": 2}, (4, 2, 4, 2)),
        ({"sample_batch_size": 8, "train_batch_size": 2, "train_gradient_accumulation_steps": 1}, (8, 4, 2, 1)),
        ({"sample_num_batches_per_epoch": 3, "train_gradient_accumulation_steps": 3}, (16, 3, 4, 3)),
    ],
)
def test_other_batch_sizes_keep_the_images_of_an_epoch_and_of_an_update(given, sizes, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "settings: {sample_batch_size: 16, sample_num_batches_per_epoch: 2, train_batch_size: 16}"
    )
    config = recipes.config(str(tmp_path / "r.yaml"), **given)
    assert tuple(getattr(config, name) for name in BATCH_SIZES) == sizes


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "trl"])
def test_any_batch_size_that_works_alone_works_with_a_recipe(name):
    """And a sampling batch of any size leaves the epoch and the update within a third of the recipe's."""
    recipe = recipes.config(name)
    images, per_update = images_of(recipe)
    for size in range(1, per_update + 1):
        found = images_of(recipes.config(name, sample_batch_size=size))
        assert found[0] == pytest.approx(images, rel=0.34)
        assert found[1] == pytest.approx(per_update, rel=0.34)
    tried = 0
    for sampled, batches, trained, steps in [(6, 4, 3, 1), (1, 2, 1, 2), (3, 2, 3, 2), (9, 2, 9, 1), (5, 7, 1, 7)]:
        given = dict(zip(BATCH_SIZES, (sampled, batches, trained, steps), strict=True))
        for left_out in BATCH_SIZES:
            some = {key: value for key, value in given.items() if key != left_out}
            if not works_alone(some):
                continue
            recipes.config(name, **some)
            tried += 1
    assert tried >= 10


def works_alone(settings: dict) -> bool:
    try:
        DDPOConfig(**settings)
    except ValueError:
        return False
    return True


def images_of(config: DDPOConfig) -> tuple[int, int]:
    per_update = config.train_batch_size * config.train_gradient_accumulation_steps
    return config.sample_batch_size * config.sample_num_batches_per_epoch, per_update


def test_a_clip_range_of_the_user_is_in_the_unit_that_help_names():
    assert read("--full-finetune").train_clip_unit == "step"
    config = read("--full-finetune", "--train_clip_range", "1e-4")
    assert (config.train_clip_range, config.train_clip_unit) == (1e-4, DEFAULTS.train_clip_unit)
    config = read("--full-finetune", "--train_clip_range", "0.3", "--train_clip_unit", "step")
    assert (config.train_clip_range, config.train_clip_unit) == (0.3, "step")
    config = read("--full-finetune", "--train_clip_unit", "ratio")
    assert (config.train_clip_range, config.train_clip_unit) == (DEFAULTS.train_clip_range, "ratio")
    # the recipe's own values are no reason to leave the other one out
    unit = read("--full-finetune", "--train_clip_unit", "step").train_clip_range
    assert unit == recipes.load("bundled-full").settings["train_clip_range"]


@pytest.mark.parametrize(
    ("options", "kept", "left_out"),
    [
        ("--per_prompt_stat_tracking_buffer_size 16", {"sample_group_size": 8}, {}),
        ("--per_prompt_stat_tracking", {"step_credit": "equal"}, {"sample_group_size": 1}),
        ("--objective rwr", {"sample_group_size": 8}, {"step_credit": "none"}),
        ("--zero 3 --offload all", {"step_credit": "equal"}, {"train_target_update": 0.0}),
        ("--objective rwr --zero 2", {"sample_num_steps": 20}, {"step_credit": "none", "train_target_update": 0.0}),
    ],
)
def test_a_setting_that_contradicts_an_option_is_left_out(options, kept, left_out, monkeypatch):
    """With rules of the test's own, so that it does not depend on which the package has."""
    rules = (
        (lambda c: c.objective == "rwr" and c.step_credit != "none", "step_credit does not work with rwr"),
        (lambda c: c.per_prompt_stat_tracking and c.sample_group_size > 1, "groups do not work with statistics"),
        (lambda c: c.zero > 0 and c.train_target_update > 0, "train_target_update does not work with ZeRO"),
    )
    monkeypatch.setattr(config_rules, "CONFLICTS", rules)
    monkeypatch.setattr(package_rules, "missing_package", lambda config: "")
    config = read("--full-finetune", *options.split())
    for name, value in {**kept, **left_out}.items():
        assert getattr(config, name) == value
    said = described("--full-finetune", *options.split())
    for name, value in left_out.items():
        assert re.search(rf"changed to fit what you gave: .*{name}={value} \(recipe: ", said)


def test_what_is_wrong_without_a_recipe_is_refused_with_the_same_words():
    for options in ("--sample_num_steps 0", "--sample_batch_size 0", "--zero 4", "--offload all"):
        name, value = options.removeprefix("--").split()
        with pytest.raises(ValueError, match=f"^{name} is ") as alone:
            DDPOConfig(**{name: int(value) if value.isdecimal() else value})
        assert str(alone.value) in error_of_command(["train", *options.split()])


@pytest.mark.parametrize(
    "options",
    [
        "--train_batch_size 4 --sample_batch_size 4 --sample_num_batches_per_epoch 3",
        "--train_num_inner_epochs 4 --train_timestep_fraction 0.5",
        "--sample_num_steps 1",
    ],
)
def test_options_that_recipes_allow(options):
    for model in ([], OTHER_MODEL):
        for full in ([], ["--full-finetune"]):
            read(*model, *full, *options.split())


# a user's own file

OWN = """
description: Mine.
known:
  - It rises.
settings:
  train_learning_rate: 1e-5  # YAML 1.1 would read this as a word
  mixed_precision: no        # and this as False
  train_max_grad_norm: .inf
  per_prompt_stat_tracking: true
  lora_rank: 8
  lora_alpha: 16.0
  lora_target_modules: to_q,to_v
"""


def test_a_file_of_a_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(OWN)
    run, config = train.read_options(["--recipe", "mine.yaml", "--lora_alpha", "3"])
    assert (config.train_learning_rate, config.mixed_precision) == (1e-5, "no")
    assert config.train_max_grad_norm == float("inf")
    assert (run.lora_rank, run.lora_alpha, run.target_modules) == (8, 3, ["to_q", "to_v"])
    # a resumed run is told by the whole path
    assert run.recipe == str(tmp_path / "mine.yaml")
    assert "Mine." in described("--recipe", "mine.yaml")
    assert "known: It rises." in described("--recipe", "mine.yaml")
    # LoRA settings say nothing where all weights are trained
    run, _ = train.read_options(["--recipe", "./mine.yaml", "--full-finetune"])
    assert run.lora_rank == command_options.RunArguments().lora_rank
    # --mixed_precision, and not a recipe, comes first
    assert read("--recipe", "mine.yaml", "--mixed_precision", "bf16").mixed_precision == "bf16"
    # a folder named as a recipe is no recipe
    (tmp_path / "trl").mkdir()
    assert train.read_options(["--recipe", "trl"])[0].recipe == "trl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("- a\n- b\n", "holds ['a', 'b'] but must have description, known, settings"),
        ("", "holds None"),
        ("settings: {a: [", "cannot be read as YAML"),
        ("settings: !!python/object/apply:os.system ['touch hacked']", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
        ("description: x\n", "settings is None but must be names with values"),
        ("settings: [1]\n", "settings is [1]"),
        ("settings: {}\nknown: often\n", "known is 'often' but must be a list of sentences"),
        ("settings: {}\ndescription: 3\n", "description is 3"),
        ("train_learning_rate: 1e-4\n", "'train_learning_rate' at its top level: write that under `settings:`"),
        ("setting: {}\n", "'setting' at its top level: write that into one of description"),
        (
            "settings: {learning_rate: 1e-4}\n",
            "'learning_rate', which is no setting: did you mean train_learning_rate?",
        ),
        ("settings: {zzz: 1}\n", "'zzz', which is no setting: `ddpo-fast train --help`"),
        ("settings: {3: 1}\n", "has 3, which is no setting"),
        ("settings: {reward: 'evil:run'}\n", "'reward', which is no setting"),
        ("settings: {output_dir: /elsewhere}\n", "output_dir, which belongs to one run"),
        ("settings: {train_clip_range: -1}\n", "train_clip_range is -1 but must be a number above 0"),
        ("settings: {train_learning_rate: fast}\n", "train_learning_rate is 'fast' but must be a number"),
        ("settings: {sample_batch_size: 2, train_batch_size: 4}\n", "must be greater than or equal"),
        ("settings: {lora_rank: many}\n", "lora_rank is 'many' but must be a whole number"),
        ("settings: {lora_rank: true}\n", "lora_rank is True but must be a whole number"),
        ("settings: {lora_rank: 0}\n", "lora_rank is 0 but must be"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    sentence = error_of_command(["train", "--recipe", "bad.yaml"])
    assert words in sentence
    assert "bad.yaml" in sentence or "lora_rank" in sentence
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd-ful", "did you mean sd-full?"),
        ("zzz", "one of bundled-flow-full, bundled-flow-lora, bundled-full"),
        ("sub/none.yaml", "there is no such file"),
        ("a\0.yaml", "there is no such file"),
        ("~no-such-user/x.yaml", "there is no such file"),
        ("", "which does not exist"),
    ],
)
def test_an_unknown_recipe_is_refused(name, words):
    with refused(ValueError, "^recipe is ", words):
        recipes.load(name)
    if name and "\0" not in name:
        for command in (["train", "--recipe", name], ["plan", "--recipe", name], ["recipes", name]):
            assert words in error_of_command(command)


# the API


def test_a_config_from_a_recipe():
    config = recipes.config("sd-full", num_epochs=3, train_learning_rate=2e-5)
    assert (config.num_epochs, config.train_learning_rate) == (3, 2e-5)
    assert config.step_credit == recipes.load("sd-full").settings["step_credit"]
    with refused(TypeError, "unexpected keyword argument 'learning_rate'"):
        recipes.config("sd-full", learning_rate=1)
    with refused(ValueError, "^sample_num_steps is 0"):
        recipes.config("sd-full", sample_num_steps=0)


# commands


def test_recipes_are_listed_and_printed(capsys, tmp_path):
    cli.main(["recipes"])
    listed = capsys.readouterr().out
    for name in SHIPPED:
        assert f"{name}\n  " in listed
    cli.main(["recipes", "sd-full"])
    printed = capsys.readouterr().out
    assert printed == recipes.path_of("sd-full").read_text("utf-8")
    # what is printed is a file of one's own
    (tmp_path / "mine.yml").write_text(printed)
    assert recipes.load(str(tmp_path / "mine.yml")).settings == recipes.load("sd-full").settings


def test_what_is_printed_about_a_recipe():
    said = described("--full-finetune", "--sample_batch_size", "4", "--sample_num_steps", "7", "--seed", "3")
    first, *lines = said.splitlines()
    assert first == f"recipe bundled-full: {recipes.load('bundled-full').description}"
    settings, yours, fitted = lines[-3:]
    assert "train_target_update=0.254 (recipe: 0.15)" in fitted
    assert settings.startswith("  settings: step_credit=equal, ")
    assert "sample_num_steps" not in settings
    assert yours == "  you gave: sample_num_steps=7 (recipe: 20), sample_batch_size=4 (recipe: 16)"
    assert "sample_num_batches_per_epoch=8 (recipe: 2)" in fitted
    assert "train_gradient_accumulation_steps=8 (recipe: 2)" in fitted
    assert described("--recipe", "trl", "--seed", "3") == f"recipe trl: {recipes.load('trl').description}"


class Table:
    host_bytes = 0

    def table(self) -> str:
        return "table"


CHOICE = SimpleNamespace(plan=Table(), reasons=[], settings={"train_micro_batch_size": 5})


@pytest.mark.parametrize(
    "given", ["", "--sample_batch_size 4 --train_clip_range 1e-4 --train_guard False", "--recipe trl"]
)
def test_the_command_of_a_plan_has_the_settings_that_were_planned(given, monkeypatch, capsys):
    """The plan itself is replaced, as it is slow and does not depend on the recipe."""
    monkeypatch.setattr(plan, "footprint_of", lambda *arguments: None)
    monkeypatch.setattr(plan, "choose", lambda *arguments: CHOICE)
    given = given.split()
    cli.main(["plan", "--gpu_memory", "12", *given])
    printed = capsys.readouterr().out
    commands = [line.split()[2:] for line in printed.splitlines() if line.startswith("ddpo-fast train")]
    assert len(commands) == 2
    for command, full in zip(commands, (False, True), strict=True):
        # train would choose the same recipe, whose settings need not be said
        assert ("--recipe" in command) == ("--recipe" in given)
        assert "--step_credit" not in command
        run, config = train.read_options(command)
        assert run.full_finetune is full
        name = "trl" if "--recipe" in given else recipes.choose("bundled", full_finetune=full)
        assert f"recipe {name}\n" in printed
        wanted = train.read_options([*given, *(["--full-finetune"] if full else [])])[1]
        wanted.train_micro_batch_size = 5
        for f in fields(DDPOConfig):
            # the precision of a plan is that of a GPU
            if f.name != "mixed_precision":
                assert getattr(config, f.name) == getattr(wanted, f.name), f.name


def test_a_run_records_its_recipe_and_goes_on_with_its_settings(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "description: Mine.\nsettings: {sample_num_steps: 2, sample_batch_size: 2, train_learning_rate: 1e-3}\n"
    (tmp_path / "mine.yaml").write_text(text)
    options = ["--recipe", "mine.yaml", "--pretrained_model", model_dir, "--mixed_precision", "no", "--num_epochs", "1"]
    cli.main(["train", *options, "--output_dir", "run", "--prompts", "animals"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"recipe {tmp_path}/mine.yaml: Mine.\n")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["recipe"] == str(tmp_path / "mine.yaml")
    assert recorded["config"]["train_learning_rate"] == 1e-3

    # a resumed run does not read the recipe again: neither a changed nor a missing file matters
    (tmp_path / "mine.yaml").write_text(text.replace("1e-3", "9e-3"))
    for given in ([], ["--recipe", "mine.yaml"]):
        run, config = train.read_options(["--resume_from", "run", *given])
        assert (config.train_learning_rate, config.sample_num_steps, config.step_credit) == (1e-3, 2, "none")
        assert run.recipe == str(tmp_path / "mine.yaml")
        assert train.recipe_lines(run, config, set()) == [
            f"recipe {tmp_path}/mine.yaml, with the settings that the resumed run recorded"
        ]
    (tmp_path / "mine.yaml").unlink()
    assert read("--resume_from", "run", "--train_learning_rate", "2e-3").train_learning_rate == 2e-3
    said = error_of_command(["train", "--resume_from", "run", "--recipe", "trl"])
    assert "a run that goes on with its own settings: leave out --recipe trl" in said
