"""Compares our trainer's speed with TRL 0.23.1's on the same work, in turns, each run in a process of its own.

    python bench/throughput.py [--case NAME ...] [--rounds N] [--quick]    a table of speeds and ratios
    python bench/throughput.py --waterfall [--technique NAME ...]          what each of our techniques gains
    python bench/throughput.py --profile CASE                              the ops of an epoch that take longest
    python bench/throughput.py --show FILE.jsonl ...                       print and draw records again

Each run warms up for one epoch, which is not counted. A ratio compares two runs of the same round.

Columns of the table: rows/s are rows of the UNet's batches that the algorithm asks for, including those of pairs that
are skipped for their zero gradient. TFLOP/s count the matmuls and convolutions of the UNet and the decoder that were
computed, except for those that find out which pairs to skip. Their peak is the best of a few library calls in the
same precision, measured at the start. Reward is the time that does not overlap with sampling. Peak memory is the
GPU's, on a CPU the process's. Records are appended to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lib import compare_with_record, records, waterfall
from lib.command_line import add_device_and_size, new_parser, print_progress
from lib.flops import flops_of, peak_tflops
from lib.rounds import rates, speed_range, speed_ratio, summary, take_turns
from lib.sd15_random import BUNDLED, default_model
from lib.trainer_process import Figures, RunFailed, run_in_process, run_spec
from lib.workloads import OURS, TRL, Case, Contender, cases, prompts, techniques

Row = dict[str, Any]
WORKAROUND = "trl: accelerate.PartialState(...) is called first; without it TRL 0.23.1 fails at its first log line"
PACKAGES = ("trl", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
# of rows that agree in all of these only the newest is shown
SAME = ("bench", "case", "contender", "device", "model", "size")
# With 50 steps as on a GPU all cases would take nearly an hour on two cores.
CPU_STEPS = 10
# Rows a second of the bundled model on one or two cores of a shared Intel Xeon, and seconds before the first epoch:
# enough to say beforehand how long it takes.
CPU_ROWS_PER_S = {OURS: 130, TRL: 60}
START_S = 10
# A profile of all of an epoch's 50 steps does not fit into memory, and the shares hardly depend on how many there are.
PROFILED_STEPS = 5


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        show(newest(records.read(options.show)), options)
        return 0
    # read before this run appends to what may be the same file
    earlier = records.read([options.against]) if options.against else []
    facts = {**records.facts(options.device), **records.versions(*PACKAGES), "size": options.size}
    options.model = (options.model or default_model(options.device, options.size)).resolve()
    if options.output is None:
        options.output = records.default_file("throughput", facts["device"])
    rows = []
    for found in measured(options):
        rows += (done := [{**row, **facts} for row in found])
        records.append(options.output, done)
    show(rows, options)
    print_progress(f"records: {options.output}")
    return exit_status(rows, earlier, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--waterfall", action="store_true", help="of the first of the cases")
    modes.add_argument("--profile", metavar="CASE", help=f"of one epoch with {PROFILED_STEPS} denoising steps")
    modes.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="measure nothing, and show these records")
    add_device_and_size(parser)
    names = ", ".join(cases(parser.get_default("device"), "full", None, {}))
    add("--case", nargs="+", metavar="NAME", help=f"default: all of {names}")
    add("--technique", nargs="+", metavar="NAME", help="bars of the waterfall; each includes those before it")
    add("--quick", action="store_const", const="tiny", dest="size", help="the same as --size tiny")
    add("--rounds", type=int, help="default: 3, or 1 at tiny size")
    add("--epochs", type=int, default=1, help="measured epochs of each run (default: 1)")
    add("--steps", type=int, help=f"denoising steps (default: 50, {CPU_STEPS} on a CPU, or 2 at tiny size)")
    add(
        "--model",
        type=Path,
        help="folder of a pipeline (default: on a GPU SD 1.5 with random weights, on a CPU the bundled model)",
    )
    add("--ours", type=json.loads, default={}, metavar="JSON", help="more settings, for our trainer only")
    add("--budget", type=float, metavar="SECONDS", help="begin no round that would end after this time")
    add("--against", type=Path, metavar="FILE", help="fail if a case is slower than its newest record in this file")
    add("--output", type=Path, help="default: bench/records/throughput-DEVICE.jsonl")
    add("--plot", type=Path, help="default: beside the records")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.size == "tiny" else 3)
    if options.profile and options.size == "full":
        options.steps = options.steps or PROFILED_STEPS
    if options.device == "cpu" and options.size == "full":
        options.steps = options.steps or CPU_STEPS
    check_names(parser, options)
    return options


def check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = cases(options.device, options.size, options.steps, options.ours)
    asked = [options.profile] if options.profile else options.case or list(known)
    if unknown := set(asked) - set(known):
        parser.error(f"no case {', '.join(sorted(unknown))} on this device: there are {', '.join(known)}")
    options.cases = [known[name] for name in asked]
    bars = ["trl", *(technique.name for technique in techniques(options.device, options.cases[0]))]
    if unknown := set(options.technique or []) - set(bars):
        parser.error(f"no technique {', '.join(sorted(unknown))} in this case: there are {', '.join(bars)}")


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each contender, in the order in which each came first.

    A bar that begins a part of a waterfall has no gain over the bar before, so an earlier row that has one is kept.
    """
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in SAME)
        if row["bench"] != "waterfall" or row.get("gain") or not kept.get(key, {}).get("gain"):
            kept[key] = row
    return list(kept.values())


def measured(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows to record, each list as soon as it has been measured."""
    if options.profile:
        yield profile(options)
        return
    print(WORKAROUND)
    print(f"each run warms up for one epoch, which is not counted; epochs measured after it: {options.epochs}")
    if (options.device, options.size, options.model) == ("cpu", "full", BUNDLED) and not options.waterfall:
        print(f"this takes about {-(-expected_s(options) // 60):.0f} minutes on two cores")
    if options.waterfall:
        yield waterfall_rows(options.cases[0], options)
        return
    for case in options.cases:
        yield case_rows(case, options)


def expected_s(options: argparse.Namespace) -> float:
    """How long all cases will take with the bundled model on a CPU."""
    of_epoch = [
        (contender.sample_rows + contender.train_rows) / CPU_ROWS_PER_S[contender.trainer]
        for case in options.cases
        for contender in case.contenders
    ]
    return options.rounds * sum(START_S + (1 + options.epochs) * seconds for seconds in of_epoch)


def case_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    """A row for each contender, also for those that failed. TRL's rows say how many times as fast ours is."""
    print_progress(f"{case.name}: {case.compared}")
    rows = contender_rows(case.contenders, options)
    ran = [row for row in rows if "failed" not in row]
    mine = next((row for row in ran if row["trainer"] == OURS), None)
    for row in ran:
        row["ours_over_this"] = speed_ratio(mine["rounds"], row["rounds"]) if mine and mine is not row else None
    return [{"bench": "throughput", "case": case.name, "compared": case.compared, **row} for row in rows]


def contender_rows(contenders: list[Contender], options: argparse.Namespace) -> list[Row]:
    peaks = {c.precision: cached_peak(options.device, c.precision, options.size) for c in contenders}
    flops = {c.name: cached_flops(options.model, c.use_lora) for c in contenders}

    def run_one(contender: Contender, timeout_s: float | None) -> Figures:
        spec = run_spec(contender, options.model, prompts(), 1, options.epochs)
        figures = rates(contender, run_in_process(spec, options.device, timeout_s), flops[contender.name])
        print_progress(
            f"  {contender.name}: {figures['images_per_s']:.3f} images/s, {figures['epoch_s']:.1f} s an epoch"
        )
        return figures

    results, failed = take_turns(contenders, run_one, options.rounds, options.budget)
    rows = []
    for contender in contenders:
        row = described(contender, options)
        if contender.name in failed:
            rows.append({**row, "failed": failed[contender.name]})
            continue
        figures = summary(results[contender.name])
        highest, of = peaks[contender.precision]
        share = figures["tflop_per_s"] / highest
        rows.append({**row, **figures, "share_of_peak": share, "peak_tflop_per_s": highest, "peak_of": of})
    return rows


def described(contender: Contender, options: argparse.Namespace) -> Row:
    return {
        "contender": contender.name,
        "trainer": contender.trainer,
        "precision": contender.precision,
        "optional": contender.optional,
        "use_lora": contender.use_lora,
        "settings": contender.settings,
        "model": options.model.name if options.model != BUNDLED else "bundled model",
        "epochs": options.epochs,
    }


# the cases share models and precisions
cached_peak, cached_flops = cache(peak_tflops), cache(flops_of)


COLUMNS = f"{'images/s':>9}{'least..most':>16}{'ours / this (least..most)':>27}{'sample':>8}{'reward':>8}{'train s':>9}"


def print_cases(rows: list[Row]) -> None:
    print(f"{'case':<13}{'contender':<11}{'':<5}{COLUMNS}{'rows/s':>9}{'TFLOP/s':>10}{'of peak':>9}{'peak MB':>9}")
    for r in rows:
        name = f"{r['case']:<13}{r['contender']:<11}{r['precision']:<5}"
        if "failed" in r:
            print(f"{name} FAILED: {r['failed']}")
            continue
        ratio = "" if (found := r["ours_over_this"]) is None else "{median:.2f} ({min:.2f}..{max:.2f})".format(**found)
        print(
            f"{name}{r['images_per_s']:>9.3f}{speed_range(r['rounds']):>16}{ratio:>27}{r['sample_s']:>8.2f}"
            f"{r['reward_s']:>8.2f}{r['train_s']:>9.2f}{r['rows_per_s']:>9.1f}{r['tflop_per_s']:>10.4g}"
            f"{r['share_of_peak']:>9.1%}{r['peak_bytes'] / 1e6:>9.0f}"
        )
    for row in {row["case"]: row for row in rows}.values():
        print(f"{row['case']}: {row['compared']}; {amount_of_work(row)}")


def amount_of_work(row: Row) -> str:
    """What each run did, and how many there were."""
    settings = row["settings"]
    images = settings["sample_batch_size"] * settings["sample_num_batches_per_epoch"]
    steps, rounds = settings["sample_num_steps"], len(row.get("rounds", []))
    return f"{images} images of {steps} steps an epoch, {row['epochs']} measured in each of {rounds} rounds"


def waterfall_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    contenders, shown = waterfall.bars(case, techniques(options.device, case), options.technique)
    rows = contender_rows(contenders, options)
    titles = [{"bench": "waterfall", "case": case.name, "title": technique.title} for technique in shown]
    return waterfall.with_gains([{**title, **row} for title, row in zip(titles, rows, strict=True)])


def profile(options: argparse.Namespace) -> list[Row]:
    contender = options.cases[0].contenders[0]
    spec = run_spec(contender, options.model, prompts(), 1, 1, profiled=True)
    result = run_in_process(spec, options.device)
    epoch_s = result["epochs"][0]["epoch_s"]
    row = {"bench": "profile", "case": options.profile, **described(contender, options), "epoch_s": epoch_s}
    return [{**row, "profile": result["profile"]}]


def print_profile(row: Row) -> None:
    kind = "kernel" if row["profile"][0]["on_device"] else "op"
    steps, total = row["settings"]["sample_num_steps"], row["profile"][-1]["self_s"]
    print(
        f"{row['case']}, {row['device']}: an epoch of {steps} steps in {row['epoch_s']:.2f} s under the profiler, "
        f"{total / row['epoch_s']:.0%} of it in {kind}s"
    )
    print(f"{'share':>7}{'self ms':>11}{'calls':>8}  {kind}")
    for found in row["profile"]:
        print(f"{found['share']:>7.1%}{found['self_s'] * 1e3:>11.2f}{found['calls']:>8}  {found['name'][:100]}")


def show(rows: list[Row], options: argparse.Namespace) -> None:
    """Prints a table and draws a plot for each kind of rows."""
    by_bench = {name: [row for row in rows if row["bench"] == name] for name in {row["bench"]: None for row in rows}}
    if "throughput" in by_bench:
        print_cases(by_bench["throughput"])
    for case in {row["case"]: None for row in by_bench.get("waterfall", [])}:
        found = [row for row in by_bench["waterfall"] if row["case"] == case]
        waterfall.print_bars(found)
        waterfall.draw(found, plot_path(options, f"waterfall-{case}"))
    for row in by_bench.get("profile", []):
        print_profile(row)


def plot_path(options: argparse.Namespace, name: str) -> Path:
    """--plot, or a file beside the records whose name begins with theirs, up to the first dot."""
    file = options.output or options.show[0]
    path = options.plot or file.with_name(f"{file.name.split('.')[0]}-{name}.png")
    print_progress(f"plot: {path}")
    return path


def exit_status(rows: list[Row], earlier: list[Row], options: argparse.Namespace) -> int:
    """Compares with the earlier record: 1 if a contender that is not optional failed, or one is slower than there."""
    lines, slower = compare_with_record.compare(rows, earlier) if options.against else ([], False)
    print("\n".join(lines))
    failed = [row for row in rows if "failed" in row and not row["optional"]]
    return 1 if failed or slower else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as error:
        sys.exit(f"a run failed: {error}")
