"""Which runs `learning.py` needs, in which order, and the processes that run those whose records are missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo_fast.prompts import PROMPT_LISTS, load_prompts
from lib.command_line import print_progress
from lib.learning_contenders import BASELINE, kind_of
from lib.trainer_process import environment
from lib.workloads import OURS, TRL, Contender

Row = dict[str, Any]
# epochs of TRL's package whose seconds are measured for each seed, after one that warms up
TIMED_EPOCHS = 2


@dataclass(frozen=True)
class Run:
    """A run and the file of its record."""

    spec: Row
    path: Path

    @property
    def label(self) -> str:
        return " ".join(str(self.spec[name]) for name in ("bench", "reward", "kind", "contender", "seed"))


class OtherRecord(ValueError):
    pass


def prompts_and_held_out(name: str, count: int = 4) -> tuple[list[str], list[str]]:
    """The prompts to train on, by name or file, and `count` animals that are not among them, to evaluate."""
    prompts = list(load_prompts(name).prompts)  # type: ignore[attr-defined] # a list or a file, as the options say
    others = [prompt for prompt in PROMPT_LISTS["simple_animals"] if prompt not in prompts]
    return prompts, others[:: len(others) // count][:count]


def planned(options: Any, contenders: list[Contender]) -> Iterator[Run]:
    """All runs, seed by seed: TRL's seconds first, then each reward's contenders, in an order that rotates."""
    prompts, held_out = prompts_and_held_out(options.prompts)
    kinds = list(dict.fromkeys(kind_of(contender) for contender in contenders))
    for number, seed in enumerate(range(options.first_seed, options.first_seed + options.seeds)):
        common = {
            "seed": seed,
            "device_type": options.device,
            "model": str(options.model or ""),
            "prompts": prompts,
        }
        for kind in kinds:
            theirs = [c for c in contenders if kind_of(c) == kind and c.name == BASELINE]
            if theirs and not options.trl_package and not options.no_trl_seconds:
                spec = {"bench": "seconds", "reward": "any", "kind": kind, "contender": BASELINE, **common}
                spec |= {"trainer": TRL, "settings": theirs[0].settings, "timed_epochs": TIMED_EPOCHS}
                yield Run(spec, options.records / file_name("seconds", kind, BASELINE, seed))
        for reward in options.rewards:
            turned = number % len(contenders)
            for contender in [*contenders[turned:], *contenders[:turned]]:
                kind = kind_of(contender)
                trainer = TRL if options.trl_package and contender.name == BASELINE else OURS
                spec = {"bench": "learning", "reward": reward, "kind": kind, "contender": contender.name, **common}
                spec |= {"trainer": trainer, "settings": contender.settings, "held_out": held_out}
                spec |= {"images": options.images, "evaluate_every": options.evaluate_every}
                spec |= {"evaluation_images": options.evaluation_images}
                yield Run(spec, options.records / file_name(reward, kind, contender.name, seed))


def file_name(reward: str, kind: str, contender: str, seed: int) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", reward)
    return f"{plain}/{kind}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', contender)}-seed{seed}.json"


def is_done(run: Run) -> bool:
    """Whether the run's record exists. Raises `OtherRecord` if the record there is of a run with other settings."""
    if not run.path.exists():
        return False
    found = json.loads(run.path.read_text())
    if differing := [name for name, value in run.spec.items() if found.get(name) != value]:
        raise OtherRecord(
            f"{run.path} is the record of a run with another {', '.join(differing)}: choose another folder "
            "(--records), give the contender another name, or move the record away"
        )
    return True


def run_missing(runs: list[Run], jobs: int, threads: int | None) -> int:
    """Runs those without a record, `jobs` at a time in the order given; returns how many failed.

    A run that fails is reported and the others go on. Interrupted, all processes are ended: the runs that had begun
    start again when they are next asked for.
    """
    missing = [run for run in runs if not is_done(run)]
    print_progress(f"{len(missing)} of {len(runs)} runs have no record yet; {jobs} at a time")
    processes, left = Processes(), len(missing)
    counting = threading.Lock()
    failed = 0

    def run_one(run: Run) -> None:
        nonlocal left, failed
        # another invocation may have written the record meanwhile
        if processes.ended or is_done(run):
            return
        began = time.monotonic()
        problem = processes.run(run, threads)
        with counting:
            left -= 1
            failed += bool(problem)
        if not processes.ended:
            said = f"FAILED: {problem}" if problem else f"{time.monotonic() - began:.0f} s"
            print_progress(f"{run.label}: {said}; {left} left")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in pool.map(run_one, missing):
                pass
        except BaseException:
            processes.end()
            raise
    return failed


class Processes:
    """Processes of runs, which `end` ends all at once."""

    def __init__(self) -> None:
        self.ended = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, run: Run, threads: int | None) -> str:
        """Waits for a run; returns '' if it has written its record, else the last line that it printed."""
        run.path.parent.mkdir(parents=True, exist_ok=True)
        log = run.path.with_suffix(".log")
        given = environment(run.spec["device_type"])
        if threads:
            given["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "lib.learning_run", json.dumps(run.spec), str(run.path)]
        with log.open("w") as output:
            with self._lock:
                if self.ended:
                    return "interrupted"
                process = subprocess.Popen(command, env=given, stdout=output, stderr=subprocess.STDOUT)
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        if status == 0 and run.path.exists():
            log.unlink()
            return ""
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1][:300] if lines else f'status {status}'} (see {log})"

    def end(self) -> None:
        with self._lock:
            self.ended = True
            for process in self._running:
                process.terminate()


def recorded(folder: Path, wanted: Callable[[Row], bool]) -> list[Row]:
    """The records in a folder that are wanted, in the order of their files."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json")))
    return [row for row in found if row.get("bench") in ("learning", "seconds") and wanted(row)]
