"""Times a step of AdamW on weights in host memory: ours with 8-bit moments, PyTorch's, bitsandbytes', DeepSpeed's.

    python bench/optimizer.py [--size tiny|full] [--threads N ...] [--no-deepspeed] [--output FILE.jsonl] [--plot FILE]

Each number of threads has a process of its own, in which the contenders take turns in rounds. A ratio compares two
steps of the same round. Records are appended to a file of JSON lines. In the table:

- "of our time": the contender's time over ours.
- "cores": how many processors all contenders together had, fewer than threads where other programs use them too.
- "of copy": the time of a copy that moves as many bytes as a step must move at least, over the step's time.
- "kept B" and "peak B", bytes for each weight, each contender measured in another process: the weights and moments
  that are kept, and the weights plus the most by which memory grows in the first two steps, for moments and
  temporary memory. Gradients are not counted.

DeepSpeed's optimizer is compiled first, which takes minutes, unless TORCH_EXTENSIONS_DIR has it already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lib import records, timing
from lib.command_line import new_parser, print_progress
from lib.timing import percentiles
from matplotlib.figure import Figure
from torch import Tensor

from ddpo_fast.engine.host_adamw import HostAdamW8bit

Row = dict[str, Any]
SIZES = {"tiny": [5000], "full": [10_000_000, 30_000_000, 100_000_000]}
SETTINGS = {"lr": 1e-4, "weight_decay": 1e-2}
OURS = "ours"
# bytes for each weight: two 8-bit moments have an fp32 scale for each block of 256, and a step reads and writes both
SCALES = 4 * 4 / 256
# Bytes that a step must move for each weight. It reads and writes the weight and the moments, reads the gradient, and
# where bf16 goes "in and out" it reads a bf16 gradient and writes a bf16 copy of the weight.
MOVED = {
    OURS: 8 + 4 + SCALES + 4,
    "ours, bf16 in and out": 8 + 4 + SCALES + 2 + 2,
    "torch": 8 + 16 + 4,
    "torch, bf16 in and out": 8 + 16 + 2 + 2,
    "bitsandbytes": 8 + 4 + SCALES + 4,
    "deepspeed": 8 + 16 + 4,
    "deepspeed, bf16 in and out": 8 + 16 + 2 + 2,
    # has no fp32 weights, so small updates are lost
    "deepspeed, bf16 weights": 4 + 16 + 2,
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.memory:
        print(json.dumps(memory(options.memory[0], int(options.memory[1]))))
        return 0
    if options.times:
        print(json.dumps(times(options)))
        return 0
    facts = {**records.facts("cpu"), **records.versions("bitsandbytes", "deepspeed"), "size": options.size}
    output = options.output or records.default_file("optimizer", facts["device"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            found = in_process(["--times"], options, threads, folder)
            for row in found:
                row |= in_process(["--memory", row["contender"], str(row["weights"])], options, threads, folder)
                row |= {**facts, "threads": threads}
            records.append(output, found)
            rows += found
    print_table(rows)
    plot(rows, options.plot or output.with_suffix(".png"))
    print_progress(f"records: {output}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, help="default: 11, or 2 at tiny size")
    parser.add_argument("--deepspeed", action=argparse.BooleanOptionalAction, default=True, help="compile and time it")
    parser.add_argument("--output", type=Path, help="default: bench/records/optimizer-DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, help="default: beside the records")
    # for processes that this script starts: print the times of all contenders, or the memory of one
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.size == "tiny" else 11)
    return options


def in_process(command: list[str], options: argparse.Namespace, threads: int, folder: str) -> Any:
    """What this script prints in a new process: OpenMP libraries read the number of threads only when they start."""
    environment = {
        "TORCH_EXTENSIONS_DIR": folder,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # DeepSpeed compiles with ninja, which pip installs beside python
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }
    how = ["--size", options.size, "--rounds", str(options.rounds), "--threads", str(threads)]
    how += [] if options.deepspeed else ["--no-deepspeed"]
    script = [sys.executable, str(Path(__file__)), *how, *command]
    done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def stepper(name: str, weights: Tensor, grad: Tensor, half: Tensor, out: Tensor) -> tuple[Any, Callable[[], None]]:
    """(a contender's optimizer, a function that does a step). Raises an error if it cannot run here."""
    p = torch.nn.Parameter(weights.bfloat16() if name.endswith("weights") else weights)
    kind, _, how = name.partition(", ")
    optimizer: Any
    if kind == OURS:
        optimizer = HostAdamW8bit([p], **SETTINGS)
        if not how:
            return optimizer, lambda: optimizer.step_with([grad])
        return optimizer, lambda: optimizer.step_with([half], [out])
    if kind == "torch":
        optimizer = torch.optim.AdamW([p], **SETTINGS, fused=True)
    elif kind == "bitsandbytes":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit([p], **SETTINGS)
    else:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([p], **SETTINGS)
    p.grad = half if how == "bf16 weights" else grad
    if how != "bf16 in and out":
        return optimizer, optimizer.step

    # for an optimizer that only takes fp32 gradients, a step includes both conversions
    def converting() -> None:
        grad.copy_(half)
        optimizer.step()
        out.copy_(p.detach())

    return optimizer, converting


def tensors(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, their gradients in fp32 and in bf16, and an empty bf16 tensor for a copy of the weights."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(n, generator=generator) * 1e-3
    return torch.randn(n, generator=generator), grad, grad.bfloat16(), torch.zeros(n, dtype=torch.bfloat16)


def times(options: argparse.Namespace) -> list[Row]:
    """A row for each contender and number of weights."""
    rows = []
    for n in SIZES[options.size]:
        weights, *others = tensors(n)
        runs: dict[str, timing.Run] = {}
        for name in MOVED:
            if name.startswith("deepspeed") and not options.deepspeed:
                continue
            try:
                runs[name] = stepper(name, weights.clone(), *others)[1]
                runs[name]()
            except Exception as error:
                if name.startswith(("ours", "torch")):
                    raise
                print_progress(f"{name} is left out: {str(error).strip().splitlines()[-1]}")
                runs.pop(name, None)
        named = list(runs)
        runs |= {f"copy for {name}": timing.copy_of(int(MOVED[name] * n), "cpu") for name in (OURS, named[1])}
        print_progress(f"{n:,} weights, {torch.get_num_threads()} threads: {', '.join(runs)}")
        began, began_busy = time.perf_counter(), time.process_time()
        found = timing.interleaved(timing.Clock("cpu"), runs, options.rounds, 1e-3)
        cores = (time.process_time() - began_busy) / (time.perf_counter() - began)
        rows += [{**row(name, n, found), "cores": cores} for name in named]
    return rows


def row(name: str, n: int, times: dict[str, list[float]]) -> Row:
    """A record, from the microseconds of all contenders in each round."""
    low, middle, high = percentiles(times[name])
    less, ratio, more = percentiles([theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)])
    copies = times.get(f"copy for {name}")
    return {
        "bench": "optimizer",
        "contender": name,
        "weights": n,
        "seconds_p20": low / 1e6,
        "seconds_p50": middle / 1e6,
        "seconds_p80": high / 1e6,
        "times_ours_p20": less,
        "times_ours": ratio,
        "times_ours_p80": more,
        "gb_per_s": MOVED[name] * n / 1e3 / middle,
        "share_of_copy": copies and median(c / mine for c, mine in zip(copies, times[name], strict=True)),
        "rounds": len(times[name]),
    }


def memory(name: str, n: int) -> Row:
    """Bytes for each weight after two steps in this process: those that are kept, and the weights with the peak."""
    weights, *others = tensors(n)
    optimizer, step = stepper(name, weights, *others)
    if name == "deepspeed, bf16 weights":
        # its bf16 weights are a copy
        del weights
    # what PyTorch allocates at its first op does not count
    torch.zeros(1000).add_(1)
    before = resident_bytes(reset=True)
    step()
    step()
    peak = resident_bytes()
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    weight_bytes = optimizer.param_groups[0]["params"][0].element_size()
    return {
        "kept_bytes_per_weight": sum(t.numel() * t.element_size() for t in kept) / n,
        "peak_bytes_per_weight": before and peak and weight_bytes + (peak - before) / n,
    }


def resident_bytes(reset: bool = False) -> int | None:
    """The most bytes of this process in memory since the last reset, None on a system without Linux's `/proc`."""
    try:
        if reset:
            # 5 resets the peak (VmHWM), see proc(5)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def print_table(rows: list[Row]) -> None:
    print(
        f"{'weights':>12}{'threads':>9}{'cores':>7}  {'contender':<28}{'of our time':>12}{'p20':>7}{'p80':>7}", end=""
    )
    print(f"{'GB/s':>7}{'of copy':>9}{'kept B':>8}{'peak B':>8}")
    for r in rows:
        share = "" if r["share_of_copy"] is None else f"{r['share_of_copy']:.0%}"
        peak = "" if r["peak_bytes_per_weight"] is None else f"{r['peak_bytes_per_weight']:.2f}"
        print(
            f"{r['weights']:>12,}{r['threads']:>9}{r['cores']:>7.2f}  {r['contender']:<28}{r['times_ours']:>12.2f}"
            f"{r['times_ours_p20']:>7.2f}{r['times_ours_p80']:>7.2f}{r['gb_per_s']:>7.1f}{share:>9}"
            f"{r['kept_bytes_per_weight']:>8.2f}{peak:>8}"
        )


def plot(rows: list[Row], path: Path) -> None:
    """Times over ours, a panel for each number of threads and weights; beside each bar the bytes kept for a weight."""
    panels = sorted({(row["threads"], row["weights"]) for row in rows})
    figure = Figure(figsize=(10, 2 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    longest = max(min(row["times_ours"], 4) for row in rows)
    for axis, (threads, weights) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row["threads"], row["weights"]) == (threads, weights)][::-1]
        # bars end at 4 so that the others can be told apart; the number beside a bar is the true one
        axis.barh([row["contender"] for row in shown], [min(row["times_ours"], 4) for row in shown])
        for place, one in enumerate(shown):
            text = f" {one['times_ours']:.2f} ({one['kept_bytes_per_weight']:.1f} B)"
            axis.text(min(one["times_ours"], 4), place, text, va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.15 * longest)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{weights:,} weights, {threads} thread{'s' * (threads > 1)}", fontsize=8)
    axes[-1].set_xlabel("time of a step over the time of ours (in brackets: bytes kept for a weight)")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
