"""Formulas for DDPO on several GPUs: seconds of an epoch, bytes that are sent, and memory, from one GPU's speed.

They cover plain data parallelism, as ours does it, and ZeRO's stages 1 to 3. No communication overlaps with compute
(in reality some does, which is faster), and no device waits for a slower one, nor do small batches lose speed (which
is slower in reality, most of all in strong scaling).
"""

from __future__ import annotations

from math import ceil, nan
from typing import NamedTuple

from lib import RECORDS, records
from lib.records import Row

STAGES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
# bytes of a number in half and in single precision
HALF, SINGLE = 2, 4
# of a weight, moved by fp32 AdamW in one pass: it reads the weight, the gradient and two moments, and writes the
# weight, the moments and a half-precision copy
OPTIMIZER_BYTES = 4 * SINGLE + 3 * SINGLE + HALF
# Bytes of a message: DeepSpeed's stage3_prefetch_bucket_size is 5e7 weights in half precision, and this project's
# engine sends 2.5e7 fp32 gradients, which is as many bytes.
BUCKET_BYTES = HALF * 5e7
# Weights that ZeRO-3 holds in full at a time (the largest convolution, of 2560 to 1280 channels, and the next layer,
# which is gathered meanwhile), and those of the VAE and the text encoder, which every GPU holds.
GATHERED_WEIGHTS, OTHER_WEIGHTS = 2 * 29_491_200, 83_653_863 + 123_060_480


class Links(NamedTuple):
    """Bytes/s that a device sends inside its node and across nodes, seconds of a hop on either, devices of a node."""

    inside: float
    across: float
    # latencies of NCCL's model (src/graph/tuning.cc: hwLat, ring, Simple protocol) for NVLink and for the network
    inside_hop: float = 3.4e-6
    across_hop: float = 14e-6
    node: int = 8


# FLOP/s of matmuls in half precision, bytes/s of the GPU's memory, and its links at their full rate
CARDS = {
    # The data sheet of the A100 80GB SXM, whose NVLink figure counts both directions. A DGX A100 has an HDR InfiniBand
    # adapter of 200 Gb/s for each GPU.
    "a100": (312e12, 2039e9, Links(600e9 / 2, 200e9 / 8)),
    # The data sheet of the H100 SXM, except for its 989 TFLOP/s: the power limit allows about 798. A DGX H100 has NDR
    # InfiniBand of 400 Gb/s for each GPU.
    "h100": (798e12, 3350e9, Links(900e9 / 2, 400e9 / 8)),
}


# FLOPs, and bytes read and written, of a UNet row in each kind of launch
Counts = tuple[tuple[float, float], ...]


class Model(NamedTuple):
    """Numbers of all weights and of the trained ones; what a UNet row keeps for its backward pass, in bytes, and takes
    in sampling and in training."""

    weights: int
    trained: int
    row_bytes: float
    sampling: Counts = ()
    training: Counts = ()


def counted(weights: int, trained: int, kind: str) -> Model:
    """Stable Diffusion 1.5 at 512x512 with fused layers, as `traffic.py` has counted it in fp16."""
    wanted = {"network": "sd1.5", "variant": "fused", "trained": kind}
    found = [row for row in records.read([RECORDS / "traffic.jsonl"]) if wanted.items() <= row.items()]
    passes = {row["phase"]: row for row in found}
    sampling, training = (
        sum((_counts(passes[phase]) for phase in phases), ()) for phases in (["sampling"], ["forward", "backward"])
    )
    return Model(weights, trained, passes["forward"]["saved_bytes"], sampling, training)


def _counts(row: Row) -> Counts:
    """Those of a pass, and the bytes of launches that are limited by them while others of their kind are not.

    A record has the sums of each kind, and the least time of all launches one by one at rates that it names: the
    difference is the time of these bytes, such as those of products with an adapter's few columns.
    """
    counts = tuple((of["flops"], of["read"] + of["written"]) for of in row["kinds"].values())
    bytes_per_s = row["tb_per_s"] * 1e12
    return (*counts, (0.0, (row["least_s"] - least_s(counts, row["tflops"] * 1e12, bytes_per_s)) * bytes_per_s))


def least_s(counts: Counts, flops_per_s: float, bytes_per_s: float) -> float:
    """The sum over kinds of launches of the longer time, of their FLOPs and of their bytes."""
    return sum(max(flops / flops_per_s, size / bytes_per_s) for flops, size in counts)


UNET_WEIGHTS, LORA_WEIGHTS = 859_520_964, 797_184
MODELS = {
    "full": counted(UNET_WEIGHTS, UNET_WEIGHTS, "all weights"),
    "lora": counted(UNET_WEIGHTS + LORA_WEIGHTS, LORA_WEIGHTS, "lora"),
}
# of decoding an image at 512x512
DECODE_FLOPS = 2515e9


class Work(NamedTuple):
    """A device's part of an epoch: images, denoising steps, updates, and (image, timestep) pairs of a micro-batch."""

    images: float
    steps: int
    updates: int
    pairs: int

    @property
    def rows(self) -> float:
        """UNet rows of sampling with guidance. Training has as many."""
        return 2 * self.images * self.steps

    @property
    def micro_batches(self) -> int:
        """Of an update."""
        return ceil(self.images * self.steps / self.updates / self.pairs)


class Rates(NamedTuple):
    """A device's UNet rows/s in sampling, decoding included, and in training; seconds of an image's reward that do not
    overlap with sampling, and of an optimizer step on all trained weights; a note on which of these are measured."""

    sample: float
    train: float
    reward_s: float
    optimizer_s: float
    origin: str


def collectives(stage: int, model: Model, micro_batches: int) -> list[tuple[int, float, int]]:
    """(times, bytes, messages) of an update's reduce-scatters and all-gathers; an all-reduce counts as one of each.

    Gradients are fp32, gathered weights half precision. Stage 0 is plain data parallelism, in this project's buckets.
    From stage 2 on no device keeps all gradients, so each micro-batch is reduced (DeepSpeed issue 2252). Stage 3
    gathers the weights for each forward and each backward pass.
    """
    gradients, trained, weights = SINGLE * model.trained, HALF * model.trained, HALF * model.weights
    if stage == 0:
        return [(2, gradients, ceil(gradients / BUCKET_BYTES))]
    reduced = (1 if stage == 1 else micro_batches, gradients, ceil(gradients / BUCKET_BYTES))
    if stage == 3:
        return [reduced, (2 * micro_batches, weights, ceil(weights / BUCKET_BYTES))]
    return [reduced, (1, trained, ceil(trained / BUCKET_BYTES))]


def sent_bytes(stage: int, model: Model, micro_batches: int, devices: int) -> float:
    """Bytes that each of n devices sends for an update: (n-1)/n of every collective's, by a ring or by a hierarchy."""
    return (devices - 1) / devices * sum(times * size for times, size, _ in collectives(stage, model, micro_batches))


def collective_s(size: float, messages: int, devices: int, links: Links) -> float:
    """Seconds of a reduce-scatter or all-gather of `size` bytes: a ring inside each node, then one across nodes, in
    which each device of a node sends its share of the bytes over its own adapter. Each message takes all hops."""
    inside, nodes = min(devices, links.node), ceil(devices / links.node)
    hops = (inside - 1) * links.inside_hop + (nodes - 1) * links.across_hop
    sent = (inside - 1) / inside * size / links.inside + (nodes - 1) / nodes * size / inside / links.across
    return sent + messages * hops


def communication_s(stage: int, model: Model, micro_batches: int, devices: int, links: Links) -> float:
    """Seconds of an update's collectives."""
    return sum(times * collective_s(*one, devices, links) for times, *one in collectives(stage, model, micro_batches))


def epoch_s(stage: int, model: Model, work: Work, rates: Rates, devices: int, links: Links) -> float:
    """Seconds of an epoch. ZeRO-3 gathers its weights once for all of sampling, when there is memory for them."""
    compute = work.rows / rates.sample + work.rows / rates.train + work.images * rates.reward_s
    gather = collective_s(*collectives(3, model, 1)[1][1:], devices, links) if stage == 3 else 0
    optimizer = rates.optimizer_s / (devices if stage else 1)
    exchange = communication_s(stage, model, work.micro_batches, devices, links)
    return compute + gather + work.updates * (exchange + optimizer)


def memory(stage: int, model: Model, rows: int, devices: int) -> dict[str, float]:
    """Bytes of a device while it trains on so many rows, by part, without fragmentation and message buffers."""
    held = min(model.weights, model.weights / devices + GATHERED_WEIGHTS) if stage == 3 else model.weights
    return {
        "weights": HALF * (held + OTHER_WEIGHTS),
        "master": SINGLE * model.trained / (devices if stage >= 1 else 1),
        "gradients": SINGLE * model.trained / (devices if stage >= 2 else 1),
        "states": 2 * SINGLE * model.trained / (devices if stage >= 1 else 1),
        "activations": rows * model.row_bytes,
    }


def predicted(stage: int, model: Model, work: Work, rates: Rates, devices: int, links: Links, epoch_images: int) -> Row:
    """Images/s of all devices together, efficiency, memory and communication.

    Weak scaling keeps the images of a device, strong scaling those of an epoch (`epoch_images`). Strong scaling is nan
    where a device would have less than one image for an update.
    """
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
