"""How many rows a UNet call has: in training (the micro-batch) and in sampling (batches drawn together).

Decided by the bytes that one pair keeps for its backward pass and by the memory that is free. On many processors the
sums of a row depend on how many rows there are, so sizes are kept with the run (see measured.py), and a resumed one
computes the same bits. They are powers of two: a new run gets the same from a little more or less free memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch.autograd.graph import saved_tensors_hooks

from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import free_bytes
from ddpo_fast.engine import Engine
from ddpo_fast.measured import Measured
from ddpo_fast.policy import Policy
from ddpo_fast.processes import all_reduce_min

# More rows gain nothing: NeMo's ControlNet gains 1.26 times from 8 to 32 images on an A100, and the bundled model on a
# CPU 1.35 times from 6 to 48 rows and nothing beyond.
MOST_ROWS = 64
# Sampling keeps the device busy from here on, and a further batch is better scored while the next one is sampled.
SAMPLING_ROWS = 24
# Share of the free memory for what a micro-batch keeps: gradients, the backward pass's own tensors and fragmentation
# take the rest.
SHARE_FOR_ACTIVATIONS = 0.6
# With gradient_checkpointing='blocks' only the inputs of blocks are kept, and a block's activations come back while it
# is computed again. Stable Diffusion 1.5 (traced, see plan/footprint.py) keeps 0.15 GB a row and has 0.24 at the peak
# for all weights, 0.08 and 0.17 for a LoRA: about twice as much.
PEAK_OVER_KEPT_OF_BLOCKS = 2


class BatchSizes:
    """The sizes of a run's UNet calls: as set, else what fits and pays, measured when first asked for.

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
        """(image, timestep) pairs of a UNet call in training; an update's calls are as equal as they can be."""
        return self.measured.once(
            "micro_batch_size", lambda: self.config.train_micro_batch_size or self._fitting_micro_batch()
        )

    @property
    def merged_batches(self) -> int:
        """Sampling batches that are drawn together."""
        set_to = self.config.sample_merge_batches
        return self.measured.once("merged_batches", self._fitting_batches) if set_to is None else set_to

    def halve(self) -> bool:
        """Halves the micro-batch for good, after memory ran out; False if it is one pair already."""
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
        """Free memory of the device, less what the first update is yet to allocate; the least of all processes, as
        they must split their work alike."""
        free = free_bytes(self.accelerator.device, self.accelerator.num_processes, self.config.gpu_memory)
        free = all_reduce_min(self.accelerator, max(0, free - self.engine.bytes_before_first_step()))
        # a recorded micro-batch keeps its activations, and one of another size needs its own
        return free // 2 if self.config.cuda_graphs else free

    @cached_property
    def _kept_bytes_per_row(self) -> int:
        """Measured by a forward pass of one pair with a graph."""
        policy, device = self.policy, self.accelerator.device
        weights = list(policy.unet.parameters())
        # DeepSpeed's stage 3 gathers the weights of a layer while it runs, and frees them
        split = [weight for weight in weights if hasattr(weight, "ds_id")]

        def forward() -> torch.Tensor:
            latents = torch.zeros((1, *policy.latent_shape), device=device)
            timesteps = torch.zeros(1, dtype=torch.int64, device=device)
            return policy.output(latents, timesteps, policy.negative_embeds.repeat(self.config.rows_per_pair, 1, 1))

        with policy.computing():
            kept = kept_bytes(forward, _storages(weights), lambda: _storages(split)) // self.config.rows_per_pair
        factor = PEAK_OVER_KEPT_OF_BLOCKS if self.config.gradient_checkpointing == "blocks" else 1
        return max(1, kept * factor)


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def kept_bytes(forward: Callable[[], Any], parameters: set[int], brought: Callable[[], set[int]] = set) -> int:
    """Bytes of the activations that `forward` keeps for the backward pass.

    Args:
        forward: runs a network with gradients.
        parameters: `data_ptr` of storages that are there anyway.
        brought: those that are there at a moment of the forward pass, and go.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in brought():
            kept[storage.data_ptr()] = storage.nbytes()
        # the tensor itself would keep its graph, and that the tensor
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def pairs_that_fit(bytes_per_pair: int, free: int, rows_per_pair: int) -> int:
    """(image, timestep) pairs of a UNet call: a power of two, at least 1, with at most `MOST_ROWS` rows."""
    fit = int(free * SHARE_FOR_ACTIVATIONS) // max(1, bytes_per_pair)
    return _power_of_two_within(min(fit, MOST_ROWS // rows_per_pair))


def equal_parts(pairs: int, fit: int) -> int:
    """The pairs of a UNet call, as many calls as `fit` of them would need for all, and none larger than it must be."""
    return -(-pairs // -(-pairs // fit))


def batches_to_merge(batch_size: int, rows_per_image: int, images_that_fit: int) -> int:
    """Sampling batches that are drawn together: as few as give `SAMPLING_ROWS` rows, if so many images fit."""
    wanted = -(-SAMPLING_ROWS // (batch_size * rows_per_image))
    return max(1, min(wanted, images_that_fit // batch_size))


def _power_of_two_within(limit: int) -> int:
    return 1 << max(0, limit.bit_length() - 1) if limit > 0 else 1
