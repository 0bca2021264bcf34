"""Importing the package changes nothing else, commands start without heavy imports, and print only what matters."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys

import pytest
from run_process import finish

import ddpo_fast
from ddpo_fast.commands import library_warnings

HEAVY = ("torch", "numpy", "transformers", "diffusers", "accelerate", "matplotlib", "plotly", "jinja2")


def run(code: str, **options) -> subprocess.CompletedProcess:
    return finish([sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    ("start", "absent"),
    [
        ("import ddpo_fast", HEAVY),
        ("from ddpo_fast.cli import main; main(['--help'])", HEAVY),
        ("from ddpo_fast import DDPOConfig", ("torch", "transformers", "diffusers", "accelerate", "matplotlib")),
        ("from ddpo_fast.cli import main; main(['train', '--help'])", ("torch", "diffusers", "accelerate")),
        ("from ddpo_fast.cli import main; main(['sample', '--help'])", ("torch", "diffusers", "accelerate")),
        ("from ddpo_fast.cli import main; main(['report', '--help'])", ("torch", "diffusers", "accelerate", "plotly")),
        ("from ddpo_fast.report import page, serve", ("torch", "transformers", "diffusers", "accelerate", "plotly")),
        ("from ddpo_fast.cli import main; main(['recipes'])", ("torch", "diffusers", "accelerate")),
        ("from ddpo_fast import recipes", ("torch", "transformers", "diffusers", "accelerate")),
        ("from ddpo_fast.cli import main; main(['plan', '--num_epoch', '3'])", ("torch", "diffusers", "accelerate")),
    ],
)
def test_heavy_packages_are_not_imported(start, absent):
    code = f"import sys\ntry:\n    {start}\nexcept SystemExit: pass\nprint([m for m in {absent!r} if m in sys.modules])"
    assert run(code).stdout.splitlines()[-1] == "[]"


STATE = """
import logging, os, random, signal, sys, warnings
import accelerate, diffusers, matplotlib, numpy, peft, torch, transformers
from diffusers import StableDiffusionPipeline, DDIMScheduler, AutoencoderKL
matplotlib.use("svg")
from matplotlib import pyplot
pyplot.figure()
def state():
    names = ["", "ddpo_fast", "diffusers", "transformers", "matplotlib", "xformers", "bitsandbytes", "accelerate"]
    loggers = [logging.getLogger(name) for name in names]
    return {
        "matplotlib": (matplotlib.get_backend(), pyplot.get_fignums(), dict(matplotlib.rcParams)),
        "warnings": list(warnings.filters),
        "loggers": [(l.level, l.handlers[:], l.filters[:], l.propagate, l.disabled) for l in loggers],
        "random": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "torch settings": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled()),
        "environment": dict(os.environ),
        "path": sys.path[:],
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr),
        "folder": os.getcwd(),
    }
before = state()
from ddpo_fast import *
import ddpo_fast.run_folder.pictures, ddpo_fast.cli
import ddpo_fast.commands.train, ddpo_fast.commands.sample, ddpo_fast.commands.info
after = state()
assert DDPOTrainer.__name__ == "DDPOTrainer"
print([name for name in before if before[name] != after[name]])
"""


def test_importing_changes_no_global_state(tmp_path):
    assert run(STATE, cwd=tmp_path).stdout.splitlines()[-1] == "[]"


def test_a_command_hides_messages_of_libraries(tmp_path, model_dir):
    # a folder of this name is imported in place of an optional package of Hugging Face
    (tmp_path / "kernels").mkdir()
    options = [
        "--recipe=trl",
        "--num_epochs=1",
        "--sample_num_steps=2",
        "--mixed_precision=no",
        "--train_clip_range=9",
        f"--pretrained_model={model_dir}",
    ]
    prompt = " ".join(["very"] * 99) + " good"
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
    code = f"from ddpo_fast import cli; cli.main({['train', '--output_dir=run', '--prompts=prompts.txt', *options]!r})"
    done = run(code, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("epoch 1/1: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "a prompt is longer than the text encoder reads; this end of it has no effect: very very"
    )
    assert "<|endoftext|>" not in lines[0]


def test_public_names_of_the_package():
    assert set(ddpo_fast.__all__) <= set(dir(ddpo_fast))
    for name in ddpo_fast.__all__:
        value = getattr(ddpo_fast, name)
        if isinstance(value, type):
            assert pickle.loads(pickle.dumps(value)) is value
    assert json.loads(json.dumps(ddpo_fast.__version__)) == ddpo_fast.__version__
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        ddpo_fast.DPOTrainer  # noqa: B018
    with pytest.raises(ImportError):
        from ddpo_fast import DPOTrainer  # noqa: F401


# messages of libraries while a command runs

PIPELINE, TOKENIZER, IMPORTS = library_warnings.FILTERED[2], library_warnings.FILTERED[1], library_warnings.FILTERED[0]


@pytest.mark.parametrize(
    ("name", "level", "text", "said"),
    [
        ("xformers", logging.WARNING, "can't load C++/CUDA extensions", None),
        ("bitsandbytes.backends.cpu.ops", logging.WARNING, "Failed to load CPU gemm_4bit_forward", None),
        ("bitsandbytes", logging.ERROR, "CUDA setup failed", "CUDA setup failed"),
        (IMPORTS, logging.WARNING, "`CLIPImageProcessor` requires torchvision (not installed)", None),
        (IMPORTS, logging.WARNING, "another", "another"),
        (TOKENIZER, logging.WARNING, "(93 > 77). It will result in indexing errors", None),
        (
            PIPELINE,
            logging.WARNING,
            f"The following part of your input was truncated because of 77: ['on a hill {library_warnings.END * 50}']",
            "a prompt is longer than the text encoder reads; this end of it has no effect: on a hill",
        ),
        (PIPELINE, logging.WARNING, "another", "another"),
        ("DeepSpeed", logging.WARNING, "Setting accelerator to CPU. If you have GPU", None),
        ("torch", logging.WARNING, "true and useful", "true and useful"),
    ],
)
def test_only_known_messages_are_hidden(name, level, text, said):
    heard = []
    logger, handler = logging.getLogger(name), logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with library_warnings.quiet_libraries():
            logger.log(level, text)
            logger.log(level, text)
        news = heard[:]
        logger.log(level, text)
    finally:
        logger.removeHandler(handler)
    repeats = 1 if text.startswith("The following") else 2
    assert news == ([said] * repeats if said else [])
    # after the command all messages are logged again
    assert heard[len(news) :] == [text]
