"""Predicts DDPO on 1 to 1024 GPUs from what one of them does, and checks the formulas on two processes here.

    python bench/scaling.py [--record FILE.jsonl ... | --rows-per-s SAMPLE TRAIN] [--devices N ...] [--output FILE.png]
    python bench/scaling.py --check [--rounds N] [--output FILE.jsonl]

SD 1.5 at 512x512, plain data parallel (as ours, a message for each tensor) and ZeRO 1 to 3 (not ours, full buckets).
Weak scaling keeps a device's images, strong scaling an epoch's. Each line says which figures are measured: without a
record all are assumed, from data sheets and a share of peak. No communication overlaps with compute (it would be
faster), no device waits for another and small batches lose nothing (it would be slower, strong scaling most of all).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from math import ceil, nan
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import paths
import record
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from timing import Clock
from torch.utils._python_dispatch import TorchDispatchMode

Row = dict[str, Any]
STAGES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
HALF, SINGLE = 2, 4
# fp32 AdamW in one pass: reads weight, gradient and two moments, writes weight, moments and a half-precision copy
OPTIMIZER_BYTES = 4 * SINGLE + 3 * SINGLE + HALF
# of a message: DeepSpeed's stage3_prefetch_bucket_size of 5e7 weights, and engine.py's 2.5e7 gradients
BUCKET_BYTES = HALF * 5e7
# what ZeRO-3 holds whole at a time (a convolution of 2560 to 1280 channels, the next layer); VAE and text encoder
GATHERED_WEIGHTS, OTHER_WEIGHTS = 2 * 29_491_200, 83_653_863 + 123_060_480
RECORDS = paths.ROOT / "bench" / "records"


class Links(NamedTuple):
    """Bytes/s that a device sends inside its node and across nodes, seconds of a hop on either, devices of a node."""

    inside: float
    across: float
    # NCCL's src/graph/tuning.cc, hwLat, Ring, Simple: NVLink and network
    inside_hop: float = 3.4e-6
    across_hop: float = 14e-6
    node: int = 8


# FLOP/s of matmuls in half precision, bytes/s of the memory, links at their full rate
CARDS = {
    # data sheet of the A100 80GB SXM; its NVLink figure counts both directions. DGX A100: 200 Gb/s HDR for each GPU
    "a100": (312e12, 2039e9, Links(600e9 / 2, 200e9 / 8)),
    # of the H100 SXM, but for its 989 TFLOP/s, which its power limit keeps to about 798. DGX H100: 400 Gb/s NDR
    "h100": (798e12, 3350e9, Links(900e9 / 2, 400e9 / 8)),
}


class Model(NamedTuple):
    """Weights of a UNet, those trained, FLOP of a row forward and backward, bytes that it keeps."""

    weights: int
    trained: int
    row_flops: float
    row_bytes: float


FORWARD_FLOPS, DECODE_FLOPS = 803e9, 2515e9
MODELS = {
    "full": Model(859_520_964, 859_520_964, 2407e9, 0.937e9),
    "lora": Model(859_520_964 + 797_184, 797_184, 1714e9, 0.799e9),
}


class Work(NamedTuple):
    """A device's share of an epoch: images, denoising steps, updates, and (image, timestep) pairs of a micro-batch."""

    images: float
    steps: int
    updates: int
    pairs: int

    @property
    def rows(self) -> float:
        """UNet rows of sampling with guidance, and as many again of training."""
        return 2 * self.images * self.steps

    @property
    def micro_batches(self) -> int:
        return ceil(self.images * self.steps / self.updates / self.pairs)


class Rates(NamedTuple):
    """One device: UNet rows/s of sampling with decoding, and of training; seconds of an image's reward that nothing
    hides, and of an optimizer step on all trained weights; which of these are measured."""

    sample: float
    train: float
    reward_s: float
    optimizer_s: float
    origin: str


def collectives(stage: int, model: Model, micro_batches: int) -> list[tuple[int, float, int]]:
    """(times, bytes, messages) of the reduce-scatters and all-gathers of an update; an all-reduce is one of each.

    Gradients are fp32, gathered weights half precision. Stage 0 is engine.py's, in its buckets. From stage 2
    on no device keeps a whole gradient: each micro-batch reduces (DeepSpeed issue 2252). Stage 3 gathers for each pass.
    """
    gradients, trained, weights = SINGLE * model.trained, HALF * model.trained, HALF * model.weights
    if stage == 0:
        return [(2, gradients, ceil(gradients / BUCKET_BYTES))]
    reduced = (1 if stage == 1 else micro_batches, gradients, ceil(gradients / BUCKET_BYTES))
    if stage == 3:
        return [reduced, (2 * micro_batches, weights, ceil(weights / BUCKET_BYTES))]
    return [reduced, (1, trained, ceil(trained / BUCKET_BYTES))]


def sent_bytes(stage: int, model: Model, micro_batches: int, devices: int) -> float:
    """Bytes that each device sends for an update: (n-1)/n of every collective's, by ring or by hierarchy."""
    return (devices - 1) / devices * sum(times * size for times, size, _ in collectives(stage, model, micro_batches))


def collective_s(size: float, messages: int, devices: int, links: Links) -> float:
    """Seconds of a reduce-scatter or all-gather of `size` bytes: a ring in the node, then one across nodes in which
    each device of a node moves its share of the bytes over its own adapter. Each message pays all hops."""
    inside, nodes = min(devices, links.node), ceil(devices / links.node)
    hops = (inside - 1) * links.inside_hop + (nodes - 1) * links.across_hop
    sent = (inside - 1) / inside * size / links.inside + (nodes - 1) / nodes * size / inside / links.across
    return sent + messages * hops


def communication_s(stage: int, model: Model, micro_batches: int, devices: int, links: Links) -> float:
    """Seconds of an update's collectives."""
    return sum(times * collective_s(*one, devices, links) for times, *one in collectives(stage, model, micro_batches))


def epoch_s(stage: int, model: Model, work: Work, rates: Rates, devices: int, links: Links) -> float:
    """Seconds of an epoch. ZeRO-3 gathers its weights once for all of sampling, when nothing else needs the memory."""
    compute = work.rows / rates.sample + work.rows / rates.train + work.images * rates.reward_s
    gather = collective_s(*collectives(3, model, 1)[1][1:], devices, links) if stage == 3 else 0
    optimizer = rates.optimizer_s / (devices if stage else 1)
    exchange = communication_s(stage, model, work.micro_batches, devices, links)
    return compute + gather + work.updates * (exchange + optimizer)


def memory(stage: int, model: Model, rows: int, devices: int) -> dict[str, float]:
    """Bytes of a device in training on so many rows, by part; the allocator's waste and messages come on top."""
    held = min(model.weights, model.weights / devices + GATHERED_WEIGHTS) if stage == 3 else model.weights
    return {
        "weights": HALF * (held + OTHER_WEIGHTS),
        "master": SINGLE * model.trained / (devices if stage >= 1 else 1),
        "gradients": SINGLE * model.trained / (devices if stage >= 2 else 1),
        "states": 2 * SINGLE * model.trained / (devices if stage >= 1 else 1),
        "activations": rows * model.row_bytes,
    }


def predicted(stage: int, model: Model, work: Work, rates: Rates, devices: int, links: Links, epoch_images: int) -> Row:
    """Images/s of all devices and efficiency, memory, communication. Strong scaling, of `epoch_images`, is nan where
    a device would have less than an image for an update."""
    row: Row = {"devices": devices, "stage": stage, "origin": rates.origin}
    for kind in ("weak", "strong"):
        speeds = []
        for number in (1, devices):
            part = work if kind == "weak" else work._replace(images=epoch_images / number)
            splits = part.images >= part.updates
            speeds.append(part.images * number / epoch_s(stage, model, part, rates, number, links) if splits else nan)
        row[kind], row[f"{kind}_efficiency"] = speeds[1], speeds[1] / speeds[0] / devices
    row["memory"] = memory(stage, model, 2 * work.pairs, devices)
    row["gb"] = sum(row["memory"].values()) / 1e9
    row["sent_gb"] = sent_bytes(stage, model, work.micro_batches, devices) / 1e9
    row["communication_s"] = communication_s(stage, model, work.micro_batches, devices, links)
    return row


def recorded_rows_per_s(rows: list[Row], card: str, trained: str) -> tuple[float, float] | None:
    """(sampling, training) UNet rows/s of this project's newest record of the card, in half precision at full size."""
    wanted = {"bench": "throughput", "trainer": "ours", "size": "full", "use_lora": trained == "lora"}
    for row in reversed(rows):
        fits = all(row.get(name) == value for name, value in wanted.items()) and card in row["device"].lower()
        if fits and row["precision"] != "fp32" and row["case"] != "no-guidance" and "sample_rows_per_s" in row:
            return row["sample_rows_per_s"], row["train_rows_per_s"]
    return None


def rates_for(name: str, trained: str, recorded: list[Row], options: argparse.Namespace) -> Rates:
    """From rows/s given by hand or recorded, else at a share of the card's peak; the optimizer at the memory's rate."""
    (flops, memory_rate, _), model = CARDS[name], MODELS[trained]
    usable, sampled = options.utilisation * flops, FORWARD_FLOPS + DECODE_FLOPS / options.steps / 2
    assumed = usable / sampled, usable / model.row_flops
    given, found = options.rows_per_s, recorded_rows_per_s(recorded, name, trained)
    origin = f"rows/s {'given' if given else 'measured'}, rest assumed" if given or found else "assumed"
    return Rates(*(given or found or assumed), options.reward_s, OPTIMIZER_BYTES * model.trained / memory_rate, origin)


def predictions(options: argparse.Namespace) -> list[Row]:
    """A row for each card, kind of training, number of devices and stage (one alone has nothing to split)."""
    recorded = [json.loads(line) for file in options.record for line in file.read_text("utf-8").splitlines()]
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
    print(f"weak: {options.images} images a device; strong: {options.epoch_images} in all, nan if too few for updates")
    print(f"{'weak: img/s':>42}{'strong':>14}{'GB/update':>15}{'s/update':>9}{'GB':>9} =", *rows[0]["memory"])
    for row in rows:
        line = f"{row['card']} {row['trained']} x {row['devices']:<5}{STAGES[row['stage']]:<14}"
        line += f"{row['weak']:>14.2f}{row['weak_efficiency']:>5.0%}"
        line += f"{row['strong']:>9.2f}{row['strong_efficiency']:>5.0%}"
        line += f"{row['sent_gb']:>10.2f}{row['communication_s']:>9.3f}{row['gb']:>9.2f} = "
        parts = " + ".join(f"{size / 1e9:.2f}" for size in row["memory"].values())
        print(f"{line}{parts}  [{row['origin']}]")


def plot(rows: list[Row], path: Path) -> None:
    """A line of panels for each kind of training; colours are stages, line styles cards."""
    titles = {"weak": "images/s, weak scaling", "weak_efficiency": "efficiency, weak scaling"}
    titles |= {"strong_efficiency": "efficiency, strong scaling", "gb": "GB of a device"}
    kinds, cards = (list(dict.fromkeys(row[name] for row in rows)) for name in ("trained", "card"))
    figure = Figure(figsize=(15, 3.6 * len(kinds) + 0.8), layout="constrained")
    panels = figure.subplots(len(kinds), len(titles), squeeze=False).flat
    for axis, (kind, name) in zip(panels, product(kinds, titles), strict=True):
        for card, stage in product(cards, range(4)):
            # one device alone has no stages, and is every stage's first point
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


# The check's settings and what they come to. Nothing is clipped: the trainer may skip pairs that are, and each run
# would do other work. The rate of training includes the optimizer.
CHECKED = {"sample_num_steps": 10, "sample_batch_size": 8, "sample_num_batches_per_epoch": 1, "train_batch_size": 4}
CHECKED |= {"train_micro_batch_size": 4, "train_clip_range": 1.0, "train_learning_rate": 1e-5, "save_freq": 10**9}
WORK = Work(images=8, steps=10, updates=2, pairs=4)


class AllReduces(TorchDispatchMode):
    """Counts the all-reduces of this process and their bytes."""

    calls, bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::allreduce"):
            self.calls += 1
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def worker(folder: Path) -> None:
    """Trains all weights of the bundled model for an epoch at each line of stdin, and answers with figures."""
    from ddpo_fast import DDPOConfig, DDPOTrainer, rewards
    from ddpo_fast.commands.options import RunArguments
    from ddpo_fast.commands.train import make_pipeline
    from ddpo_fast.prompts import load_prompts

    answers, sys.stdout = sys.stdout, sys.stderr
    config = DDPOConfig(**CHECKED, mixed_precision="no", output_dir=str(folder))
    pipeline, reward = make_pipeline(RunArguments(full_finetune=True)), rewards.load_reward("jpeg_compressibility")
    trainer = DDPOTrainer(config, reward, load_prompts("simple_animals"), pipeline)
    figures, reduced, step = {"weights": sum(p.numel() for p in pipeline.unet.parameters())}, AllReduces(), 0
    for epoch, _ in enumerate(sys.stdin):
        # counting takes time, so only in the first epoch, which warms up
        with reduced if epoch == 0 else nullcontext():
            step = trainer.step(epoch, step)
        if trainer.accelerator.is_main_process:
            last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
            figures["parts"] = [last[f"{part}_s"] for part in ("sample", "reward", "train")]
        links = all_reduce_rates() if dist.is_initialized() else {}
        figures |= {"calls": reduced.calls, "bytes": reduced.bytes, **links}
        print(json.dumps(figures), file=answers, flush=True)


def all_reduce_rates() -> dict[str, float]:
    """Of two processes: seconds of a hop, from all-reduces of 1 KiB (gloo does a number alone in fewer steps), and
    bytes/s beyond it, from ones of 4 MiB. Means: on busy CPUs a few take many times as long, in training too."""
    clock, size = Clock("cpu"), 2**22
    calls = [partial(dist.all_reduce, torch.zeros(count)) for count in (256, size // SINGLE)]
    small_s, large_s = (clock.sample(call, 100) / 1e6 for call in calls)
    return {"hop_s": small_s / 2, "bytes_per_s": size / (large_s - small_s)}


def start(folder: Path, variables: dict[str, str]) -> Popen:
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **quiet, **variables}
    command = [sys.executable, __file__, "--worker", str(folder)]
    return Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True)


def epochs_of(workers: list[Popen]) -> list[Row]:
    """Figures of an epoch of each worker, all at the same time."""
    for process in workers:
        print(file=process.stdin, flush=True)
    if not all(answers := [process.stdout.readline() for process in workers]):
        sys.exit("a worker failed, see above")
    return [json.loads(answer) for answer in answers]


def checked(workers: list[Popen]) -> Row:
    """An epoch of a process alone, of two independent ones, of two together; what the former foretell of these, which
    wait for each other and so work at the slower one's rates."""
    alone, beside, (together, _) = epochs_of(workers[:1]), epochs_of(workers[:2]), epochs_of(workers[2:])
    model = Model(together["weights"], together["weights"], 0, 0)
    links = Links(*[together["bytes_per_s"]] * 2, *[together["hop_s"]] * 2)
    row = {**together, "measured_s": sum(together["parts"])}
    for name, runs in (("alone", alone), ("beside", beside)):
        sample_s, reward_s, train_s = map(max, zip(*[run["parts"] for run in runs], strict=True))
        rates = Rates(WORK.rows / sample_s, WORK.rows / train_s, reward_s / WORK.images, 0, "measured")
        row |= {name: [run["parts"] for run in runs], f"from_{name}_s": epoch_s(0, model, WORK, rates, 2, links)}
        row[f"{name}_error"] = row[f"from_{name}_s"] / row["measured_s"] - 1
    row["foretold_bytes"] = WORK.updates * sent_bytes(0, model, WORK.micro_batches, 2)
    return {**row, "communication_s": WORK.updates * communication_s(0, model, WORK.micro_batches, 2, links)}


def check(rounds: int, output: Path | None) -> None:
    """Foretells the real trainer on two processes, in rounds, and appends what was found."""
    facts, rows = {"settings": CHECKED, **record.facts("cpu"), "threads": 1}, []
    output = output or RECORDS / f"scaling-{record.slug(facts['device'])}.jsonl"
    print("s an epoch of two processes; as two that run beside each other foretell it; as one alone does")
    line = "{measured_s:.3f}; {from_beside_s:.3f} ({beside_error:+.1%}); {from_alone_s:.3f} ({alone_error:+.1%})"
    line += "; communication {communication_s:.3f}, {bytes} bytes ({foretold_bytes:.0f} foretold)"
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29519"}
    ranks = [{}, {}, *({"RANK": rank, "LOCAL_RANK": rank, **pair} for rank in "01")]
    with TemporaryDirectory() as temporary:
        workers = [start(Path(temporary, str(number)), variables) for number, variables in enumerate(ranks)]
        try:
            checked(workers)
            for number in range(1, rounds + 1):
                rows.append({"round": number, **checked(workers), **facts})
                print(line.format(**rows[-1]), flush=True)
        finally:
            for process in workers:
                process.kill()
                process.wait()
    record.append(output, rows)
    print("median errors:", *(f"{median(r[k] for r in rows):+.1%}" for k in ("beside_error", "alone_error")), output)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", nargs="+", choices=list(CARDS), default=list(CARDS))
    add("--trained", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--devices", type=int, nargs="+", default=[2**power for power in range(11)], metavar="N")
    add("--record", type=Path, nargs="+", default=[], help="throughput records with measured rows/s")
    add("--rows-per-s", type=float, nargs=2, metavar=("SAMPLE", "TRAIN"), help="of one device")
    add("--utilisation", type=float, default=0.38, help="share of peak without a record (default: MLPerf 4.0's)")
    add("--link-share", type=float, default=0.8, help="share of the links' full rate")
    add("--reward-s", type=float, default=0.0, help="seconds of reward an image that nothing hides")
    add("--images", type=int, default=32, help="of a device and epoch, weak scaling")
    add("--epoch-images", type=int, default=256, help="of an epoch, strong scaling")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--updates", type=int, default=2, help="of an epoch")
    add("--pairs", type=int, default=12, help="(image, timestep) pairs of a micro-batch")
    add("--output", type=Path, help="the plot (default: bench/records/scaling.png), or the records of the check")
    add("--check", action="store_true", help="run the trainer here on one and two processes instead")
    add("--rounds", type=int, default=9, help="of the check")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rows_per_s and (len(options.device) > 1 or len(options.trained) > 1):
        parser.error("--rows-per-s are those of one --device and one --trained: name them")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.worker:
        worker(options.worker)
    elif options.check:
        check(options.rounds, options.output)
    else:
        print_table(rows := predictions(options), options)
        plot(rows, options.output or RECORDS / "scaling.png")


if __name__ == "__main__":
    main()
