"""Times a step of AdamW in host memory: ours with 8-bit moments, PyTorch's, bitsandbytes' and DeepSpeed's.

    python bench/optimizer.py [--size tiny|full] [--threads N ...] [--no-deepspeed] [--output FILE.jsonl] [--plot FILE]

A process for each number of threads; in it contenders take turns in rounds, and a ratio is that of two steps of the
same round. Memory is that of another process for each contender: weights and moments as they are kept, and how far a
step rises above what is there before the first one (the moments, and what is temporary). Gradients are not counted.
Records are appended as JSON lines; `share_of_copy` is the time of a copy that moves the bytes that a step must move at
least, over the step's time. `cores` says how many processors the contenders had, all of them together: fewer than
threads where others use them too. DeepSpeed's optimizer is compiled first, which takes minutes, unless
TORCH_EXTENSIONS_DIR has it.
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

import paths
import record
import timing
import torch
from matplotlib.figure import Figure
from ops import say, spread
from torch import Tensor

from ddpo_fast.engine.host_adamw import HostAdamW8bit

Row = dict[str, Any]
SIZES = {"tiny": [5000], "full": [10_000_000, 30_000_000, 100_000_000]}
SETTINGS = {"lr": 1e-4, "weight_decay": 1e-2}
OURS = "ours"
# bytes that a step must read and write for each weight: the weight twice, its moments twice, the gradient, the copy
SCALES = 4 * 4 / 256
MOVED = {
    OURS: 8 + 4 + SCALES + 4,
    "ours, bf16 in and out": 8 + 4 + SCALES + 2 + 2,
    "torch": 8 + 16 + 4,
    "torch, bf16 in and out": 8 + 16 + 2 + 2,
    "bitsandbytes": 8 + 4 + SCALES + 4,
    "deepspeed": 8 + 16 + 4,
    "deepspeed, bf16 in and out": 8 + 16 + 2 + 2,
    # without fp32 weights: small updates are lost
    "deepspeed, bf16 weights": 4 + 16 + 2,
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        print(json.dumps(memory(options.child[0], int(options.child[1]))))
        return 0
    if options.timed:
        print(json.dumps(timed(options)))
        return 0
    facts = {**record.facts("cpu"), **record.versions("bitsandbytes", "deepspeed"), "size": options.size}
    output = options.output or paths.ROOT / "bench" / "records" / f"optimizer-{record.slug(facts['device'])}.jsonl"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            found = in_process(["--timed"], options, threads, folder)
            for row in found:
                row |= in_process(["--child", row["contender"], str(row["weights"])], options, threads, folder)
                row |= {**facts, "threads": threads}
            record.append(output, found)
            rows += found
    print_table(rows)
    plot(rows, options.plot or output.with_suffix(".png"))
    say(f"records: {output}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: 11, or 2 at tiny size")
    parser.add_argument("--deepspeed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="default: bench/records/optimizer-DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, help="default: beside the records")
    # what this script tells its own processes
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.size == "tiny" else 11)
    return options


def in_process(command: list[str], options: argparse.Namespace, threads: int, folder: str) -> Any:
    """What a process of this script finds: OpenMP libraries of several packages take the threads' number at start."""
    environment = {
        "TORCH_EXTENSIONS_DIR": folder,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # ninja lies beside python
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }
    how = ["--size", options.size, "--rounds", str(options.rounds), "--threads", str(threads)]
    how += [] if options.deepspeed else ["--no-deepspeed"]
    script = [sys.executable, str(Path(__file__)), *how, *command]
    done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def stepper(name: str, weights: Tensor, grad: Tensor, half: Tensor, out: Tensor) -> tuple[Any, Callable[[], None]]:
    """A contender's optimizer and its step. Raises `ImportError` and `RuntimeError` if it cannot run here."""
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

    def converting() -> None:
        grad.copy_(half)
        optimizer.step()
        out.copy_(p.detach())

    return optimizer, converting


def tensors(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, their gradients in fp32 and bf16, and room for a copy."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(n, generator=generator) * 1e-3
    return torch.randn(n, generator=generator), grad, grad.bfloat16(), torch.zeros(n, dtype=torch.bfloat16)


def timed(options: argparse.Namespace) -> list[Row]:
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
                say(f"{name} is left out: {str(error).strip().splitlines()[-1]}")
                runs.pop(name, None)
        named = list(runs)
        runs |= {f"copy for {name}": record.copy_of(int(MOVED[name] * n), "cpu") for name in (OURS, named[1])}
        say(f"{n:,} weights, {torch.get_num_threads()} threads: {', '.join(runs)}")
        began, began_busy = time.perf_counter(), time.process_time()
        times = timing.interleaved(timing.Clock("cpu"), runs, options.rounds, 1e-3)
        cores = (time.process_time() - began_busy) / (time.perf_counter() - began)
        rows += [{**row(name, n, times), "cores": cores} for name in named]
    return rows


def row(name: str, n: int, times: dict[str, list[float]]) -> Row:
    low, middle, high = spread(times[name])
    less, ratio, more = spread([theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)])
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
    """Bytes for each weight, of two steps in this process: what is kept, and the weights with a step's peak."""
    weights, *others = tensors(n)
    optimizer, step = stepper(name, weights, *others)
    if name == "deepspeed, bf16 weights":
        del weights
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
    """The most that this process has had in memory since the last reset, None where Linux does not tell."""
    try:
        if reset:
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
    """Times over ours, a panel for each number of threads and weights; beside a bar, the bytes kept for a weight."""
    panels = sorted({(row["threads"], row["weights"]) for row in rows})
    figure = Figure(figsize=(10, 2 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    longest = max(min(row["times_ours"], 4) for row in rows)
    for axis, (threads, weights) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row["threads"], row["weights"]) == (threads, weights)][::-1]
        # a bar that is cut off says so by its number
        axis.barh([row["contender"] for row in shown], [min(row["times_ours"], 4) for row in shown])
        for place, one in enumerate(shown):
            text = f" {one['times_ours']:.2f} ({one['kept_bytes_per_weight']:.1f} B)"
            axis.text(min(one["times_ours"], 4), place, text, va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.15 * longest)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{weights:,} weights, {threads} thread{'s' * (threads > 1)}", fontsize=8)
    axes[-1].set_xlabel("time of a step over ours (in brackets: bytes kept for a weight)")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
