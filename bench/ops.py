"""Times every op against the plain PyTorch that it replaces. An op whose tests fail is not timed.

    python bench/ops.py [--op STEM ...] [--device cpu|cuda] [--size tiny|full] [--output FILE.jsonl] [--plot FILE.png]

The contenders of an op are plain PyTorch ("eager") and each backend that can run here. They take turns in rounds.
Records are appended to a file of JSON lines. `share_of_copy` is the time of a copy that moves as many bytes as the op
must move at least, over the op's time: an op that is limited by memory bandwidth alone reaches 100 %.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import torch
from lib import ROOT, call_costs, records, timing
from lib.command_line import add_device_and_size, new_parser, print_progress
from lib.op_cases import CASES, Case, Function
from lib.timing import Run, percentiles
from matplotlib.figure import Figure

from ddpo_fast.ops.backend import BACKENDS, force_backend

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        print_table(records.read(options.show))
        return 0
    facts = records.facts(options.device)
    output = options.output or records.default_file("ops", facts["device"])
    facts["large_copy_gb_per_s"] = timing.copy_bandwidth(2**20 if options.size == "tiny" else 2**28, options.device)
    rows, refused = [], []
    for stem in options.op:
        if not options.skip_tests and (failure := test_failure(stem, options)):
            print_progress(f"{stem} is not timed, as its tests fail:\n{failure}")
            refused.append(stem)
            continue
        for case in CASES[stem](options.device, options.size):
            for direction in case.moved:
                found = [{**row, **facts} for row in measured(case, direction, options)]
                records.append(output, found)
                rows += found
        # compiled code of other shapes counts towards a limit beyond which torch.compile falls back to eager
        torch.compiler.reset()
    print_table(rows)
    if rows:
        plot(rows, options.plot or output.with_suffix(".png"))
        print_progress(f"records: {output}")
    if refused:
        print(f"not timed, as their tests fail: {', '.join(refused)}")
    return 1 if refused else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--op", nargs="+", choices=list(CASES), default=list(CASES), metavar="STEM", help="default: all"
    )
    add_device_and_size(parser)
    parser.add_argument("--output", type=Path, help="default: bench/records/ops-DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, help="default: beside the records")
    parser.add_argument("--rounds", type=int, help="default: 21, or 3 for tiny sizes")
    parser.add_argument("--compile", action="store_true", help="torch.compile is a contender too (slow)")
    parser.add_argument(
        "--skip-tests", action="store_true", help="time ops that may be wrong; their records say `unverified`"
    )
    parser.add_argument(
        "--tested",
        type=Path,
        help="a report of pytest's --junitxml: an op whose tests passed there is not tested again",
    )
    parser.add_argument("--show", type=Path, nargs="+", help="print these records and time nothing")
    parser.add_argument("--test-command", default=f"{shlex.quote(sys.executable)} -m pytest -q tests/test_{{op}}.py")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.size == "tiny" else 21)
    return options


def test_failure(stem: str, options: argparse.Namespace) -> str:
    """The last lines of an op's failing tests, or '' if they pass."""
    if options.tested and all_passed(stem, options.tested):
        return ""
    environment = dict(os.environ)
    if options.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)
    command = shlex.split(options.test_command.format(op=stem))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    printed = (done.stdout + done.stderr)[-2000:]
    return "" if done.returncode == 0 else printed or f"{command[0]} ended with status {done.returncode}"


def all_passed(stem: str, report: Path) -> bool:
    """Whether the report has tests of the op, and no failure or error among them."""
    tests = [test for test in ElementTree.parse(report).iter("testcase") if f"test_{stem}" in test.get("classname", "")]
    return bool(tests) and not any(test.find(kind) is not None for test in tests for kind in ("failure", "error"))


def contenders(case: Case, direction: str, options: argparse.Namespace) -> Iterator[tuple[str, Function, str]]:
    """(name, function, backend).

    Left out are interpreted Triton kernels, as that backend gives a reason not to run, and CUDA that declines the call.
    """
    yield "eager", case.eager, "auto"
    if options.compile:
        yield "torch.compile", torch.compile(case.eager, dynamic=False), "auto"
    for name, function in case.others.items():
        yield name, function, "auto"
    for backend in BACKENDS:
        runs = not case.op.reasons(backend, options.device, case.dtype)
        if runs and not (backend == "csrc" and case.declines(direction)):
            yield backend, case.fused, backend


def call_to_time(function: Function, case: Case, direction: str) -> Run:
    """Gradients are returned and not accumulated in `.grad`, which would have to be zeroed."""
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
    """A record for each contender."""
    runs: dict[str, Run] = {}
    costs: dict[str, Row] = {}
    for name, function, backend in contenders(case, direction, options):
        try:
            runs[name] = with_backend(call_to_time(function, case, direction), backend)
            forward = with_backend(partial(function, *case.arguments), backend)
            costs[name] = cost(name, runs[name], forward, direction, options.device)
        except Exception as error:
            # If another package fails, its contender is left out with a message. A failure of this project's op or of
            # plain PyTorch stops the benchmark.
            if name not in ("torch.compile", "liger"):
                raise
            print_progress(f"{case.op.name} {direction} {case.shape}: {name} is left out, {str(error).splitlines()[0]}")
            runs.pop(name, None)
    runs["copy"] = timing.copy_of(case.moved[direction], options.device)
    print_progress(f"{case.op.name} {direction} {case.shape} {case.dtype}: {', '.join(runs)}")
    sample_seconds = 1e-3 if options.size == "tiny" else 1e-2
    times = timing.interleaved(timing.Clock(options.device), runs, options.rounds, sample_seconds)
    for name in (name for name in runs if name != "copy"):
        yield row(case, direction, name, times, costs[name], options)


def with_backend(run: Run, backend: str) -> Run:
    def forced() -> Any:
        with force_backend(backend):
            return run()

    return forced


def cost(name: str, run: Run, forward: Run, direction: str, device: str) -> Row:
    """What a call costs besides time. `forward` is the forward pass alone, of which the kept bytes are counted."""
    run()
    # Ops are counted by a dispatch mode. Compiled code falls back to eager under it, and does not recover afterwards.
    uncounted = name == "torch.compile" and device == "cpu"
    return {
        **(call_costs.NO_LAUNCHES if uncounted else call_costs.launches(run, device)),
        "peak_bytes": call_costs.peak_bytes(run, device),
        "kept_bytes": None if direction == "fwd" else call_costs.kept_bytes(forward),
    }


def row(
    case: Case, direction: str, name: str, times: dict[str, list[float]], costs: Row, options: argparse.Namespace
) -> Row:
    """A record. Speed-ups are ratios within a round, as whatever slows a round down slows all contenders in it."""
    own, moved = times[name], case.moved[direction]
    low, middle, high = percentiles(own)
    slower, speed_up, faster = percentiles([eager / mine for eager, mine in zip(times["eager"], own, strict=True)])
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
    """Speed-ups over eager with 20th and 80th percentile, a panel for each op; beside each bar its share of a copy."""
    shown = [row for row in rows if row["contender"] != "eager"]
    ops = {name: [row for row in shown if row["op"] == name][::-1] for name in dict.fromkeys(r["op"] for r in shown)}
    colours = {name: f"C{i}" for i, name in enumerate(sorted({row["contender"] for row in shown}))}
    heights = [max(len(bars), 2) + 1 for bars in ops.values()]
    figure = Figure(figsize=(11, 0.25 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(ops), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, bars) in zip(panels, ops.items(), strict=True):
        draw_panel(axis, bars, colours)
        axis.set_title(name, fontsize=9)
    panels[-1].set_xlabel("speed-up over eager PyTorch (in brackets: share of a copy's bandwidth)")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_panel(axis: Any, bars: list[Row], colours: dict[str, str]) -> None:
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
