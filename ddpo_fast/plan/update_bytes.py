"""The bytes of an update: gradients, optimizer states, and the copies that a step makes for a while.

What is counted here is what engine/optimizers.py and engine/offload.py allocate.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import buckets
from ddpo_fast.plan.footprint import Footprint

FP32_BYTES = 4
# elements of an 8-bit state that share an fp32 scale
BLOCK_8BIT = 256
# for each weight that is rounded stochastically: 32 random bits, the rounded weight in fp32, and in bf16
ROUNDING_BYTES = 2 * FP32_BYTES + 2


def state_bytes(sizes: Sequence[int], config: DDPOConfig) -> int:
    """Adam's two moments for tensors with these numbers of elements.

    In fp32, or in 8 bits with an fp32 scale for each 256 elements; small tensors stay in fp32 even then.
    """
    if not config.train_use_8bit_adam:
        return 2 * FP32_BYTES * sum(sizes)
    small = sum(n for n in sizes if n < config.train_min_8bit_size)
    large = sum(sizes) - small
    return 2 * FP32_BYTES * small + 2 * large + 2 * FP32_BYTES * large // BLOCK_8BIT


def gradient_itemsize(footprint: Footprint, config: DDPOConfig) -> int:
    """Bytes of one value of a gradient, as gradients are added up."""
    return FP32_BYTES if config.train_gradient_dtype == "fp32" else footprint.itemsize


def gradient_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """The gradients of an update. They are whole on each GPU, as even ZeRO splits them only when all are there."""
    # with the optimizer in the backward pass a gradient is freed before the next is computed
    weights = max(footprint.trained_sizes) if config.optimizer_in_backward else footprint.trained_weights
    return gradient_itemsize(footprint, config) * weights


def staged_weights(footprint: Footprint) -> int:
    """Weights in the two buffers of an offloaded step, which take turns: each is as large as its largest bucket."""
    sizes = _bucket_sizes(footprint)
    return max(sizes[::2]) + max(sizes[1::2], default=0)


def update_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """What the GPU holds for a while after the last backward pass of an update."""
    largest, gradient = max(_bucket_sizes(footprint)), gradient_itemsize(footprint, config)
    step_in_buckets = gradient < FP32_BYTES or config.stochastic_rounding or config.train_use_8bit_adam
    copies = 0
    if config.zero:
        # DeepSpeed's buckets: of gradients that go to the host and weights that come back, or of widened gradients
        offloads = config.offload != "none"
        copies = largest * (gradient + footprint.itemsize if offloads else FP32_BYTES if gradient < FP32_BYTES else 0)
    elif step_in_buckets and config.offload == "none" and not config.optimizer_in_backward:
        copies = step_bytes(footprint, config)
    # PyTorch's fused AdamW on fp32 gradients copies nothing, and an offloaded step copies on the host

    # processes average their gradients first: a message is a copy of a bucket's
    return max(copies, largest * gradient if num_processes > 1 else 0)


def step_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """What one call of the optimizer makes in `step_in_buckets`."""
    copies = fp32_gradient_bytes(footprint, config)
    if config.stochastic_rounding:
        # the bucket's weights in fp32, which are rounded one tensor after the other
        copies += FP32_BYTES * _weights_per_step(footprint, config) + ROUNDING_BYTES * max(footprint.trained_sizes)
    return copies


def fp32_gradient_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """fp32 gradients of one call of the optimizer, multiplied by what clips and unscales them.

    Half-precision gradients are converted before they are multiplied, one tensor after the other: another copy of one.
    """
    converts = gradient_itemsize(footprint, config) < FP32_BYTES
    converted = max(footprint.trained_sizes) if converts else 0
    return FP32_BYTES * (_weights_per_step(footprint, config) + converted)


def _bucket_sizes(footprint: Footprint) -> list[int]:
    """The numbers of weights that are sent, or updated by one call of the optimizer, together."""
    sizes = footprint.trained_sizes
    return [sum(sizes[i] for i in bucket) for bucket in buckets(sizes)]


def _weights_per_step(footprint: Footprint, config: DDPOConfig) -> int:
    """The most weights that one call of the optimizer updates in `step_in_buckets`."""
    return max(footprint.trained_sizes if config.optimizer_in_backward else _bucket_sizes(footprint))
