"""Our trainer and TRL 0.23.1 on the same work, in turns, every run in a process of its own.

    python bench/throughput.py [--case NAME ...] [--rounds N] [--quick]    a table of speeds and ratios
    python bench/throughput.py --waterfall [--technique NAME ...]          what each of our techniques gains
    python bench/throughput.py --learning [--seeds N]                      reward against wall-clock
    python bench/throughput.py --profile CASE                              where an epoch of ours spends its time
    python bench/throughput.py --show FILE.jsonl ...                       print and draw records again

Each run has one epoch to warm up, which is not counted, before the measured ones. A ratio is that of two runs of the
same round. Rows are those that the algorithm asks for, pairs that are skipped for their zero gradient among them;
TFLOP/s count the matmuls and convolutions of the UNet and the decoder that were done (without those that look which
pairs to skip). Their peak is the best of a few library calls in the same precision, measured first. Reward is the time
that sampling does not hide. Peak memory is the device's, on a CPU the process's. Records are appended as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import against
import learning
import model
import paths
import record
import torch
import waterfall
from rounds import Figures, RunFailed, figures_of, in_turn, ratio, run, say, spec_of, summary
from workloads import OURS, Case, Contender, cases, prompts, techniques

Row = dict[str, Any]
WORKAROUND = "trl: accelerate.PartialState(...) is called first, as TRL 0.23.1 stops at its first log line without it"
PACKAGES = ("trl", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
ONE_ROW = ("bench", "case", "contender", "seed", "device", "model", "size")
# a profile of all of an epoch's steps would not fit into memory; the shares hardly depend on their number
PROFILED_STEPS = 5


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        show(newest([row for file in options.show for row in read(file)]), options)
        return 0
    earlier = read(options.against) if options.against else []
    facts = {**record.facts(options.device), **record.versions(*PACKAGES), "size": options.size}
    options.model = learning.MODEL if options.learning else the_model(options)
    if options.output is None:
        options.output = paths.ROOT / "bench" / "records" / f"throughput-{record.slug(facts['device'])}.jsonl"
    rows = []
    for found in measured(options):
        rows += (done := [{**row, **facts} for row in found])
        record.append(options.output, done)
    show(rows, options)
    say(f"records: {options.output}")
    return finished(rows, earlier, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--waterfall", action="store_true", help="of the first case")
    modes.add_argument("--learning", action="store_true")
    modes.add_argument("--profile", metavar="CASE", help=f"one epoch of {PROFILED_STEPS} denoising steps")
    modes.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="measure nothing")
    add("--case", nargs="+", metavar="NAME", help=f"of {', '.join(cases(device, 'full', None, {}))}; default: all")
    add("--technique", nargs="+", metavar="NAME", help="bars of the waterfall; each has those before it as well")
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--size", choices=["tiny", "full"], default="full")
    add("--quick", action="store_const", const="tiny", dest="size", help="the same as --size tiny")
    add("--rounds", type=int, help="default: 3, or 1 at tiny size")
    add("--epochs", type=int, help="measured in each run (default: 1; of --learning: 10)")
    add("--seeds", type=int, default=3, help="of --learning")
    add("--steps", type=int, help="denoising steps, in place of the cases' 50")
    add("--model", type=Path, help="a pipeline's folder (default: SD 1.5's size on a GPU, the bundled model on a CPU)")
    add("--ours", type=json.loads, default={}, metavar="JSON", help="more settings for our trainer alone")
    add("--budget", type=float, metavar="SECONDS", help="begin no round that would end later than this")
    add("--against", type=Path, metavar="FILE", help="fail if a case got slower than its newest record there")
    add("--output", type=Path, help="default: bench/records/throughput-DEVICE.jsonl")
    add("--plot", type=Path, help="default: beside the records")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.size == "tiny" else 3)
    options.epochs = options.epochs or (10 if options.learning else 1)
    if options.profile and options.size == "full":
        options.steps = options.steps or PROFILED_STEPS
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


def the_model(options: argparse.Namespace) -> Path:
    return (options.model or model.default_model(options.device, options.size)).resolve()


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each contender (and seed), in the order of the first ones; of a bar the last with a gain."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in ONE_ROW)
        if row["bench"] != "waterfall" or row.get("gain") or not kept.get(key, {}).get("gain"):
            kept[key] = row
    return list(kept.values())


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measured(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows to record, as they are finished."""
    if options.profile:
        yield profile(options)
        return
    print(WORKAROUND)
    if options.learning:
        yield learning.measure(options.device, options.size, options.seeds, options.epochs)
        return
    print(f"one epoch warms each run up and is not counted; then {options.epochs} measured")
    if options.waterfall:
        yield waterfall_rows(options.cases[0], options)
        return
    for case in options.cases:
        yield case_rows(case, options)


# the table


def case_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    """A row for each contender, those that failed too; TRL's have how many times as fast ours is."""
    say(f"{case.name}: {case.compared}")
    rows = contender_rows(case.contenders, options)
    ran = [row for row in rows if "failed" not in row]
    mine = next((row for row in ran if row["trainer"] == OURS), None)
    for row in ran:
        row["ours_over_this"] = ratio(mine["rounds"], row["rounds"]) if mine and mine is not row else None
    return [{"bench": "throughput", "case": case.name, "compared": case.compared, **row} for row in rows]


def contender_rows(contenders: list[Contender], options: argparse.Namespace) -> list[Row]:
    peaks = {c.precision: peak(options.device, c.precision, options.size) for c in contenders}
    flops = {c.name: flops_of(options.model, c.use_lora) for c in contenders}

    def run_one(contender: Contender, patience_s: float | None) -> Figures:
        spec = spec_of(contender, options.model, prompts(learning=False), 1, options.epochs)
        figures = figures_of(contender, run(spec, options.device, patience_s), flops[contender.name])
        say(f"  {contender.name}: {figures['images_per_s']:.3f} images/s, {figures['epoch_s']:.1f} s an epoch")
        return figures

    results, failed = in_turn(contenders, run_one, options.rounds, options.budget)
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
        "model": options.model.name if options.model != model.BUNDLED else "bundled model",
        "epochs": options.epochs,
    }


peak = cache(model.peak_tflops)
flops_of = cache(model.flops_of)


COLUMNS = f"{'images/s':>9}{'least..most':>16}{'ours / this (least..most)':>27}{'sample':>8}{'reward':>8}{'train s':>9}"


def print_cases(rows: list[Row]) -> None:
    print(f"{'case':<13}{'contender':<11}{'':<5}{COLUMNS}{'rows/s':>9}{'TFLOP/s':>10}{'of peak':>9}{'peak MB':>9}")
    for r in rows:
        name = f"{r['case']:<13}{r['contender']:<11}{r['precision']:<5}"
        if "failed" in r:
            print(f"{name} FAILED: {r['failed']}")
            continue
        span = f"{r['images_per_s_min']:.3f}..{r['images_per_s_max']:.3f}"
        print(
            f"{name}{r['images_per_s']:>9.3f}{span:>16}{times(r['ours_over_this']):>27}{r['sample_s']:>8.2f}"
            f"{r['reward_s']:>8.2f}{r['train_s']:>9.2f}{r['rows_per_s']:>9.1f}{r['tflop_per_s']:>10.4g}"
            f"{r['share_of_peak']:>9.1%}{r['peak_bytes'] / 1e6:>9.0f}"
        )
    for row in {row["case"]: row for row in rows}.values():
        print(f"{row['case']}: {row['compared']}; {amount(row)}")


def amount(row: Row) -> str:
    """How much one run of a row did, and how many there were."""
    settings = row["settings"]
    images = settings["sample_batch_size"] * settings["sample_num_batches_per_epoch"]
    steps, rounds = settings["sample_num_steps"], len(row.get("rounds", []))
    return f"{images} images of {steps} steps an epoch, {row['epochs']} measured in each of {rounds} rounds"


def times(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f} ({found['min']:.2f}..{found['max']:.2f})"


# the other modes


def waterfall_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    contenders, shown = waterfall.bars(case, techniques(options.device, case), options.technique)
    rows = contender_rows(contenders, options)
    titles = [{"bench": "waterfall", "case": case.name, "title": technique.title} for technique in shown]
    return waterfall.with_gains([{**title, **row} for title, row in zip(titles, rows, strict=True)])


def profile(options: argparse.Namespace) -> list[Row]:
    contender = options.cases[0].contenders[0]
    spec = spec_of(contender, options.model, prompts(learning=False), 1, 1, profiled=True)
    result = run(spec, options.device)
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
    """Tables and plots of what the rows hold."""
    by_bench = {name: [row for row in rows if row["bench"] == name] for name in {row["bench"]: None for row in rows}}
    if "throughput" in by_bench:
        print_cases(by_bench["throughput"])
    for case in {row["case"]: None for row in by_bench.get("waterfall", [])}:
        found = [row for row in by_bench["waterfall"] if row["case"] == case]
        waterfall.print_bars(found)
        waterfall.draw(found, plot_path(options, f"waterfall-{case}"))
    if found := by_bench.get("learning"):
        compared = learning.comparisons(found)
        learning.print_comparisons(compared)
        learning.draw(found, compared, plot_path(options, "learning"))
    for row in by_bench.get("profile", []):
        print_profile(row)


def plot_path(options: argparse.Namespace, name: str) -> Path:
    """`--plot`, or beside the records under their name up to its first dot."""
    records = options.output or options.show[0]
    path = options.plot or records.with_name(f"{records.name.split('.')[0]}-{name}.png")
    say(f"plot: {path}")
    return path


def finished(rows: list[Row], earlier: list[Row], options: argparse.Namespace) -> int:
    """The exit status: 1 if a contender failed that must not, or one got slower than its record."""
    lines, slower = against.compare(rows, earlier) if options.against else ([], False)
    print("\n".join(lines))
    failed = [row for row in rows if "failed" in row and not row["optional"]]
    return 1 if failed or slower else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as error:
        sys.exit(f"a run failed: {error}")
