"""A wrong setting, function or file is refused in one sentence that names it, before a model is loaded."""

from __future__ import annotations

import codecs
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_damage import files_in
from one_sentence import ends_with_one_sentence, refused
from tiny_run import SETTINGS, brightness

from ddpo_fast import DDPOConfig
from ddpo_fast.config_rules import TRACKER_PACKAGES
from ddpo_fast.engine.zero_settings import zero_settings
from ddpo_fast.prompts import draw_prompts
from ddpo_fast.rewards import score
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.user_functions import load_function, require_function

NAN, INF = float("nan"), float("inf")


# fields

HUGE = 10**9 + 1
COUNTS = [0, -1, 1.5, "3", None, True, HUGE]
BAD_FIELDS = {
    "num_epochs": [-1, 1.5, "3", NAN, 10**12],
    "seed": [-1, None, 2**32, 2**64, 1.0],
    "save_freq": [0, True],
    "num_checkpoint_limit": [0],
    "mixed_precision": ["fp8", "half", 16, ["fp16"]],
    "sample_num_steps": COUNTS,
    "sample_eta": [0, -1, 1.1, NAN],
    "sample_guidance_scale": [-1, INF, NAN, "5", 10**400],
    "height": [0, -8, 1.5, "16"],
    "width": [0, True],
    "sizes": [[], "64x64", ["64"], ["64x"], ["64x0"], ["64x64x3"], [64, 64], [(64, 1.5)], [None]],
    "sampler": ["euler", None],
    "sde_window": [3, [1], [2, 1], [-1, 2], "1,2"],
    "sample_batch_size": COUNTS,
    "sample_num_batches_per_epoch": [0, HUGE],
    "train_batch_size": [0, torch.tensor(1)],
    "train_micro_batch_size": [0, -3, 2.5],
    "sample_merge_batches": [0, HUGE],
    "train_learning_rate": [-1e-4, NAN, "1e-4"],
    "train_adam_beta1": [1.0, -0.1],
    "train_adam_beta2": [1.0],
    "train_adam_weight_decay": [-1],
    "train_adam_epsilon": [0],
    "train_gradient_accumulation_steps": [0],
    "train_max_grad_norm": [0, -1, NAN],
    "train_num_inner_epochs": [0],
    "train_adv_clip_max": [0],
    "train_clip_range": [0, -1e-4],
    "train_timestep_fraction": [0, 1.1],
    "train_warmup_steps": [-1],
    "train_min_8bit_size": [-1],
    "train_cfg": [1, "yes", None],
    "allow_tf32": ["True"],
    "per_prompt_stat_tracking_buffer_size": [0, HUGE],
    "per_prompt_stat_tracking_min_count": [0],
    "max_workers": [0, HUGE],
    "log_with": ["tensorbord", True],
    "logdir": [None, 3, "a\0b"],
    "output_dir": [3, "a\0b", "~no-such-user/x"],
    "run_name": [None, "a\0b"],
    "resume_from": [None, "~no-such-user/x"],
    "tracker_project_name": [None],
    "negative_prompts": [5, ["a", 3], "\ud800"],
    "project_kwargs": ["not json", "[1]", 3, "{"],
    "tracker_kwargs": ["[]", 1.5],
    "accelerator_kwargs": ["null]"],
    "zero": [4, -1, True, 2.0, "2"],
    "offload": ["cpu", None],
    "deepspeed": ["", 3, {"zero": 2}],
    "kernel_backend": ["cuda"],
    "attention": ["flash"],
    "train_gradient_dtype": ["bf16"],
    "gradient_checkpointing": [True, "all"],
    "ema_decay": [1.0, -0.1],
    "ema_device": ["cuda"],
    "gpu_memory": [0, -8, "24", NAN],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_FIELDS.items() for v in values])
def test_a_bad_value_is_refused(name, value):
    with refused(ValueError, f"^{name} is .* but must be ", repr(value)[:100]):
        DDPOConfig(**{name: value})


def test_every_field_is_checked():
    """No field accepts an object of an unrelated type."""
    for name in DDPOConfig.__dataclass_fields__:
        for nonsense in (object(), np.zeros((2, 2))) if name != "log_with" else (3,):
            with refused(ValueError, f"^{name} is "):
                DDPOConfig(**{name: nonsense})


TRACKING = {"per_prompt_stat_tracking": True}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_batch_size": 2, "train_batch_size": 4}, "greater than or equal"),
        ({"sample_batch_size": 4, "train_batch_size": 3}, "divisible by the train batch size"),
        ({"sample_batch_size": 4, "train_batch_size": 4, "train_gradient_accumulation_steps": 3}, "samples per epoch"),
        ({"sample_num_steps": 10, "train_timestep_fraction": 0.05}, "train_timestep_fraction"),
        ({**TRACKING, "per_prompt_stat_tracking_min_count": 17}, "min_count is 17"),
        ({**TRACKING, "per_prompt_stat_tracking_buffer_size": 8}, "buffer_size=8 no prompt ever has"),
        ({"sample_batch_size": 3, "sample_group_size": 4}, "a process samples 6 images an epoch"),
        ({**TRACKING, "sample_batch_size": 2, "sample_group_size": 2}, "what a reward is compared with"),
        ({"sample_group_noise": "shared"}, "set sample_group_size above 1"),
        ({"sample_redraws": 1}, "needs groups to draw again"),
        ({"train_image_credit": "coca", "objective": "rwr"}, "weighs whole images"),
        ({"zero": 2, "deepspeed": "ds.json"}, "leave out zero"),
        ({"offload": "optimizer", "deepspeed": "ds.json"}, "ask for offload_optimizer in the file"),
        ({"offload": "all", "zero": 2}, "needs zero=3"),
        ({"train_paged_adam": True}, "needs train_use_8bit_adam"),
        ({"train_paged_adam": True, "train_use_8bit_adam": True, "zero": 1}, "decide where states are"),
        ({"stochastic_rounding": True}, "needs mixed_precision='bf16'"),
        ({"optimizer_in_backward": True, "mixed_precision": "bf16"}, "set train_max_grad_norm=inf"),
        ({"optimizer_in_backward": True, "train_max_grad_norm": INF}, "needs mixed_precision 'bf16' or 'no'"),
        ({"cuda_graphs": True, "zero": 1}, "do not work with ZeRO"),
        # arguments that are passed on to other packages
        ({"tracker_kwargs": {"wandb_project": "x"}}, "'wandb_project': keywords go under the name of a tracker"),
        ({"tracker_kwargs": {"wandb": "x"}}, "tracker_kwargs['wandb'] is 'x' but must be a dict"),
        ({"tracker_kwargs": {"tensorboard": {"nope": 1}}, "log_with": "tensorboard"}, "use one of comment, purge_step"),
        ({"accelerator_kwargs": {"mixed_precison": "no"}}, "'mixed_precison': use one of device_placement"),
        ({"accelerator_kwargs": {"mixed_precision": "no"}}, "a setting of its own: use mixed_precision"),
        ({"accelerator_kwargs": {"log_with": "wandb"}}, "a setting of its own: use log_with"),
        ({"accelerator_kwargs": {1: 2}}, "accelerator_kwargs has 1: use one of"),
        ({"project_kwargs": {"projectdir": "x"}}, "'projectdir': use one of project_dir"),
        ({"project_kwargs": {"total_limit": "5"}}, "project_kwargs['total_limit'] is '5' but must be None or a whole"),
        ({"project_kwargs": {"total_limit": 0}}, "project_kwargs['total_limit'] is 0"),
        ({"project_kwargs": {"project_dir": 3}}, "project_kwargs['project_dir'] is 3 but must be the path"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(settings, words):
    with refused(ValueError, "", words):
        DDPOConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"log_with": "wandb"}, "`pip install wandb`, or leave it out"),
        ({"log_with": "tensorboard"}, "`pip install tensorboard`"),
        ({"log_with": ["wandb"]}, "`pip install wandb`"),
        ({"log_with": "swanlab"}, "log_with is 'swanlab', which needs swanlab: `pip install swanlab`, or leave it out"),
        ({"log_with": "comet_ml"}, "`pip install comet_ml`"),
        ({"log_with": "all"}, "log_with is 'all'"),
        ({"train_use_8bit_adam": True}, "pip install bitsandbytes"),
        ({"zero": 2}, "pip install 'deepspeed"),
    ],
)
def test_a_setting_whose_package_is_missing_is_refused(settings, words, monkeypatch, tmp_path):
    """Even if the working directory has a folder of the package's name, as wandb creates one."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    absent = (*sum(TRACKER_PACKAGES.values(), ()), "bitsandbytes", "deepspeed")
    here = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    specs = {**dict.fromkeys(absent), "wandb": here}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name] if name in specs else find(name))
    with refused(ImportError, "", words):
        DDPOConfig(**settings)


def test_a_field_changed_later_is_checked_too(make_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.config.train_clip_range = -1
    with pytest.raises(ValueError, match="train_clip_range"):
        type(trainer)(trainer.config, brightness, lambda: ("a", {}), trainer.sd_pipeline)


def test_values_of_related_types_are_accepted():
    """NumPy numbers, paths and the like become plain data, as config.json has them."""
    given = {
        "mixed_precision": None,
        "seed": np.int64(3),
        "train_learning_rate": np.float32(1e-4),
        "train_cfg": np.bool_(False),
        "run_name": np.str_("mine"),
        "output_dir": Path("runs/mine"),
        "log_with": "tensorboard",
        "negative_prompts": ["blurry", "dark"],
        "tracker_kwargs": {"tensorboard": {"flush_secs": 3}},
        "accelerator_kwargs": {"cpu": True},
    }
    config = DDPOConfig(**given)
    assert json.loads(json.dumps(vars(config))) == vars(config)
    assert (config.seed, config.train_cfg, config.run_name) == (3, False, "mine")
    assert config.output_dir == str(Path("runs/mine"))
    assert config.negative_prompts == "blurry, dark"
    assert DDPOConfig(project_kwargs='{"project_dir": "x"}').project_kwargs == {"project_dir": "x"}
    DDPOConfig(seed=2**32 - 1, per_prompt_stat_tracking_buffer_size=8, train_max_grad_norm=INF)


# what functions return


class NoNumber:
    def __array__(self, *_, **__):
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "must return (rewards, metadata), got None"),
        (torch.ones(3), "must return (rewards, metadata), got tensor"),
        ((torch.ones(3),), "must return (rewards, metadata)"),
        ({"rewards": [1, 2, 3]}, "must return (rewards, metadata)"),
        ((None, {}), "returned None"),
        (([1.0, None, 2.0], {}), "returned [1.0, None, 2.0]"),
        ((["1", "2", "3"], {}), "returned ['1', '2', '3']"),
        (("123", {}), "returned '123'"),
        (({"a": [1, 2, 3]}, {}), "returned {'a'"),
        (({1, 2, 3}, {}), "returned {1, 2, 3}"),
        ((1.0, {}), "returned 1.0"),
        (((x for x in (1, 2, 3)), {}), "a generator"),
        ((map(float, (1, 2, 3)), {}), "of type map"),
        ((torch.tensor([1j, 2, 3]), {}), "returned tensor"),
        (([1j, 2, 3], {}), "3 real numbers"),
        ((np.array([1, 2, 3], complex), {}), "3 real numbers"),
        ((np.array(["a", "b", "c"]), {}), "3 real numbers"),
        ((np.array(["2020", "2021", "2022"], "datetime64[Y]"), {}), "3 real numbers"),
        (([[1, 2], [3], [4]], {}), "3 real numbers"),
        ((NoNumber(), {}), "NoNumber"),
        (([], {}), "shape (0,) for 3 images"),
        ((torch.ones(2), {}), "shape (2,) for 3 images"),
        ((torch.tensor(1.0), {}), "shape () for 3 images"),
        ((torch.ones(3, 2), {}), "shape (3, 2) for 3 images"),
        ((torch.ones(1, 3), {}), "shape (1, 3) for 3 images"),
        ((torch.tensor([1.0, NAN, 1.0]), {}), "nan for prompt 'b'"),
        (([1.0, 1.0, -INF], {}), "-inf for prompt 'c'"),
        (([1e300, 1.0, 1.0], {}), "inf for prompt 'a'"),
        ((np.ma.MaskedArray([1.0, 2.0, 3.0], [0, 1, 0]), {}), "nan for prompt 'b'"),
    ],
)
def test_what_is_not_a_list_of_rewards_is_refused(returned, words):
    def judge(images, prompts, metadata):
        return returned

    with refused(ValueError, "reward function", words, "judge"):
        score(judge, torch.zeros(3, 3, 8, 8), ("a", "b", "c"), ({},) * 3)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("a cat", "got 'a cat'"),
        (("a cat",), "(prompt, metadata)"),
        ((1, {}), "a string first"),
        ((None, {}), "a string first"),
        ((b"a cat", {}), "a string first"),
        ((["a cat"], {}), "a string first"),
        (None, "got None"),
        (("a", {}, 3), "(prompt, metadata)"),
        ({"prompt": "a", "metadata": {}}, "(prompt, metadata)"),
        ((x for x in ("a", {})), "a generator"),
        (("half \ud83d of an emoji", {}), "half of a character"),
        (("a\0cat", {}), "NUL"),
    ],
)
def test_what_is_not_a_prompt_is_refused(returned, words):
    def draw():
        return returned

    with refused(ValueError, "prompt function", words, "draw"):
        draw_prompts(draw, 2)


@pytest.mark.parametrize("error", [KeyError("x"), StopIteration(), SystemExit(0), OSError("two\nlines"), ValueError()])
def test_functions_that_raise_are_named(error):
    def breaks(*_):
        raise error

    kind = type(error).__name__
    with refused(ValueError, f"prompt function raised {kind}", "breaks, line", "test_bad_input.py"):
        draw_prompts(breaks, 1)
    with refused(RuntimeError, f"reward function raised {kind}", "breaks, line", "test_bad_input.py"):
        score(breaks, torch.zeros(1, 3, 8, 8), ("a",), ({},))


@pytest.mark.parametrize("given", [None, 3, [brightness], torch.ones(1), DDPOConfig])
@pytest.mark.parametrize("name", ["reward_function", "prompt_function"])
def test_an_argument_that_is_not_a_function_is_refused(name, given, model_dir):
    from ddpo_fast import DDPOTrainer

    functions = {"reward_function": brightness, "prompt_function": lambda: ("a", {}), name: given}
    with refused(ValueError, f"^{name} is .* function"):
        DDPOTrainer(DDPOConfig(), *functions.values(), sd_pipeline=None)


@pytest.mark.parametrize("name", ["reward_function", "prompt_function"])
def test_an_unknown_name_in_place_of_a_function_is_refused(name):
    from ddpo_fast import DDPOTrainer

    functions = {"reward_function": brightness, "prompt_function": lambda: ("a", {}), name: "jpeg"}
    with refused(ValueError, "is 'jpeg', which is neither"):
        DDPOTrainer(DDPOConfig(), *functions.values(), sd_pipeline=None)


# modules of users

MODULES = {
    "users_functions.py": """
import asyncio, sys, torch
class Scorer:
    def __call__(self, images, prompts, metadata): return images.mean((1, 2, 3)), {}
scorer = Scorer()
class Needy:
    def __init__(self, model): pass
number, nothing = 3, None
def short(images, prompts, metadata): return torch.ones(1), {}
def bare(images, prompts, metadata): return torch.ones(len(images))
def nan(images, prompts, metadata): return torch.full((len(images),), float("nan")), {}
def broken(images, prompts, metadata): raise KeyError("missing")
def exits(images, prompts, metadata): sys.exit(0)
def text(images, prompts, metadata): return ["good"] * len(images), {}
def one_argument(images): return images.mean((1, 2, 3)), {}
async def later(images, prompts, metadata): return images.mean((1, 2, 3)), {}
def bad_prompt(): return "only a string"
def raises_prompt(): raise IndexError("no more")
def yields_prompt(): yield "a cat", {}
def half_prompt(): return "\\ud83d", {}
""",
    "users_syntax.py": "def f(:\n",
    "users_exit.py": "import sys; sys.exit(0)\n",
    "users_error.py": "x = 1\nraise KeyError('x')\n",
    "users_needs.py": "import no_such_package.part\n",
    "users_circle.py": "from users_circle import f\n",
    "users_nul.py": "x = 1\0",
    "decimal.py": "def mine(): pass\n",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A working directory with a user's modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
        if name != "decimal.py":
            monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)


BAD_SPECS = {
    ":f": "must be a name from the list or 'module:function'",
    "users_functions:": "must be a name from the list or 'module:function'",
    "users_functions.py:short": "a file: write 'users_functions:short'",
    "sub/mine.py:f": "a file: write 'sub.mine:f'",
    "/elsewhere/mine.py:f": "start from its folder and write 'mine:f'",
    "users_functions:shrt": "did you mean 'short'?",
    "users_functions:number": "has no function 'number'",
    "users_functions:nothing": "has no function 'nothing'",
    "users_functions:Scorer": "is a class: give a function, or an object",
    "users_functions.part:f": "there is no module 'users_functions.part'",
    "no_such_module:f": "there is no module 'no_such_module' in",
    "no_such.module:f": "there is no module 'no_such' in",
    ".relative:f": "relative",
    "users_syntax:f": "SyntaxError: invalid syntax (users_syntax.py, line 1)",
    "users_exit:f": "SystemExit: 0 (line 1 of users_exit.py)",
    "users_error:f": "KeyError: 'x' (line 2 of users_error.py)",
    "users_needs:f": "it needs 'no_such_package', which is not installed (line 1 of users_needs.py)",
    "users_circle:f": "ImportError: cannot import name 'f'",
    "users_nul:f": "null bytes",
    "decimal:mine": "another module has the name of your file decimal.py: rename that",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_name_that_is_no_function_of_a_module_is_refused(spec, modules):
    with refused(ValueError, "reward", repr(spec), BAD_SPECS[spec]):
        load_function("reward", spec)


def test_callable_objects_are_accepted(modules):
    assert callable(load_function("reward", "users_functions:scorer"))
    require_function("reward_function", torch.nn.Identity())


# the command line


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("ddpo_fast.pipeline.load_pipeline", load)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--train_clip_range -1", "train_clip_range is -1.0"),
        ("--sample-batch-size 3 --train-batch-size 2", "divisible"),
        ("--seed 4294967296", "seed is 4294967296"),
        ("--num_epochs three", "num_epochs"),
        ("--num_epoch 3", "num_epoch"),
        ("--tracker_kwargs {", "tracker_kwargs is '{' but must be a JSON object"),
        ('--accelerator_kwargs {"cpus":1}', "accelerator_kwargs has 'cpus': use one of"),
        ("--reward jpeg", "reward is 'jpeg'"),
        ("--reward users_functions:nothing", "has no function 'nothing'"),
        ("--reward users_functions:Needy", "missing a required argument: 'model'"),
        ("--reward no_such_module:f", "no_such_module"),
        ("--reward users_exit:f", "SystemExit"),
        ("--reward users_functions:short", "shape (1,) for 2 images"),
        ("--reward users_functions:bare", "must return (rewards, metadata)"),
        ("--reward users_functions:nan", "returned nan"),
        ("--reward users_functions:broken", "KeyError: 'missing' (users_functions.broken, line"),
        ("--reward users_functions:exits", "SystemExit: 0 (users_functions.exits, line"),
        ("--reward users_functions:text", "2 real numbers"),
        ("--reward users_functions:one_argument", "takes 1 positional argument but 3 were given"),
        ("--reward users_functions:later", "a coroutine"),
        ("--prompts nothing", "prompts is 'nothing'"),
        ("--prompts .", "which is a folder"),
        ("--prompts users_functions:bad_prompt", "prompt function must return"),
        ("--prompts users_functions:raises_prompt", "IndexError: no more (users_functions.raises_prompt, line"),
        ("--prompts users_functions:yields_prompt", "a generator"),
        ("--prompts users_functions:half_prompt", "half of a character"),
        ("--prompts latin.txt", "latin.txt', whose line 2"),
        ("--prompts table.csv", "table.csv', which has no column 'prompt'"),
        (f"--prompts {'long' * 200}", "neither a file nor"),
        ("--pretrained_model ./nowhere", "no such folder"),
        ("--pretrained_model .", "model_index.json"),
        ("--resume_from nowhere", "does not exist"),
        ("--resume_from .", "holds no checkpoint"),
        ("--resume_from latin.txt", "latin.txt"),
        ("--lora_rank 0", "lora_rank is 0"),
        ("--lora_rank 1000000000", "lora_rank is 1000000000"),
        ("--lora_alpha 0", "lora_alpha is 0"),
        ("--deepspeed nowhere.json", "deepspeed is 'nowhere.json', which cannot be read"),
        ("--zero 4", "zero is 4 but must be 0, 1, 2 or 3"),
        ("--output_dir taken", "already holds a run"),
        ("--output_dir users_functions.py", "which is a file"),
    ],
)
def test_a_wrong_command_line_ends_with_one_sentence(options, words, no_model, modules, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "latin.txt").write_bytes("a cat\nein Käse\n".encode("latin-1"))
    (tmp_path / "table.csv").write_text("a cat,1")
    before = files_in(tmp_path)
    ends_with_one_sentence(["train", *options.split()], capsys, words)
    after = {name: data for name, data in files_in(tmp_path).items() if "__pycache__" not in name}
    assert after == before, "nothing is lost, and nothing is left behind"


# the file of DeepSpeed settings


def ds(**zero_optimization) -> dict:
    return {"zero_optimization": {"stage": 2, **zero_optimization}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{", "cannot be read as JSON"),
        (b"// comment\n{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'"zero"', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        ({}, "no ZeRO stage of 1, 2 or 3"),
        ({"zero_optimization": 2}, "zero_optimization is 2 but must be an object"),
        (ds(stage=0), "no ZeRO stage of 1, 2 or 3"),
        (ds(stage=7), "no ZeRO stage of 1, 2 or 3"),
        (ds(stage="2"), "zero_optimization.stage is '2' but must be"),
        (ds(stage=True), "zero_optimization.stage is True but must be"),
        (ds(offload_optimizer="cpu"), "offload_optimizer is 'cpu' but must be an object"),
        (ds(offload_optimizer={"device": "gpu"}), "offload_optimizer.device is 'gpu' but must be"),
        (ds(offload_param={"device": "nvme"}), "offload to cpu"),
        (ds(reduce_bucket_size="large"), "zero_optimization.reduce_bucket_size is 'large' but must be"),
        (ds(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size is -1"),
        ({**ds(), "bf16": True}, "bf16 is True but must be an object"),
        ({**ds(), "fp16": {"enabled": "yes"}}, "fp16 enabled=yes, but mixed_precision is"),
        ({**ds(), "bf16": {"enabled": True}}, "bf16 enabled=True, but mixed_precision is"),
        ({**ds(), "optimizer": "AdamW"}, "optimizer is 'AdamW' but must be an object"),
        ({**ds(), "optimizer": {"params": {}}}, "optimizer.type is None but must be"),
        ({**ds(), "optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1] but must be"),
        ({**ds(), "data_types": {"grad_accum_dtype": "bf16"}}, "say train_gradient_dtype instead"),
    ],
)
def test_a_wrong_deepspeed_file_is_refused(settings, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(settings if isinstance(settings, bytes) else json.dumps(settings).encode())
    with refused(ValueError, "deepspeed is", "ds.json", words):
        zero_settings(DDPOConfig(deepspeed=str(path), mixed_precision="no"), "no")


def test_accelerates_settings_for_deepspeed_are_named_as_such():
    with refused(ValueError, "accelerate's configuration of DeepSpeed has no ZeRO stage"):
        zero_settings(DDPOConfig(mixed_precision="no"), "no", {"zero_optimization": {"stage": 0}})


def test_a_deepspeed_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "ds.json").write_bytes(codecs.BOM_UTF8 + json.dumps(ds()).encode())
    assert zero_settings(DDPOConfig(deepspeed=str(tmp_path / "ds.json")), "no")["zero_optimization"]["stage"] == 2


# in the middle of a run


@pytest.mark.parametrize("failure", ["raises", "exits", "nan", "short"])
def test_a_run_that_fails_midway_keeps_its_last_checkpoint(make_trainer, tmp_path, failure):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) <= 2 * SETTINGS["sample_num_batches_per_epoch"]:
            return brightness(images, prompts, metadata)
        if failure == "raises":
            raise KeyError("gone")
        if failure == "exits":
            sys.exit(0)
        return (torch.full((len(images),), NAN) if failure == "nan" else torch.ones(1)), {}

    trainer = make_trainer(reward=reward, num_epochs=5)
    with pytest.raises((RuntimeError, ValueError), match="reward function"):
        trainer.train()
    assert checkpoint.find(tmp_path / "run").name == "checkpoint_2"


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(num_epochs=1)
    monkeypatch.setattr(trainer, "loss", lambda advantages, clip_range, ratio: (ratio * NAN).mean())
    with pytest.raises(RuntimeError, match="train_learning_rate"):
        trainer.train()
    assert not checkpoint.list_in(tmp_path / "run" / "checkpoints")


def test_a_run_with_prompts_of_numpys_string_type_is_resumed(make_trainer, tmp_path):
    """TRL's example draws prompts with NumPy. Their statistics are saved in a checkpoint and loaded again."""
    names = np.array(["a cat", "a dog"])
    generator = np.random.default_rng(0)

    def draw():
        return generator.choice(names), {}

    settings = {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2, "prompts": draw}
    trainer = make_trainer(num_epochs=1, **settings)
    trainer.stat_tracker.update([np.str_("given directly")], [1.0])
    trainer.train()
    resumed = make_trainer(num_epochs=2, resume_from=str(tmp_path / "run"), **settings)
    assert resumed.first_epoch == 1
    assert {type(prompt) for prompt in resumed.stat_tracker.stats} == {str}
    resumed.train()
