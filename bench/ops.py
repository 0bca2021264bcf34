"""Times every op against the plain PyTorch that it replaces. An op whose tests fail is not reported.

    python bench/ops.py [--op STEM ...] [--device cpu|cuda] [--size tiny|full] [--output FILE.jsonl] [--plot FILE.png]

Contenders take turns in rounds. Records are appended as JSON lines; `share_of_copy` is the time of a copy that moves
the bytes that the op must move at least, over the op's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from xml.etree import ElementTree

import paths
import record
import timing
import torch
from cases import CASES, Case, Function
from matplotlib.figure import Figure

from ddpo_fast.ops.backend import BACKENDS, force_backend

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        print_table([json.loads(line) for file in options.show for line in file.read_text("utf-8").splitlines()])
        return 0
    facts = record.facts(options.device)
    output = options.output or paths.ROOT / "bench" / "records" / f"ops-{record.slug(facts['device'])}.jsonl"
    facts["large_copy_gb_per_s"] = record.copy_bandwidth(2**20 if options.size == "tiny" else 2**28, options.device)
    rows, refused = [], []
    for stem in options.op:
        if not options.skip_tests and (failure := failed_tests(stem, options)):
            say(f"{stem} is not reported, as its tests fail:\n{failure}")
            refused.append(stem)
            continue
        for case in CASES[stem](options.device, options.size):
            for direction in case.moved:
                found = [{**row, **facts} for row in measured(case, direction, options)]
                record.append(output, found)
                rows += found
        torch.compiler.reset()
    print_table(rows)
    if rows:
        plot(rows, options.plot or output.with_suffix(".png"))
        say(f"records: {output}")
    if refused:
        print(f"not reported, as their tests fail: {', '.join(refused)}")
    return 1 if refused else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(CASES), default=list(CASES), metavar="STEM")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--output", type=Path, help="default: bench/records/ops-DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, help="default: beside the records")
    parser.add_argument("--rounds", type=int, help="default: 21, or 3 for tiny sizes")
    parser.add_argument("--compile", action="store_true", help="torch.compile is a contender too (takes long)")
    parser.add_argument("--skip-tests", action="store_true", help="the records say that they are unverified")
    parser.add_argument(
        "--tested", type=Path, help="pytest's --junitxml report: ops that passed there are not tested again"
    )
    parser.add_argument("--show", type=Path, nargs="+", help="print these records and time nothing")
    parser.add_argument("--test-command", default=f"{shlex.quote(sys.executable)} -m pytest -q tests/test_{{op}}.py")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.size == "tiny" else 21)
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failed_tests(stem: str, options: argparse.Namespace) -> str:
    """The end of what an op's failing tests print, or '' if they pass."""
    if options.tested and all_passed(stem, options.tested):
        return ""
    environment = dict(os.environ)
    if options.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)
    command = shlex.split(options.test_command.format(op=stem))
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr)[-2000:]
    return "" if done.returncode == 0 else said or f"{command[0]} ended with status {done.returncode}"


def all_passed(stem: str, report: Path) -> bool:
    """Whether pytest's JUnit report has the op's tests and no failure or error among them."""
    tests = [test for test in ElementTree.parse(report).iter("testcase") if f"test_{stem}" in test.get("classname", "")]
    return bool(tests) and not any(test.find(kind) is not None for test in tests for kind in ("failure", "error"))


def contenders(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Function, str]]:
    """Names, functions, and backends. Interpreted kernels are not among them: their backend has a reason."""
    yield "eager", case.eager, "auto"
    if options.compile:
        yield "torch.compile", torch.compile(case.eager, dynamic=False), "auto"
    for name, function in case.others.items():
        yield name, function, "auto"
    for backend in BACKENDS:
        if not case.op.reasons(backend, options.device, case.dtype):
            yield backend, case.fused, backend


def prepared(function: Function, case: Case, direction: str) -> timing.Run:
    """A call to time. Gradients are returned and never added up, so there is nothing to zero."""
    if direction == "fwd":
        return torch.no_grad()(lambda: function(*case.arguments))

    def outputs() -> list[torch.Tensor]:
        made = function(*case.arguments)
        return [t for t in (made if isinstance(made, tuple) else (made,)) if t.requires_grad]

    kept = outputs()
    grads = [torch.ones_like(output) for output in kept]
    if direction == "bwd":
        return lambda: torch.autograd.grad(kept, case.leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(outputs(), case.leaves, grads)


def measured(case: Case, direction: str, options: argparse.Namespace) -> Iterator[Row]:
    runs: dict[str, timing.Run] = {}
    costs: dict[str, Row] = {}
    for name, function, backend in contenders(case, options):
        try:
            runs[name] = with_backend(prepared(function, case, direction), backend)
            forward = with_backend(partial(function, *case.arguments), backend)
            costs[name] = cost(name, runs[name], forward, direction, options.device)
        except Exception as error:
            if name not in ("torch.compile", "liger"):
                raise
            say(f"{case.op.name} {direction} {case.shape}: {name} is left out, {str(error).splitlines()[0]}")
            runs.pop(name, None)
    runs["copy"] = record.copy_of(case.moved[direction], options.device)
    say(f"{case.op.name} {direction} {case.shape} {case.dtype}: {', '.join(runs)}")
    sample_seconds = 1e-3 if options.size == "tiny" else 1e-2
    times = timing.interleaved(timing.Clock(options.device), runs, options.rounds, sample_seconds)
    for name in (name for name in runs if name != "copy"):
        yield row(case, direction, name, times, costs[name], options)


def with_backend(run: timing.Run, backend: str) -> timing.Run:
    def forced() -> Any:
        with force_backend(backend):
            return run()

    return forced


def cost(name: str, run: timing.Run, forward: timing.Run, direction: str, device: str) -> Row:
    """What a call costs besides time."""
    run()
    # ops are counted by a mode under which compiled code falls back to eager, and stays so afterwards
    uncounted = name == "torch.compile" and device == "cpu"
    return {
        **(timing.NO_LAUNCHES if uncounted else timing.launches(run, device)),
        "peak_bytes": timing.peak_bytes(run, device),
        "kept_bytes": None if direction == "fwd" else timing.kept_bytes(forward),
    }


def row(
    case: Case, direction: str, name: str, times: dict[str, list[float]], costs: Row, options: argparse.Namespace
) -> Row:
    """One record; speed-ups are of rounds, as what slows a round down slows all in it."""
    own, moved = times[name], case.moved[direction]
    low, middle, high = spread(own)
    slower, speed_up, faster = spread([eager / mine for eager, mine in zip(times["eager"], own, strict=True)])
    return {
        "op": case.op.name,
        "direction": direction,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "contender": name,
        "us_p20": low,
        "us_p50": middle,
        "us_p80": high,
        "speed_up_p20": slower,
        "speed_up": speed_up,
        "speed_up_p80": faster,
        "least_bytes": moved,
        "gb_per_s": moved / 1e3 / middle,
        "copy_gb_per_s": moved / 1e3 / median(times["copy"]),
        "share_of_copy": median(copy / mine for copy, mine in zip(times["copy"], own, strict=True)),
        **costs,
        "rounds": options.rounds,
        "unverified": options.skip_tests,
    }


def spread(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = quantiles(values, n=5, method="inclusive")
    return fifths[0], median(values), fifths[3]


def print_table(rows: list[Row]) -> None:
    what = rows[0]["launches_are"] if rows else ""
    print(f"{'op':<34}{'size':<46}{'contender':<14}{'p20':>9}{'p50':>9}{'p80':>9} us{'GB/s':>7}{'of copy':>9}", end="")
    print(f"{'peak MB':>9}{'kept MB':>9}{what:>16}{'speed-up':>10}")
    for r in rows:
        kept = "" if r["kept_bytes"] is None else f"{r['kept_bytes'] / 1e6:.2f}"
        print(
            f"{r['op'] + ' ' + r['direction'] + ' ' + r['dtype']:<34}{r['shape']:<46}{r['contender']:<14}"
            f"{r['us_p20']:>9.1f}{r['us_p50']:>9.1f}{r['us_p80']:>9.1f}   {r['gb_per_s']:>7.1f}"
            f"{r['share_of_copy']:>9.0%}"
            f"{r['peak_bytes'] / 1e6:>9.2f}{kept:>9}{r['launches'] or '':>16}{r['speed_up']:>10.2f}"
        )


def plot(rows: list[Row], path: Path) -> None:
    """Speed-ups over eager with their p20 and p80, a panel for each op; beside a bar, its share of a copy's speed."""
    shown = [row for row in rows if row["contender"] != "eager"]
    ops = {name: [row for row in shown if row["op"] == name][::-1] for name in dict.fromkeys(r["op"] for r in shown)}
    colours = {name: f"C{i}" for i, name in enumerate(sorted({row["contender"] for row in shown}))}
    heights = [max(len(bars), 2) + 1 for bars in ops.values()]
    figure = Figure(figsize=(11, 0.25 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(ops), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, bars) in zip(panels, ops.items(), strict=True):
        draw(axis, bars, colours)
        axis.set_title(name, fontsize=9)
    panels[-1].set_xlabel("speed-up over eager PyTorch (in brackets: share of a copy's bandwidth)")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)


def draw(axis: Any, bars: list[Row], colours: dict[str, str]) -> None:
    places, values = range(len(bars)), [bar["speed_up"] for bar in bars]
    below = [bar["speed_up"] - bar["speed_up_p20"] for bar in bars]
    above = [bar["speed_up_p80"] - bar["speed_up"] for bar in bars]
    axis.barh(places, values, xerr=[below, above], color=[colours[bar["contender"]] for bar in bars], ecolor="grey")
    labels = [f"{bar['contender']}: {bar['direction']} {bar['dtype']}, {bar['shape']}" for bar in bars]
    axis.set_yticks(places, labels, fontsize=7)
    for place, bar in zip(places, bars, strict=True):
        text = f" {bar['speed_up']:.2f} ({bar['share_of_copy']:.0%})"
        axis.text(bar["speed_up_p80"], place, text, va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.2 * max(1, *(bar["speed_up_p80"] for bar in bars)))


if __name__ == "__main__":
    sys.exit(main())
