"""Predicts a run's memory, by part and by phase. GB are 10^9 bytes.

The phases of an epoch are encoding (of prompts), sampling, decoding, training (forward and backward passes) and
updating (the optimizer's step). The memory of a phase has resident parts, such as weights, and a part that exists only
while the phase computes: "activations, buffers". The peak of a run is the memory of its largest phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpo_fast.batch_sizes import MOST_ROWS, batches_to_merge, equal_parts
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import CUDA_CONTEXT, GB
from ddpo_fast.families import unchecked_with_family
from ddpo_fast.plan.footprint import Footprint
from ddpo_fast.plan.update_bytes import (
    FP32_BYTES,
    fp32_gradient_bytes,
    gradient_bytes,
    gradient_itemsize,
    kept_weight_bytes,
    staged_weights,
    state_bytes,
    step_bytes,
    update_bytes,
)
from ddpo_fast.plan.zero_bytes import zero_backward_bytes, zero_host_gradient_bytes
from ddpo_fast.prompt_embeddings import MOST_KEPT

# Bytes of the workspaces of cuBLAS and cuDNN, inside PyTorch's allocator: assumed, not measured. cuDNN chooses
# algorithms with smaller workspaces if memory is short.
CUDA_WORKSPACES = 300_000_000
# images that `ddpo-fast train` samples before and after training, in one batch
EVALUATED_IMAGES = 8

Bytes = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Bytes on the GPU, by phase and part, and in host memory, by part."""

    phases: dict[str, Bytes]
    host: Bytes

    @property
    def totals(self) -> Bytes:
        """Bytes on the GPU by phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes on the GPU in the largest phase."""
        return self.totals[self.peak_phase]

    @property
    def host_bytes(self) -> int:
        """Bytes of a process in host memory, beside PyTorch itself."""
        return sum(self.host.values())

    @property
    def allocated(self) -> int:
        """Bytes at the peak that PyTorch's allocator counts (`torch.cuda.max_memory_allocated`), workspaces aside."""
        outside = ("CUDA context", "workspaces", "reward processes")
        return max(sum(n for part, n in parts.items() if part not in outside) for parts in self.phases.values())

    @property
    def host_parts(self) -> str:
        """What is in host memory, in words."""
        return ", ".join(f"{name} {size / GB:.2f}" for name, size in self.host.items())

    def table(self) -> str:
        """GB by part (a row each) and phase (a column each)."""
        # the rows are in the order of the last phases' parts, because these phases have the most parts
        names = list(dict.fromkeys(part for parts in reversed(self.phases.values()) for part in parts))
        rows = [["GB", *self.phases]]
        rows += [[name, *(_gb(parts.get(name, 0)) for parts in self.phases.values())] for name in names]
        rows.append(["total", *(_gb(total, least=0) for total in self.totals.values())])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(line))
            for line in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        lines.append(f"peak: {self.peak / GB:.2f} GB, while {self.peak_phase}")
        if self.host:
            lines.append(f"host memory: {self.host_bytes / GB:.2f} GB ({self.host_parts})")
        return "\n".join(lines)


def _gb(size: int, least: int = 5_000_000) -> str:
    return f"{size / GB:.2f}" if size >= least else "-" if size == 0 else "<0.01"


def predict(
    footprint: Footprint, config: DDPOConfig, num_processes: int = 1, evaluated_images: int = EVALUATED_IMAGES
) -> Plan:
    """The plan of a run with these settings, in any epoch but the first, which needs less.

    Args:
        footprint: of the model, in the settings' precision.
        num_processes: each with a GPU of its own.
        evaluated_images: the images that `ddpo-fast train` samples in one batch before and after training; 0 for a
            `DDPOTrainer` without that command.
    """
    # guidance doubles no rows where the network takes its scale
    config = unchecked_with_family(config, footprint.configs.family)
    # in one piece, as the phases are best read side by side
    temporary = _temporary_bytes(footprint, config, num_processes, evaluated_images)

    # Resident in every phase, unless in host memory: the UNet, the fp32 weights, the optimizer's states and the moving
    # average of the weights.
    always, host = _weight_bytes(footprint, config, num_processes)
    # The buffers for the sampled prompts' embeddings, and for the keys and values computed from them, are kept from one
    # rollout to the next.
    sampled_rows = config.rows_per_image * merged_batches(config) * config.sample_batch_size
    always["cached embeddings"] = footprint.cached_bytes(sampled_rows)
    if config.sample_cache or config.embed_prompts_once:
        always["kept prompts"] = _kept_prompt_bytes(footprint, config)
    if config.cuda_graphs:
        # A CUDA graph keeps the memory that it writes to as long as the graph exists. Work that runs without a graph,
        # such as a last micro-batch of fewer pairs, needs other memory, so the same bytes count again in these two
        # phases.
        always["recorded graphs"] = temporary["sampling"] + temporary["training"]

    # The frozen networks are resident too, unless `offload_frozen` brings each to the GPU only while it computes.
    # `embed_prompts_once` leaves the text encoders where they were loaded, which takes no memory between their calls.
    # Text encoders that come from elsewhere pass the GPU block by block.
    vae, text_encoder = footprint.vae_bytes, footprint.text_bytes
    kept = {"VAE": vae, "text encoder": 0 if config.embed_prompts_once else text_encoder}
    frozen = {} if config.offload_frozen else {name: size for name, size in kept.items() if size}
    if config.offload_frozen:
        host = {**host, "VAE and text encoder" if kept["text encoder"] else "VAE": sum(kept.values())}

    # The rewards score an epoch's images while the next ones are sampled.
    if footprint.reward.resident:
        always["reward"] = footprint.reward.resident
    named = {"offloaded reward": footprint.reward.offloaded, "reward's activations": footprint.reward.activations}
    reward = {name: size for name, size in named.items() if size}
    if footprint.reward.host:
        host = {**host, "reward": footprint.reward.host}

    # Gradients exist from the first backward pass of an update to its step. CUDA graphs and ZeRO's stage 3 keep them
    # between updates too. With `optimizer_in_backward`, none is left at the end of the backward pass.
    gradients = {"gradients": gradient_bytes(footprint, config, num_processes)}
    gradients_between_updates = gradients if config.cuda_graphs or config.zero == 3 else {}
    gradients_at_step = {} if config.optimizer_in_backward else gradients

    # An epoch's trajectories and images are kept until the epoch's training has ended.
    images = config.sample_batch_size * config.sample_num_batches_per_epoch
    epoch = {"trajectories, images": _rollout_bytes(footprint, config) + images * footprint.image_bytes}

    resident: dict[str, Bytes] = {
        # prompts are encoded at the beginning of an epoch, before there are trajectories
        "encoding": {"text encoder": footprint.passing_text_bytes, **frozen, **gradients_between_updates},
        "sampling": {**frozen, **gradients_between_updates, **epoch, **reward},
        "decoding": {**frozen, "VAE": vae, **gradients_between_updates, **epoch, **reward},
        "training": {**frozen, **gradients, **epoch},
        "updating": {**frozen, **gradients_at_step, **epoch},
    }
    # the memory of CUDA and its libraries themselves
    cuda = {"workspaces": CUDA_WORKSPACES, "CUDA context": CUDA_CONTEXT} if footprint.device_type == "cuda" else {}
    if footprint.reward.processes:
        cuda["reward processes"] = footprint.reward.processes
    phases = {
        name: {**always, **parts, "activations, buffers": temporary[name], **cuda} for name, parts in resident.items()
    }
    if footprint.device_type == "cuda":
        # Before the first epoch frozen weights are converted on their way to the GPU, and trained ones come in fp32.
        network = footprint.frozen_bytes + FP32_BYTES * footprint.trained_weights
        phases = {"loading": {footprint.name: network, **frozen, **cuda}, **phases}
    return Plan(phases, host)


def least_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int = 1) -> int:
    """The bytes of the weights, gradients and states on the GPU alone, which no smaller batch reduces.

    They are known at once, while `predict` traces the networks.
    """
    gpu, _ = _weight_bytes(footprint, config, num_processes)
    gradients = 0 if config.optimizer_in_backward else gradient_bytes(footprint, config, num_processes)
    if footprint.device_type != "cuda":
        return sum(gpu.values()) + gradients
    loading = footprint.frozen_bytes + FP32_BYTES * footprint.trained_weights
    return max(sum(gpu.values()) + gradients, loading) + CUDA_WORKSPACES + CUDA_CONTEXT


def pairs_per_call(config: DDPOConfig) -> int:
    """(image, timestep) pairs of a training UNet call: the setting, or the most that the trainer would choose."""
    if config.train_micro_batch_size is not None:
        return min(config.train_micro_batch_size, config.pairs_per_update)
    return equal_parts(config.pairs_per_update, MOST_ROWS // config.rows_per_pair)


def merged_batches(config: DDPOConfig) -> int:
    """Sampling batches that are drawn together: the setting, or the most that the trainer would choose."""
    unlimited = 10**9
    most = batches_to_merge(config.sample_batch_size, config.rows_per_image, images_that_fit=unlimited)
    return min(config.sample_merge_batches or most, config.sample_num_batches_per_epoch)


# resident parts


def _kept_prompt_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """Embeddings of prompts on the GPU, of this process's and of earlier epochs, and the negative prompt's."""
    an_epoch = -(-config.sample_batch_size * config.sample_num_batches_per_epoch // config.sample_group_size)
    prompts = an_epoch * config.num_epochs * (1 + config.sample_redraws)
    if footprint.prompts is not None:
        prompts = min(prompts, footprint.prompts)
    # those that are there may have this size before an epoch's new ones are added
    most = MOST_KEPT // footprint.prompt_bytes + an_epoch
    return (min(prompts, most) + 1) * footprint.prompt_bytes


def _weight_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> tuple[Bytes, Bytes]:
    """Parts that are resident all the time, on the GPU and in host memory, without the VAE and the text encoder."""
    trained, size = footprint.trained_weights, footprint.itemsize
    # ZeRO splits optimizer states and fp32 weights over processes from stage 1 on, half-precision weights at stage 3
    parts = num_processes if config.zero else 1
    offloads = config.offload != "none"

    # the weights that the network computes with
    network = footprint.network_bytes
    if config.zero == 3:
        # this process's part, and the weights that are gathered at the same time, assumed to be two of the largest
        # blocks
        gathered = 2 * size * footprint.largest_block
        network = gathered + (0 if config.offload == "all" else network // num_processes)

    # The fp32 weights that the optimizer trains, unless they are the UNet's own tensors. They are separate tensors if
    # the UNet computes in half precision (except with stochastic rounding), if they are in host memory, and if only a
    # part of them is this process's.
    has_masters = (size < FP32_BYTES and not config.stochastic_rounding) or offloads or config.zero in (1, 2)
    masters = FP32_BYTES * trained // parts if has_masters else 0
    states = state_bytes(footprint.trained_sizes, config) // parts
    ema = FP32_BYTES * trained // parts if config.ema_decay > 0 else 0

    gpu: Bytes = {footprint.name: network}
    if config.train_kl_weight > 0:
        # of the weights that are trained, in the compute precision (see reference.py)
        gpu["reference weights"] = size * trained
    if config.ema_sampling and (config.stochastic_rounding or (not has_masters and config.ema_device == "cpu")):
        # elsewhere the averages take the place of weights that exist anyway (see `MasterWeights.computing_with`)
        gpu["averages to sample with"] = size * trained
    host: Bytes = {}
    for name, size_of_part, is_on_host in (
        ("fp32 weights", masters, offloads),
        ("optimizer states", states, offloads),
        ("moving average", ema, offloads or config.ema_device == "cpu"),
    ):
        if size_of_part:
            (host if is_on_host else gpu)[name] = size_of_part

    if offloads and (kept := kept_weight_bytes(footprint, config, num_processes)):
        host["weights before an update"] = kept
    if config.train_guard:
        # of each size of images
        best = (size if config.stochastic_rounding else FP32_BYTES) * trained
        host["best weights"] = best * len(set(config.image_sizes))
    # an offloaded step needs more host memory than the weights and states
    if offloads and config.zero:
        host["gradients"] = zero_host_gradient_bytes(footprint, config, num_processes)
    elif offloads:
        # gradients are copied to the host through pinned buffers, and half-precision weights to the GPU
        host["pinned buffers"] = staged_weights(footprint) * (gradient_itemsize(footprint, config) + size)
        if not config.train_use_8bit_adam:
            # the 8-bit optimizer reads half-precision gradients without an fp32 copy
            host["fp32 gradients"] = fp32_gradient_bytes(footprint, config)
    if config.zero == 3 and config.offload == "all":
        host[footprint.name] = footprint.network_bytes // num_processes
    return gpu, host


def _rollout_bytes(footprint: Footprint, config: DDPOConfig, batches: int | None = None) -> int:
    """The trajectories of `batches` sampling batches (None: of all batches of an epoch)."""
    channels, height, width = footprint.latent_shape
    tokens, embedding = footprint.embedding_shape
    steps = config.sample_num_steps
    # fp32 in any precision, from the initial noise on
    latents = FP32_BYTES * (steps + 1) * channels * height * width
    # an int64 timestep and an fp32 log-prob for each step
    scalars = (8 + 4) * steps
    # int64 token ids, the prompt's embedding, and the negative prompt's, which is repeated for each image when the
    # trajectories of batches are joined
    text = tokens * 8 + (tokens + footprint.negative_shape[0]) * embedding * footprint.itemsize
    return (latents + scalars + text) * config.sample_batch_size * (batches or config.sample_num_batches_per_epoch)


# what a phase allocates while it computes


def _temporary_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int, evaluated_images: int) -> Bytes:
    """By phase: the peak of the memory that exists only while the phase computes."""
    batches = merged_batches(config)
    sampled_rows = config.rows_per_image * max(batches * config.sample_batch_size, evaluated_images)
    return {
        "encoding": footprint.encoding,
        # the larger of a denoising step, and the copy that is made when the latents of all steps are stacked at the end
        "sampling": max(footprint.sampling.peak(sampled_rows), _rollout_bytes(footprint, config, batches)),
        "decoding": decode_bytes(footprint, config, max(config.sample_batch_size, evaluated_images)),
        "training": _training_bytes(footprint, config, num_processes, pairs_per_call(config)),
        "updating": update_bytes(footprint, config, num_processes),
    }


def decode_bytes(footprint: Footprint, config: DDPOConfig, images: int) -> int:
    """The memory of decoding a batch, a few images at a time, into one tensor that is then scaled to [0, 1]."""
    at_once = 1 if config.vae_slicing else min(images, footprint.decoded_at_once)
    pixels = footprint.image_bytes
    # while the last images are decoded, the others exist already
    decoding = footprint.decoding(config.vae_tiling).peak(at_once) + (images - at_once) * pixels
    # at the end all images exist three times: the parts joined, clamped, and stacked
    return max(decoding, 3 * images * pixels)


def _training_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int, pairs: int) -> int:
    """The memory of a micro-batch of `pairs` pairs, and of the copies of its data."""
    channels, height, width = footprint.latent_shape
    tokens, embedding = footprint.embedding_shape
    latents = FP32_BYTES * channels * height * width
    # embeddings of the prompt and of the negative prompt
    text = (tokens + footprint.negative_shape[0]) * embedding * footprint.itemsize
    # The factor 2: latents before and after a step. The data of an update's images is copied from the epoch's
    # trajectories, and the data of a micro-batch's pairs from that copy.
    images = config.train_batch_size * config.train_gradient_accumulation_steps
    batches = images * (2 * config.sample_num_steps * latents + text)
    picked = pairs * (2 * latents + text)
    # with `optimizer_in_backward` the largest weight may be updated at the peak of the activations, the worst case
    step = step_bytes(footprint, config) if config.optimizer_in_backward else 0
    rows = pairs * config.rows_per_pair
    passes = _micro_batch_bytes(footprint, config, rows, pairs >= config.pairs_per_update)
    return passes + zero_backward_bytes(footprint, config, num_processes) + step + batches + picked


def _micro_batch_bytes(footprint: Footprint, config: DDPOConfig, rows: int, is_whole_update: bool) -> int:
    """The peak of a micro-batch's two passes, without the gradients that `predict` counts as resident."""
    # Gradients exist before a micro-batch if an earlier micro-batch of the update has made them, or if CUDA graphs keep
    # them. Each new gradient is then a temporary tensor that is added to its total. With `optimizer_in_backward`, ZeRO
    # and offload the same count is used as an upper bound.
    exist_before = not is_whole_update or (
        config.cuda_graphs or config.optimizer_in_backward or config.zero or config.offload != "none"
    )
    if exist_before:
        return footprint.training(config.gradient_checkpointing).peak(rows)
    # If a micro-batch is the whole update, its backward pass creates the gradients one by one while it frees
    # activations, so that at the peak only some gradients exist. `predict` counts all gradients as resident; they are
    # subtracted here.
    dtype = torch.float32 if config.train_gradient_dtype == "fp32" else footprint.dtype
    peak = footprint.training(config.gradient_checkpointing, dtype).peak(rows)
    return max(0, peak - gradient_bytes(footprint, config, num_processes=1))
