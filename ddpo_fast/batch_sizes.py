"""How many rows a UNet call has: in training (the micro-batch) and in sampling (batches that are denoised together).

Both follow from the free memory and from the bytes that one pair keeps for its backward pass. Kernels may add up a row
in another order when the number of rows differs, so the sizes are saved with the run (see measured.py), and a resumed
run computes the same bits. The pairs that fit are rounded down to a power of two: then a little more or less free
memory gives a new run the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch.autograd.graph import saved_tensors_hooks

from ddpo_fast import config_rules, cuda_graphs
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import free_bytes
from ddpo_fast.engine import Engine
from ddpo_fast.measured import Measured
from ddpo_fast.policy import Policy
from ddpo_fast.processes import all_reduce_min, broadcast_from_main

# More rows gain no speed: NeMo's ControlNet is 1.26 times as fast with 32 images as with 8 on an A100, and the bundled
# model on a CPU 1.35 times with 48 rows as with 6, and not faster with more.
MOST_ROWS = 64
# This many rows keep the device busy in sampling. More batches are not merged, so that the reward function can score
# one while the next is sampled.
SAMPLING_ROWS = 24
# The share of the free memory that a micro-batch's activations may take. The rest is for gradients, the temporary
# tensors of the backward pass, and fragmentation.
SHARE_FOR_ACTIVATIONS = 0.6
# With gradient_checkpointing='blocks' only the inputs of blocks are kept, and a block's activations come back while it
# is computed again. Stable Diffusion 1.5 (traced, see plan/footprint.py) keeps 0.15 GB a row and has 0.24 at the peak
# for all weights, 0.08 and 0.17 for a LoRA: about twice as much.
PEAK_OVER_KEPT_OF_BLOCKS = 2


class BatchSizes:
    """The sizes of a run's UNet calls: as the settings say, else chosen by free memory when first read.

    Args:
        measured: keeps the sizes that are not set.
    """

    def __init__(
        self, config: DDPOConfig, policy: Policy, engine: Engine, accelerator: Accelerator, measured: Measured
    ) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.accelerator = accelerator
        self.measured = measured

    @property
    def micro_batch_size(self) -> int:
        """(image, timestep) pairs of a UNet call in training; chosen so that an update's calls are of equal size."""
        return self.measured.measure_once(
            "micro_batch_size", lambda: self.config.train_micro_batch_size or self._fitting_micro_batch()
        )

    @property
    def merged_batches(self) -> int:
        """Sampling batches that are denoised together."""
        set_to = self.config.sample_merge_batches
        return self.measured.measure_once("merged_batches", self._fitting_batches) if set_to is None else set_to

    def settle_graphs(self) -> None:
        """Makes `cuda_graphs` True or False in the run's settings where it is None; the same on every process."""
        if self.config.cuda_graphs is None:
            self.config.cuda_graphs = bool(self.measured.measure_once("cuda_graphs", self._graphs_pay))
            if self.config.cuda_graphs:
                self.engine.keep_gradients()

    def _graphs_pay(self) -> bool:
        config, device = self.config, self.accelerator.device
        # A graph keeps its memory, which settings that were planned for a GPU's memory do not leave.
        planned = config.auto_memory or config.gpu_memory is not None
        with_graphs = copy(config)
        with_graphs.cuda_graphs = True
        refused = cuda_graphs.problem(device) or config_rules.conflict(with_graphs)
        if planned or refused or self.policy.pipeline.autocast is not None:
            return False
        pairs = self.micro_batch_size
        with torch.no_grad(), self.policy.computing():
            pays = cuda_graphs.host_is_the_limit(lambda: self._call(pairs))
        pays = broadcast_from_main(self.accelerator, pays)
        if pays and config.train_micro_batch_size is None:
            # chosen again, with the memory that graphs leave
            del self.measured["micro_batch_size"]
        return pays

    def _call(self, pairs: int) -> torch.Tensor:
        """The output of a UNet call in training for zeros, of the largest size."""
        device = self.accelerator.device
        latents = torch.zeros((pairs, *self.policy.largest_latent_shape), device=device)
        timesteps = torch.zeros(pairs, dtype=torch.int64, device=device)
        embeds = self.policy.negative_embeds.repeat(pairs * self.config.rows_per_pair, 1, 1)
        return self.policy.output(latents, timesteps, embeds)

    def halve(self) -> bool:
        """Halves the micro-batch for the rest of the run, after memory ran out; False if it is one pair already."""
        if self.micro_batch_size == 1:
            return False
        self.measured["micro_batch_size"] = self.micro_batch_size // 2
        return True

    def _fitting_micro_batch(self) -> int:
        rows = self.config.rows_per_pair
        fit = pairs_that_fit(self._kept_bytes_per_row * rows, self._free_bytes(), rows)
        return equal_parts(self.config.pairs_per_update, fit)

    def _fitting_batches(self) -> int:
        # sampling keeps nothing for a backward pass, so what training keeps is more than enough
        images_that_fit = self._free_bytes() // (self._kept_bytes_per_row * self.config.rows_per_image)
        return batches_to_merge(self.config.sample_batch_size, self.config.rows_per_image, images_that_fit)

    def _free_bytes(self) -> int:
        """Free bytes of the device, without those that the first update will allocate; the minimum over processes.

        All processes must have the same sizes, so that they split an update into the same UNet calls.
        """
        free = free_bytes(self.accelerator.device, self.accelerator.num_processes, self.config.gpu_memory)
        free = all_reduce_min(self.accelerator, max(0, free - self.engine.bytes_before_first_step()))
        # a recorded micro-batch keeps its activations allocated, and one of another size needs memory beside them
        return free // 2 if self.config.cuda_graphs else free

    @cached_property
    def _kept_bytes_per_row(self) -> int:
        """Bytes that a row of a UNet call keeps for the backward pass at most, by a forward pass of one pair."""
        policy = self.policy
        weights = list(policy.unet.parameters())
        # ZeRO stage 3 gathers a layer's weights while it runs, and frees them afterwards: they are no activations
        split = [weight for weight in weights if hasattr(weight, "ds_id")]

        # not compiled for this one number of rows; a compiler keeps no more than the layers themselves
        with policy.computing(), torch.compiler.set_stance("force_eager"):
            of_pair = kept_bytes(lambda: self._call(1), _storages(weights), lambda: _storages(split))
        factor = PEAK_OVER_KEPT_OF_BLOCKS if self.config.gradient_checkpointing == "blocks" else 1
        return max(1, of_pair // self.config.rows_per_pair * factor)


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The addresses of the tensors' storages, which views share."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def kept_bytes(forward: Callable[[], Any], parameters: set[int], gathered: Callable[[], set[int]] = set) -> int:
    """Bytes of the activations that `forward` keeps for the backward pass.

    Args:
        forward: runs a network with gradients.
        parameters: `data_ptr` of the storages of weights, which are not counted.
        gathered: returns `data_ptr` of storages that hold weights only for a moment of the forward pass.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in gathered():
            kept[storage.data_ptr()] = storage.nbytes()
        # detached, as the tensor itself refers to its graph, and the graph would refer to the tensor: a cycle
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def pairs_that_fit(bytes_per_pair: int, free: int, rows_per_pair: int) -> int:
    """(image, timestep) pairs of a UNet call: a power of two, at least 1, with at most `MOST_ROWS` rows."""
    fit = int(free * SHARE_FOR_ACTIVATIONS) // max(1, bytes_per_pair)
    return _power_of_two_within(min(fit, MOST_ROWS // rows_per_pair))


def equal_parts(pairs: int, fit: int) -> int:
    """The pairs of a UNet call, so that the fewest calls of at most `fit` pairs take all `pairs` in nearly equal parts.

    -(-a // b) is a / b rounded up.
    """
    return -(-pairs // -(-pairs // fit))


def batches_to_merge(batch_size: int, rows_per_image: int, images_that_fit: int) -> int:
    """Sampling batches to denoise together: the fewest with `SAMPLING_ROWS` rows, or fewer if only those fit."""
    wanted = -(-SAMPLING_ROWS // (batch_size * rows_per_image))
    return max(1, min(wanted, images_that_fit // batch_size))


def _power_of_two_within(limit: int) -> int:
    """The largest power of two that is at most `limit`, and at least 1."""
    return 1 << max(0, limit.bit_length() - 1) if limit > 0 else 1
