"""The bytes that DeepSpeed's ZeRO takes for gradients: on the GPU, in host memory, and while it computes.

At stage 1 each GPU adds up the whole gradient of an update. From stage 2 on it keeps only its part, an nth of the
gradient on n GPUs, and beside it the buckets of a micro-batch's gradients that are on their way (engine/zero.py).
"""

from __future__ import annotations

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import BUCKET, SUB_GROUP
from ddpo_fast.plan.footprint import Footprint

FP32_BYTES = 4


def splits_gradients(config: DDPOConfig) -> bool:
    return config.zero >= 2


def zero_gradient_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """The sums of gradients on each GPU, from the first micro-batch of an update to its step; always at stage 3."""
    if not splits_gradients(config):
        return _itemsize(footprint, config) * footprint.trained_weights
    in_host_memory = config.offload != "none" and not (config.zero == 2 and _sums_are_wider(footprint, config))
    return 0 if in_host_memory else _part(footprint, config, num_processes)


def zero_host_gradient_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """With offload: this process's part of the gradients in fp32, for the step, and the sums where they are there."""
    for_step = FP32_BYTES * footprint.trained_weights // num_processes
    sums_are_there = splits_gradients(config) and not zero_gradient_bytes(footprint, config, num_processes)
    return for_step + (_part(footprint, config, num_processes) if sums_are_there else 0)


def zero_backward_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """What DeepSpeed allocates in a backward pass, beside the pass's own tensors and the sums of gradients."""
    if not splits_gradients(config):
        return 0
    # DeepSpeed's buffer, of a fixed size, and the message made from it; a tensor larger than that has its own message
    buckets = footprint.itemsize * (BUCKET + max(min(BUCKET, footprint.trained_weights), max(footprint.trained_sizes)))
    # stage 2 adds to its sums in place only if they are wider than the gradients of a micro-batch
    second = config.zero == 2 and not _sums_are_wider(footprint, config) and config.offload == "none"
    return buckets + (_part(footprint, config, num_processes) if second else 0)


def zero_step_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int, largest: int) -> int:
    """The copies of gradients that the step makes on the GPU.

    Args:
        largest: the number of weights in the largest bucket.
    """
    itemsize, part = _itemsize(footprint, config), footprint.trained_weights // num_processes
    if config.offload != "none":
        # gradients for the host and weights from the host
        return largest * (itemsize + footprint.itemsize)
    if config.zero == 1 and footprint.itemsize < FP32_BYTES:
        # the part in half precision twice, and in fp32, after most of the whole gradient has been freed
        copies = part * (2 * footprint.itemsize + FP32_BYTES)
        return max(FP32_BYTES * largest, copies - zero_gradient_bytes(footprint, config, num_processes))
    if config.zero == 2 and _sums_are_wider(footprint, config):
        # the optimizer reads the sums where they are
        return FP32_BYTES * largest
    if config.zero == 3:
        # the optimizer trains one group of tensors after the other
        part = min(part, SUB_GROUP + max(footprint.trained_sizes) // num_processes)
    # the part in one piece, and in fp32
    return part * (itemsize + (FP32_BYTES if itemsize < FP32_BYTES else 0))


def _part(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    return _itemsize(footprint, config) * footprint.trained_weights // num_processes


def _itemsize(footprint: Footprint, config: DDPOConfig) -> int:
    return FP32_BYTES if config.train_gradient_dtype == "fp32" else footprint.itemsize


def _sums_are_wider(footprint: Footprint, config: DDPOConfig) -> bool:
    """Whether gradients are added up in fp32 though the network computes them in half precision."""
    return _itemsize(footprint, config) > footprint.itemsize
