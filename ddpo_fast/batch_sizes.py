"""How many rows a UNet call may have: from the bytes that one pair keeps for its backward pass and what is free.

On many processors the sums of a row depend on how many rows there are: sizes are kept with the run, see measured.py,
and are powers of two, as a little more or less free memory then gives the same new run again, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import free_bytes
from ddpo_fast.measured import Measured

# More rows gain nothing: NeMo's ControlNet gains 1.26 times from 8 to 32 images on an A100, and the bundled model on a
# CPU 1.35 times from 6 to 48 rows and nothing beyond.
MOST_ROWS = 64
# where sampling has the device busy, and a further batch is better scored while the next is drawn
SAMPLING_ROWS = 24
# gradients, the backward pass's own tensors and fragments take the rest
SHARE_FOR_ACTIVATIONS = 0.6
# Blocks that keep their inputs have everything else while they run again: of Stable Diffusion 1.5 (traced, see
# footprint.py) 0.15 GB a row and 0.24 for all weights, 0.08 and 0.17 for a LoRA.
RUN_AGAIN = 2


class Sizes:
    """The sizes of a run's UNet calls: those of its settings, else what fits and pays, measured when first asked for.

    Args:
        forward: a training forward of one pair.
        computing: the context that it runs in.
        to_come: bytes that training will allocate beside activations.
        measured: where sizes that are not set are kept.
        least: the smallest of all processes' values.
    """

    def __init__(
        self,
        config: DDPOConfig,
        device: torch.device,
        num_processes: int,
        unet: torch.nn.Module,
        forward: Callable[[], Any],
        computing: Callable[[], AbstractContextManager[Any]],
        to_come: Callable[[], int],
        measured: Measured,
        least: Callable[[int], int] = lambda value: value,
    ) -> None:
        self.config = config
        self.device = device
        self.num_processes = num_processes
        self.unet = unet
        self.forward = forward
        self.computing = computing
        self.to_come = to_come
        self.measured = measured
        self.least = least

    @property
    def merged_batches(self) -> int:
        """Sampling batches that are drawn together."""
        set_to = self.config.sample_merge_batches
        return self.measured.once("merged_batches", self._fitting_batches) if set_to is None else set_to

    @property
    def micro_batch_size(self) -> int:
        """(image, timestep) pairs of a training forward: parts of an update that are as equal as they can be."""
        return self.measured.once(
            "micro_batch_size", lambda: self.config.train_micro_batch_size or self._fitting_micro_batch()
        )

    def halve(self) -> bool:
        """Makes the micro-batch smaller for good, after memory ran out; False if it is one pair already."""
        if self.micro_batch_size == 1:
            return False
        self.measured["micro_batch_size"] = self.micro_batch_size // 2
        return True

    def _fitting_batches(self) -> int:
        rows = 2 if self.config.sample_guidance_scale > 1 else 1
        images_that_fit = self._free_bytes() // (self._bytes_per_row * rows)
        return batches_to_merge(self.config.sample_batch_size, rows, images_that_fit)

    def _fitting_micro_batch(self) -> int:
        rows = self._rows_per_pair
        fit = pairs_that_fit(self._bytes_per_row * rows, self._free_bytes(), rows)
        return equal_parts(self.config.pairs_per_update, fit)

    @property
    def _rows_per_pair(self) -> int:
        return 2 if self.config.guides_training else 1

    def _free_bytes(self) -> int:
        free = free_bytes(self.device, self.num_processes, self.config.gpu_memory)
        free = self.least(max(0, free - self.to_come()))
        # a recorded micro-batch keeps its activations, and one of another size needs its own
        return free // 2 if self.config.cuda_graphs else free

    @cached_property
    def _bytes_per_row(self) -> int:
        weights = list(self.unet.parameters())
        # DeepSpeed's stage 3 brings weights together for the layers under way
        split = [weight for weight in weights if hasattr(weight, "ds_id")]
        with self.computing():
            kept = kept_bytes(self.forward, _storages(weights), lambda: _storages(split)) // self._rows_per_pair
        return max(1, kept * (RUN_AGAIN if self.config.gradient_checkpointing == "blocks" else 1))


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
