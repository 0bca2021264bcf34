"""How many rows a UNet call may have: from the bytes that one pair keeps for its backward pass and what is free.

Sizes are powers of two: a little more or less free memory then gives the same run again, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

# More rows gain nothing: NeMo's ControlNet gains 1.26 times from 8 to 32 images on an A100, and the bundled model on a
# CPU 1.35 times from 6 to 48 rows and nothing beyond.
MOST_ROWS = 64
# where sampling has the device busy, and a further batch is better scored while the next is drawn
SAMPLING_ROWS = 24
# gradients, the backward pass's own tensors and fragments take the rest
SHARE_FOR_ACTIVATIONS = 0.6


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """What a process may still allocate on its device: of a GPU its own, of a machine its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // num_processes


def kept_bytes(forward: Callable[[], Any], parameters: set[int]) -> int:
    """Bytes of the activations that `forward` keeps for the backward pass.

    Args:
        forward: runs a network with gradients.
        parameters: `data_ptr` of storages that are there anyway.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def pairs_that_fit(bytes_per_pair: int, free: int, rows_per_pair: int) -> int:
    """(image, timestep) pairs of a UNet call: a power of two, at least 1, with at most `MOST_ROWS` rows."""
    fit = int(free * SHARE_FOR_ACTIVATIONS) // max(1, bytes_per_pair)
    return _power_of_two_within(min(fit, MOST_ROWS // rows_per_pair))


def batches_to_merge(batch_size: int, rows_per_image: int, images_that_fit: int) -> int:
    """Sampling batches that are drawn together: as few as give `SAMPLING_ROWS` rows, if so many images fit."""
    wanted = -(-SAMPLING_ROWS // (batch_size * rows_per_image))
    return max(1, min(wanted, images_that_fit // batch_size))


def _power_of_two_within(limit: int) -> int:
    return 1 << max(0, limit.bit_length() - 1) if limit > 0 else 1
