"""README, docs and the workflow say what is so: the example runs; files, options, settings and make targets exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from run_process import finish

from ddpo_fast import DDPOConfig
from ddpo_fast.commands.options import (
    info_parser,
    plan_parser,
    recipes_parser,
    report_parser,
    sample_parser,
    train_parser,
    train_reward_parser,
)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
PARSERS = {
    "train": train_parser,
    "init": train_parser,
    "train-reward": train_reward_parser,
    "plan": plan_parser,
    "sample": sample_parser,
    "report": report_parser,
    "recipes": recipes_parser,
    "info": info_parser,
}
# settings whose names begin so are `DDPOConfig`'s
PREFIXES = ("train_", "sample_", "per_prompt_", "vae_", "ema_", "lora_")
# files of a reader's own
MADE_UP = {"my_rewards.py"}
OTHER_NAMES = {"lora_rank", "lora_alpha", "lora_target_modules", "lora_linear", "sample_s", "train_s"}
OTHER_NAMES |= {"sample_prompt_function"}

# capitals that no module defines: a file, signals, environment variables
NOT_CONSTANTS = {"NOTICE", "SIGTERM", "SIGHUP", "DDPO_FAST_BACKEND", "DDPO_FAST_CACHE", "PIP_EXTRA_INDEX_URL"}
NOT_CONSTANTS |= {"OPENAI_API_KEY", "DDPO_FAST_REWARD_TOKEN", "NAME", "SPLIT", "COLUMN", "FILE", "FOLDER"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """What is in backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def test_the_example_trains(tmp_path):
    """README's example runs as it stands and leaves what README says."""
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 15
    (tmp_path / "example.py").write_text(example, "utf-8")
    done = finish([sys.executable, "example.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "redder"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    rewards = [record["reward_mean"] for record in records if record["kind"] == "epoch"]
    assert len(rewards) == 6
    assert sum(record["kind"] == "update" for record in records) == 12
    assert rewards[-1] > rewards[0]
    assert (run / "rewards.png").exists()
    assert any((run / "checkpoints").iterdir())
    StableDiffusionPipeline.from_pretrained(run / "final")


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@each_page
def test_files_are_there(page):
    """Paths in backticks and in commands. A name without a folder is in that of the name before it, or in ddpo_fast."""
    folder = ROOT / "ddpo_fast"
    commands = [word for block in blocks(page, "bash") for word in shlex.split(block, comments=True)]
    for name in [*code_spans(page), *commands]:
        if re.fullmatch(r"(ddpo_fast|kernels|csrc|tests|bench|docs|\.github)/[\w./-]*", name):
            assert (ROOT / name).exists(), name
            folder = (ROOT / name).parent
        elif re.fullmatch(r"[a-z][a-z0-9_]*\.py", name) and name not in MADE_UP:
            assert any((place / name).exists() for place in (folder, ROOT / "ddpo_fast", ROOT / "tests")), name


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `ddpo-fast` command in a page's code blocks; scripts that start one are the same."""
    found = []
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["ddpo-fast"]:
            found.append(words[1:])
        elif "ddpo_fast/train.py" in words:
            found.append(["train", *words[words.index("ddpo_fast/train.py") + 1 :]])
    return found


@each_page
def test_commands_are_understood(page):
    """Each option exists and takes its value."""
    for command, *options in commands_of(page):
        # without a file of settings, and without where the output goes
        options = options[1:] if options and options[0].endswith(".yaml") else options
        PARSERS[command]().parse(options[: options.index(">")] if ">" in options else options)


@each_page
def test_options_and_settings_exist(page):
    options = {option for parser in PARSERS.values() for option in parser()._option_string_actions}
    settings = {field.name for field in fields(DDPOConfig)} | OTHER_NAMES
    for span in code_spans(page):
        words = span.split()
        if words[:1] == ["ddpo-fast"]:
            assert words[1] in PARSERS, span
        if words[:1] == ["ddpo-fast"] or span.startswith("--"):
            for word in words:
                assert not word.startswith("--") or word.partition("=")[0] in options, span
        if re.fullmatch(r"\w+", span) and span.startswith(PREFIXES):
            assert span in settings, span


@each_page
def test_constants_exist(page):
    """Names in capitals, which say where something is added."""
    code = "".join(
        path.read_text("utf-8") for path in [*ROOT.glob("ddpo_fast/**/*.py"), ROOT / "tests" / "conftest.py"]
    )
    for span in code_spans(page):
        if re.fullmatch(r"[A-Z]{3}[A-Z_]+", span) and span not in NOT_CONSTANTS:
            assert re.search(rf"^{span}\b", code, re.MULTILINE), span


def test_pages_are_short():
    assert all(len(page.read_text("utf-8").splitlines()) < 150 for page in DOCS)
    assert len(README.read_text("utf-8").splitlines()) <= 170


def test_make_targets_exist():
    """Those of README, CONTRIBUTING and the workflow."""
    known = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    words = [span for page in PAGES for span in code_spans(page)]
    words += [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    words += [line for step in steps for line in step.get("run", "").splitlines()]
    used = {match[1] for line in words if (match := re.match(r"make (?:[A-Z_]+=\S+ )*([a-z-]+)", line))}
    assert {"demo", "test", "lint", "test-fast"} <= used
    assert used <= known, used - known


def test_the_workflow_tests_the_pythons_that_are_promised():
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert lowest is not None
    # 3.10 without quotes would be the number 3.1
    assert versions[0] == lowest[1]
    assert all(isinstance(version, str) for version in versions)


def test_the_picture_names_files_that_exist():
    text = (ROOT / "docs" / "pipeline.svg").read_text("utf-8")
    names = re.findall(r'class="file"[^>]*>([^<]+)<', text)
    assert len(names) >= 8
    for name in (part for line in names for part in line.split(", ")):
        assert (ROOT / "ddpo_fast" / name).exists(), name
    assert len(text.encode()) < 12_000
