"""Predicts DDPO's speed and memory on 1 to 1024 GPUs from one GPU's speed, or checks the prediction on two processes.

    python bench/scaling.py [--record FILE.jsonl ... | --rows-per-s SAMPLE TRAIN] [--devices N ...] [--output FILE.png]
    python bench/scaling.py --check [--rounds N] [--output FILE.jsonl]

The model is Stable Diffusion 1.5 at 512x512, trained with plain data parallelism, as this project does it, and with
ZeRO 1 to 3. Weak scaling keeps the number of images per GPU constant, strong scaling the number per epoch.

Each line says which figures are measured. Without a record all are assumed: what `traffic.py` has counted of a UNet row
takes its least time at a share of the data sheets' rates, which is the same as there for an H100.
The formulas assume that no communication overlaps with compute (in reality some does, which is faster), that no GPU
waits for another, and that small batches lose no speed (in reality they do, most of all in strong scaling). --check
needs no GPU.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from lib import RECORDS, records
from lib.command_line import new_parser
from lib.scaling_check import check
from lib.scaling_model import (
    CARDS,
    DECODE_FLOPS,
    MODELS,
    OPTIMIZER_BYTES,
    STAGES,
    Rates,
    Row,
    Work,
    least_s,
    predicted,
)
from matplotlib.figure import Figure


def recorded_rows_per_s(rows: list[Row], card: str, trained: str) -> tuple[float, float] | None:
    """(sampling, training) UNet rows/s of our trainer's newest record on the card, in half precision at full size."""
    wanted = {"bench": "throughput", "trainer": "ours", "size": "full", "use_lora": trained == "lora"}
    for row in reversed(rows):
        fits = all(row.get(name) == value for name, value in wanted.items()) and card in row["device"].lower()
        if fits and row["precision"] != "fp32" and row["case"] != "no-guidance" and "sample_rows_per_s" in row:
            return row["sample_rows_per_s"], row["train_rows_per_s"]
    return None


def rates_for(name: str, trained: str, recorded: list[Row], options: argparse.Namespace) -> Rates:
    """Rows/s as given or recorded, else from the counts of a row; the optimizer at the memory's full bandwidth."""
    (flops, memory_rate, _), model = CARDS[name], MODELS[trained]
    usable = options.utilisation * flops, options.memory_share * memory_rate
    decoding = DECODE_FLOPS / usable[0] / (2 * options.steps)
    assumed = 1 / (least_s(model.sampling, *usable) + decoding), 1 / least_s(model.training, *usable)
    given, found = options.rows_per_s, recorded_rows_per_s(recorded, name, trained)
    origin = f"rows/s {'given' if given else 'measured'}, rest assumed" if given or found else "assumed"
    return Rates(*(given or found or assumed), options.reward_s, OPTIMIZER_BYTES * model.trained / memory_rate, origin)


def predictions(options: argparse.Namespace) -> list[Row]:
    """A row for each card, kind of training, number of devices and stage. One device alone has a single row."""
    recorded = records.read(options.record)
    work, rows = Work(options.images, options.steps, options.updates, options.pairs), []
    for name, trained, devices in product(options.device, options.trained, options.devices):
        links, usable = CARDS[name][2], options.link_share
        links = links._replace(inside=usable * links.inside, across=usable * links.across)
        rates = rates_for(name, trained, recorded, options)
        for stage in range(4 if devices > 1 else 1):
            row = predicted(stage, MODELS[trained], work, rates, devices, links, options.epoch_images)
            rows.append({"card": name, "trained": trained, **row})
    return rows


def print_table(rows: list[Row], options: argparse.Namespace) -> None:
    """The last columns are the memory of a device and the parts that it is the sum of."""
    print(f"weak scaling: {options.images} images on each device")
    print(f"strong scaling: {options.epoch_images} images in all; nan where a device has less than one for an update")
    print(f"{'weak: img/s':>42}{'strong':>14}{'GB/update':>15}{'s/update':>9}{'GB':>9} =", *rows[0]["memory"])
    for row in rows:
        line = f"{row['card']} {row['trained']} x {row['devices']:<5}{STAGES[row['stage']]:<14}"
        line += f"{row['weak']:>14.2f}{row['weak_efficiency']:>5.0%}"
        line += f"{row['strong']:>9.2f}{row['strong_efficiency']:>5.0%}"
        line += f"{row['sent_gb']:>10.2f}{row['communication_s']:>9.3f}{row['gb']:>9.2f} = "
        parts = " + ".join(f"{size / 1e9:.2f}" for size in row["memory"].values())
        print(f"{line}{parts}  [{row['origin']}]")


def plot(rows: list[Row], path: Path) -> None:
    """A row of panels for each kind of training. Colours stand for stages, line styles for cards."""
    titles = {"weak": "images/s, weak scaling", "weak_efficiency": "efficiency, weak scaling"}
    titles |= {"strong_efficiency": "efficiency, strong scaling", "gb": "GB of a device"}
    kinds, cards = (list(dict.fromkeys(row[name] for row in rows)) for name in ("trained", "card"))
    figure = Figure(figsize=(15, 3.6 * len(kinds) + 0.8), layout="constrained")
    panels = figure.subplots(len(kinds), len(titles), squeeze=False).flat
    for axis, (kind, name) in zip(panels, product(kinds, titles), strict=True):
        for card, stage in product(cards, range(4)):
            # a single device has no stages, and is the first point of every stage's curve
            of = [r for r in rows if (r["card"], r["trained"]) == (card, kind)]
            of = [r for r in of if r["stage"] == stage or r["devices"] == 1]
            style = {"linestyle": "-" if card == cards[0] else "--", "color": f"C{stage}", "marker": "."}
            axis.plot([r["devices"] for r in of], [r[name] for r in of], **style, label=f"{card}, {STAGES[stage]}")
        axis.set(title=f"{kind}: {titles[name]}", xlabel="devices")
        axis.set_xscale("log", base=2)
        axis.set(yscale="log") if name == "weak" else axis.set(ylim=(0, 1.04 * axis.get_ylim()[1]))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    origins = dict.fromkeys("{card} {trained}: {origin}".format(**row) for row in rows)
    figure.suptitle(f"predicted ({'; '.join(origins)})", fontsize=9)
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--device", nargs="+", choices=list(CARDS), default=list(CARDS))
    add("--trained", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--devices", type=int, nargs="+", default=[2**power for power in range(11)], metavar="N")
    add("--record", type=Path, nargs="+", default=[], help="records of throughput.py, which have measured rows/s")
    add("--rows-per-s", type=float, nargs=2, metavar=("SAMPLE", "TRAIN"), help="UNet rows/s of one device")
    add("--utilisation", type=float, default=0.69, help="share of the peak FLOP/s that products reach")
    add("--memory-share", type=float, default=0.84, help="share of the memory's full rate that other kernels reach")
    add("--link-share", type=float, default=0.8, help="share of the links' full rate that messages reach")
    add("--reward-s", type=float, default=0.0, help="seconds of an image's reward that do not overlap with sampling")
    add("--images", type=int, default=32, help="images of a device in an epoch, for weak scaling")
    add("--epoch-images", type=int, default=256, help="images of an epoch, for strong scaling")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--updates", type=int, default=2, help="updates of an epoch")
    add("--pairs", type=int, default=12, help="(image, timestep) pairs of a micro-batch")
    add("--output", type=Path, help="the plot (default: bench/records/scaling.png), or with --check the records")
    add("--check", action="store_true", help="train here on one and on two processes and compare")
    add("--rounds", type=int, default=9, help="rounds of the check")
    options = parser.parse_args(arguments)
    if options.rows_per_s and (len(options.device) > 1 or len(options.trained) > 1):
        parser.error("--rows-per-s is the speed of one --device in one kind of training: name it, and --trained")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.check:
        check(options.rounds, options.output)
    else:
        print_table(rows := predictions(options), options)
        plot(rows, options.output or RECORDS / "scaling.png")


if __name__ == "__main__":
    main()
