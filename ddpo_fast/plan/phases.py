"""Predicts a run's memory by part and phase.

GB are 10^9 bytes. P trained weights of h bytes in the compute precision, N processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddpo_fast.batch_sizes import MOST_ROWS, batches_to_merge, equal_parts
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import CUDA_CONTEXT, GB
from ddpo_fast.engine import buckets
from ddpo_fast.plan.footprint import Footprint

# Not measured yet on a GPU: workspaces of cuBLAS and cuDNN, inside PyTorch's allocator. cuDNN makes do with less where
# there is no more.
CUDA_WORKSPACES = 300_000_000
# images that `ddpo-fast train` draws before and after, all at once
SHOWN_IMAGES = 8
SINGLE = 4
BLOCK_8BIT = 256
# of a weight that is rounded stochastically: the dice, and the rounded weight in both precisions
ROUNDING = 2 * SINGLE + 2

Bytes = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Bytes on the GPU by phase and part, and in host memory by part."""

    phases: dict[str, Bytes]
    host: Bytes

    @property
    def totals(self) -> Bytes:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.totals[self.peak_phase]

    @property
    def allocated(self) -> int:
        """Bytes at the peak that PyTorch's allocator counts (`torch.cuda.max_memory_allocated`), workspaces aside."""
        outside = ("CUDA context", "workspaces")
        return max(sum(n for part, n in parts.items() if part not in outside) for parts in self.phases.values())

    def table(self) -> str:
        """GB by part (a row each) and phase (a column each)."""
        # the last phases have the most parts
        names = list(dict.fromkeys(part for parts in reversed(self.phases.values()) for part in parts))
        rows = [["GB", *self.phases]]
        rows += [[name, *(_gb(parts.get(name, 0)) for parts in self.phases.values())] for name in names]
        rows.append(["total", *(_gb(total, least=0) for total in self.totals.values())])
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(line))
            for line in (list(zip(row, wide, strict=True)) for row in rows)
        ]
        lines.append(f"peak: {self.peak / GB:.2f} GB, while {self.peak_phase}")
        if self.host:
            held = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.host.items())
            lines.append(f"host memory: {sum(self.host.values()) / GB:.2f} GB ({held})")
        return "\n".join(lines)


def _gb(size: int, least: int = 5_000_000) -> str:
    return f"{size / GB:.2f}" if size >= least else "-" if size == 0 else "<0.01"


def predict(footprint: Footprint, config: DDPOConfig, num_processes: int = 1, shown_images: int = SHOWN_IMAGES) -> Plan:
    """The plan of a config, for any epoch but the first, which has less.

    Args:
        footprint: of the model, in the config's precision.
        num_processes: N, each with a GPU of its own.
        shown_images: drawn at once besides training, as `ddpo-fast train` does; 0 for a trainer on its own.

    A reward's own networks are not in it.
    """
    always, host = _weights(footprint, config, num_processes)
    gradients = {"gradients": _gradient_bytes(footprint, config)}
    # between updates there are none, unless recorded graphs add to them
    idle_gradients = gradients if config.cuda_graphs else {}
    last_gradients = {} if config.optimizer_in_backward else gradients
    vae, text = (h(footprint) * n for n in (footprint.vae_weights, footprint.text_weights))
    away = config.offload_frozen
    frozen = {} if away else {"VAE": vae, "text encoder": text}
    if away:
        host = {**host, "VAE and text encoder": vae + text}
    images = config.sample_batch_size * config.sample_num_batches_per_epoch
    # an epoch's images stay until it has been trained on
    drawn = {"trajectories, images": _rollout_bytes(footprint, config) + images * h(footprint) * footprint.pixels}
    together = rows_per_image(config) * merged_batches_of(config) * config.sample_batch_size
    always["cached embeddings"] = footprint.cached_bytes(together)
    at_work = _at_work(footprint, config, num_processes, shown_images)
    if config.cuda_graphs:
        # they keep what they write to, and a last micro-batch of fewer pairs runs beside them
        always["recorded graphs"] = at_work["sampling"] + at_work["training"]
    held: dict[str, Bytes] = {
        "encoding": {**frozen, "text encoder": text, **idle_gradients},
        "sampling": {**frozen, **idle_gradients, **drawn},
        "decoding": {**frozen, "VAE": vae, **idle_gradients, **drawn},
        "training": {**frozen, **gradients, **drawn},
        "updating": {**frozen, **last_gradients, **drawn},
    }
    outside = {"workspaces": CUDA_WORKSPACES, "CUDA context": CUDA_CONTEXT} if footprint.device_type == "cuda" else {}
    phases = {
        name: {**always, **parts, "activations, buffers": at_work[name], **outside} for name, parts in held.items()
    }
    if footprint.device_type == "cuda":
        # the UNet comes in fp32 and is made smaller where it lies
        phases = {"loading": {"UNet": SINGLE * footprint.unet_weights, **frozen, **outside}, **phases}
    return Plan(phases, host)


def _at_work(footprint: Footprint, config: DDPOConfig, num_processes: int, shown_images: int) -> Bytes:
    """What each phase makes for a while."""
    merged = merged_batches_of(config)
    sampled = rows_per_image(config) * max(merged * config.sample_batch_size, shown_images)
    return {
        "encoding": footprint.encoding,
        # the latents of batches drawn together are stacked when they are done
        "sampling": max(footprint.sampling.peak(sampled), _rollout_bytes(footprint, config, merged)),
        "decoding": decode_bytes(footprint, config, max(config.sample_batch_size, shown_images)),
        "training": _training_bytes(footprint, config, pairs_of(config)),
        "updating": _update_bytes(footprint, config, num_processes),
    }


def h(footprint: Footprint) -> int:
    """Bytes of a value in the compute precision."""
    return footprint.dtype.itemsize


def rows_per_image(config: DDPOConfig) -> int:
    """Of the UNet, while sampling."""
    return 2 if config.sample_guidance_scale > 1 else 1


def pairs_of(config: DDPOConfig) -> int:
    """(image, timestep) pairs of a UNet call: the setting, or the most that the trainer would choose."""
    if config.train_micro_batch_size is not None:
        return min(config.train_micro_batch_size, config.pairs_per_update)
    return equal_parts(config.pairs_per_update, MOST_ROWS // (2 if config.guides_training else 1))


def merged_batches_of(config: DDPOConfig) -> int:
    """Sampling batches that are drawn together: the setting, or as many as the trainer would choose."""
    rows = rows_per_image(config)
    merged = config.sample_merge_batches or batches_to_merge(config.sample_batch_size, rows, 10**9)
    return min(merged, config.sample_num_batches_per_epoch)


def _weights(footprint: Footprint, config: DDPOConfig, num_processes: int) -> tuple[Bytes, Bytes]:
    """(on the GPU, in host memory): what is there all the time, but for the VAE and the text encoder."""
    trained, size = footprint.trained_weights, h(footprint)
    # ZeRO splits states and fp32 weights from stage 1, weights at stage 3
    split = num_processes if config.zero else 1
    away = config.offload != "none"
    unet = size * footprint.unet_weights
    if config.zero == 3:
        gathered = 2 * size * footprint.largest_block
        unet = gathered + (0 if config.offload == "all" else unet // num_processes)
    # the host has its own weights in any precision
    has_masters = (size < SINGLE and not config.stochastic_rounding) or (away and not config.zero)
    masters = SINGLE * trained // split if has_masters else 0
    states = state_bytes(footprint.trained_sizes, config) // split
    ema = SINGLE * trained if config.ema_decay > 0 else 0
    gpu: Bytes = {"UNet": unet}
    host: Bytes = {}
    for name, part, is_away in (
        ("fp32 weights", masters, away),
        ("optimizer states", states, away),
        ("moving average", ema, away or config.ema_device == "cpu"),
    ):
        if part:
            (host if is_away else gpu)[name] = part
    if away and config.zero:
        # DeepSpeed keeps an fp32 copy of its share there
        host["gradients"] = SINGLE * trained // split
    elif away:
        host["pinned buffers"] = _staged(footprint) * (_gradient_size(config, size) + size)
        if not config.train_use_8bit_adam:
            host["fp32 gradients"] = _fp32_gradient_bytes(footprint, config)
    if config.zero == 3 and config.offload == "all":
        host["UNet"] = size * footprint.unet_weights // num_processes
    return gpu, host


def state_bytes(sizes: Sequence[int], config: DDPOConfig) -> int:
    """Adam's two moments of tensors of so many elements: fp32, or 8 bits with an fp32 scale each 256 of them."""
    if not config.train_use_8bit_adam:
        return 2 * SINGLE * sum(sizes)
    small = sum(n for n in sizes if n < config.train_min_8bit_size)
    large = sum(sizes) - small
    return 2 * SINGLE * small + 2 * large + 2 * SINGLE * large // BLOCK_8BIT


def _gradient_size(config: DDPOConfig, size: int) -> int:
    return SINGLE if config.train_gradient_dtype == "fp32" else size


def _gradient_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """Of an update, whole on each GPU until it is complete."""
    each = _gradient_size(config, h(footprint))
    return each * (max(footprint.trained_sizes) if config.optimizer_in_backward else footprint.trained_weights)


def _buckets(footprint: Footprint) -> list[int]:
    """Weights that are moved, or updated by one call of the optimizer, together."""
    sizes = footprint.trained_sizes
    return [sum(sizes[i] for i in bucket) for bucket in buckets(sizes)]


def _staged(footprint: Footprint) -> int:
    """Weights of a bucket in either of two buffers, which take turns."""
    found = _buckets(footprint)
    return max(found[::2]) + max(found[1::2], default=0)


def _update_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """What is made for a while after the last backward pass. A fused AdamW alone, on fp32 gradients, makes nothing."""
    bucket, gradient = max(_buckets(footprint)), _gradient_size(config, h(footprint))
    in_buckets = gradient < SINGLE or config.stochastic_rounding or config.train_use_8bit_adam
    made = 0
    if config.zero:
        away = config.offload != "none"
        made = bucket * (gradient + h(footprint) if away else SINGLE if gradient < SINGLE else 0)
    elif in_buckets and config.offload == "none" and not config.optimizer_in_backward:
        made = _step_bytes(footprint, config)
    # a message has a bucket's gradients
    return max(made, bucket * gradient if num_processes > 1 else 0)


def _step_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """Of a call of the optimizer in `step_in_buckets`."""
    made = _fp32_gradient_bytes(footprint, config)
    if config.stochastic_rounding:
        # the weights in fp32, which are rounded one by one
        made += SINGLE * _stepped(footprint, config) + ROUNDING * max(footprint.trained_sizes)
    return made


def _stepped(footprint: Footprint, config: DDPOConfig) -> int:
    """Weights that a call of the optimizer updates, where that is not all."""
    return max(footprint.trained_sizes if config.optimizer_in_backward else _buckets(footprint))


def _fp32_gradient_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """Of gradients times what clips and unscales them; half-precision ones are widened before, one by one."""
    half = _gradient_size(config, h(footprint)) < SINGLE
    return SINGLE * (_stepped(footprint, config) + (max(footprint.trained_sizes) if half else 0))


def _rollout_bytes(footprint: Footprint, config: DDPOConfig, batches: int | None = None) -> int:
    """Latents in fp32, log-probs, timesteps, token ids and embeddings of sampling batches (None: of an epoch's)."""
    channels, height, width = footprint.latent_shape
    tokens, embedding = footprint.embedding_shape
    steps = config.sample_num_steps
    latents = SINGLE * (steps + 1) * channels * height * width
    # the negative prompt's embedding is repeated when trajectories are joined
    each = latents + 12 * steps + tokens * (8 + 2 * embedding * h(footprint))
    return each * config.sample_batch_size * (batches or config.sample_num_batches_per_epoch)


def decode_bytes(footprint: Footprint, config: DDPOConfig, images: int) -> int:
    """The decoding of a batch, a few images at a time, into one tensor that is then brought into [0, 1]."""
    at_once = 1 if config.vae_slicing else min(images, footprint.decoded_at_once)
    pixels = h(footprint) * footprint.pixels
    # with slices or parts: those that are done, or all of them joined, clamped and stacked
    return max(footprint.decoding(config.vae_tiling).peak(at_once) + (images - at_once) * pixels, 3 * images * pixels)


def _training_bytes(footprint: Footprint, config: DDPOConfig, pairs: int) -> int:
    """A micro-batch with the training batches that it is picked from."""
    channels, height, width = footprint.latent_shape
    tokens, embedding = footprint.embedding_shape
    latents = SINGLE * channels * height * width
    rows = pairs * (2 if config.guides_training else 1)
    update = config.train_batch_size * config.train_gradient_accumulation_steps
    batches = update * 2 * (config.sample_num_steps * latents + tokens * embedding * h(footprint))
    picked = pairs * 2 * (latents + tokens * embedding * h(footprint))
    # the largest weight may be updated when the activations are at their peak: at most so much
    within = _step_bytes(footprint, config) if config.optimizer_in_backward else 0
    return _micro_batch_bytes(footprint, config, rows, pairs >= config.pairs_per_update) + within + batches + picked


def _micro_batch_bytes(footprint: Footprint, config: DDPOConfig, rows: int, is_whole_update: bool) -> int:
    """Beside the gradients of an update, or of their largest number where a micro-batch is all of it: those come as
    the activations go."""
    grow = is_whole_update and not (
        config.cuda_graphs or config.optimizer_in_backward or config.zero or config.offload != "none"
    )
    if not grow:
        return footprint.training(config.gradient_checkpointing).peak(rows)
    dtype = torch.float32 if config.train_gradient_dtype == "fp32" else footprint.dtype
    peak = footprint.training(config.gradient_checkpointing, dtype).peak(rows)
    return max(0, peak - _gradient_bytes(footprint, config))
