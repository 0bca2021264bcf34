"""Counts what a row of a network launches, reads and writes on a GPU, without one, and the least time that this takes.

    python bench/traffic.py [--network sd1.5 sdxl sd3.5-medium] [--rows N] [--output FILE.jsonl]

A row is one latent of a call; sampling with guidance takes two rows an image. Counted are the forward pass without
gradients, as in sampling, and with them, and the backward pass, with all weights trained and with a LoRA, of plain
diffusers ('eager') and of the network as `fuse_unet` leaves it ('fused'), in half precision; if asked for, of either
with its repeated blocks compiled ('compiled', 'fused and compiled'), as Inductor plans them for an H100. The calls run
on the device `meta`, so shapes are real and values do not exist. `bench/lib/traffic_rules.py` says what each op
launches, and `bench/lib/traffic_compiled.py` what compiled blocks do: of Inductor's kernels, those with a reduction
count as norms, the others as activations.

The least time of a launch is the longer of its FLOPs at --tflops and its bytes at --tb-per-s, and that of a pass the
sum over its launches: no program of these launches is faster. Both rates are assumed unless they are given. The share
is of --peak-tflops, over an epoch, which samples and trains as many rows. Not counted: the loss, the optimizer, the
decoding of images, the time between launches, and that small launches reach less than the rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lib import records
from lib.command_line import new_parser, print_progress
from lib.traffic_count import count
from lib.traffic_networks import PIPELINES, VARIANTS, call_of, make_network, prepare
from lib.traffic_rules import KINDS, Launch

TRAINED = ("all weights", "lora")
# kinds whose kernels are limited by FLOPs where they are large
ARITHMETIC = ("matmul", "conv", "attention")


def summed(launches: Iterable[Launch]) -> dict[str, dict[str, float]]:
    """Launches, bytes and FLOPs of each kind."""
    sums = {kind: {"launches": 0, "read": 0, "written": 0, "flops": 0.0} for kind in KINDS}
    for launch in launches:
        of = sums[launch.kind]
        of["launches"] += 1
        for name in ("read", "written", "flops"):
            of[name] += getattr(launch, name)
    return sums


def least_seconds(launches: Iterable[Launch], flops_per_s: float, bytes_per_s: float) -> float:
    """The sum of each launch's longer time, of its FLOPs and of its bytes."""
    return sum(max(of.flops / flops_per_s, (of.read + of.written) / bytes_per_s) for of in launches)


def planning(variant: str) -> AbstractContextManager[None]:
    """A context in which Inductor plans for a GPU, if blocks are compiled, by names that are private to PyTorch."""
    if "compiled" not in variant:
        return nullcontext()
    from lib.traffic_compiled import a_gpu

    return a_gpu()


def measure(network: str, variant: str, trained: str, options: argparse.Namespace) -> list[records.Row]:
    """The records of the forward pass in sampling, and of both passes in training; all but launches are of one row."""
    print_progress(f"{network} {variant} {trained}")
    made = prepare(make_network(network), variant, trained == "lora")
    call = call_of(made, network, options.rows, channels_last=variant != "eager")
    with planning(variant):
        if "compiled" in variant:
            # only compiles
            for trains in (False, True):
                count(made, call, trains)
            made.zero_grad()
        found = count(made, call)
        launches_of = {"sampling": count(made, call, trained=False).forward}
    launches_of |= {phase: getattr(found, phase) for phase in ("forward", "backward")}
    of = {"network": network, "variant": variant, "trained": trained, "rows": options.rows}
    made_of = []
    for phase, launches in launches_of.items():
        kinds = summed(launches)
        for sums in kinds.values():
            sums.update({name: sums[name] / options.rows for name in ("read", "written", "flops")})
        seconds = least_seconds(launches, options.tflops * 1e12, options.tb_per_s * 1e12) / options.rows
        saved = found.saved / options.rows if phase == "forward" else 0
        made_of.append({**of, "phase": phase, "kinds": kinds, "saved_bytes": saved, "least_s": seconds})
    return made_of


def total(row: records.Row, *names: str, kinds: Iterable[str] = KINDS) -> float:
    return sum(row["kinds"][kind][name] for kind in kinds for name in names)


def epoch_share(passes: Sequence[records.Row], peak_tflops: float) -> float:
    """The share of the peak over a forward pass to sample, and a forward and a backward pass to train."""
    return sum(total(row, "flops") for row in passes) / sum(row["least_s"] for row in passes) / (peak_tflops * 1e12)


def print_table(rows: list[records.Row], options: argparse.Namespace) -> None:
    """A line for each pass, with the launches of a call and MB of a row for each kind, and one for each epoch."""
    others = [kind for kind in KINDS if kind not in ARITHMETIC]
    print(f"a row in calls of {rows[0]['rows']}, fp16; MB read + written (launches of the call), saved MB, GFLOP")
    print(f"least ms at {options.tflops:g} TFLOP/s and {options.tb_per_s:g} TB/s ({options.origin})")
    print(f"{'':<42}{'launches':>9}{'read':>7}{'written':>8}{'rest':>7}{'saved':>7}{'GFLOP':>7}{'ms':>7}  by kind")
    for row in rows:
        line = "{network} {variant} {trained}, {phase}".format(**row).ljust(42) + f"{total(row, 'launches'):>9.0f}"
        line += f"{total(row, 'read') / 1e6:>7.0f}{total(row, 'written') / 1e6:>8.0f}"
        line += f"{total(row, 'read', 'written', kinds=others) / 1e6:>7.0f}{row['saved_bytes'] / 1e6:>7.0f}"
        line += f"{total(row, 'flops') / 1e9:>7.0f}{1e3 * row['least_s']:>7.2f} "
        for kind, of in row["kinds"].items():
            if of["launches"]:
                line += f" {kind} {(of['read'] + of['written']) / 1e6:.0f} ({of['launches']})"
        print(line)
    for passes in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        share = epoch_share(passes, options.peak_tflops)
        name = "{network} {variant} {trained}".format(**passes[0])
        print(f"{name}: an epoch reaches at most {share:.0%} of {options.peak_tflops:g} TFLOP/s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--network", nargs="+", choices=list(PIPELINES), default=list(PIPELINES))
    add("--variant", nargs="+", choices=VARIANTS, default=["eager", "fused"])
    add("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    add("--rows", type=int, default=48, help="of a call, over which its reads of the weights are divided")
    add("--tflops", type=float, help="what matrix products reach (assumed: 550, of an H100)")
    add("--tb-per-s", type=float, help="what the memory reaches (assumed: 2.8, of an H100)")
    add("--peak-tflops", type=float, default=798.0, help="what the share is of (default: an H100 at its power limit)")
    add("--output", type=Path, help="records of all passes; a file that exists is replaced")
    options = parser.parse_args(arguments)
    if options.rows < 2 or options.rows % 2:
        parser.error(f"--rows is {options.rows} but must be even: guidance takes two rows an image")
    options.origin = "given" if options.tflops and options.tb_per_s else "assumed"
    options.tflops, options.tb_per_s = options.tflops or 550.0, options.tb_per_s or 2.8
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = []
    for network in options.network:
        for variant in options.variant:
            for trained in options.trained:
                rows += measure(network, variant, trained, options)
    print_table(rows, options)
    if options.output:
        facts = records.facts("cpu")
        kept = {name: facts[name] for name in ("commit", "dirty", "date", "torch")}
        kept |= records.versions("diffusers", "peft")
        rates = {name: getattr(options, name) for name in ("tflops", "tb_per_s", "origin")}
        lines = (json.dumps({"bench": "traffic", **row, **rates, **kept}, allow_nan=False) for row in rows)
        options.output.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
