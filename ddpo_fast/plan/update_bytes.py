"""The bytes of an update: gradients, optimizer states, and temporary copies of the optimizer's step.

These are the allocations of engine/optimizers.py and engine/offload.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import buckets
from ddpo_fast.plan.footprint import Footprint
from ddpo_fast.plan.zero_bytes import FP32_BYTES, zero_gradient_bytes, zero_step_bytes

# elements of an 8-bit state that share an fp32 scale
BLOCK_8BIT = 256
# for each weight that is rounded stochastically: 32 random bits, the rounded weight in fp32, and in bf16
ROUNDING_BYTES = 2 * FP32_BYTES + 2


def state_bytes(sizes: Sequence[int], config: DDPOConfig) -> int:
    """Adam's two moments for tensors with these numbers of elements.

    Moments are fp32, or 8-bit with an fp32 scale for each 256 elements; small tensors have fp32 moments in both cases.
    """
    if not config.train_use_8bit_adam:
        return 2 * FP32_BYTES * sum(sizes)
    small = sum(n for n in sizes if n < config.train_min_8bit_size)
    large = sum(sizes) - small
    return 2 * FP32_BYTES * small + 2 * large + 2 * FP32_BYTES * large // BLOCK_8BIT


def gradient_itemsize(footprint: Footprint, config: DDPOConfig) -> int:
    """Bytes of one value in the dtype that gradients are added up in."""
    return FP32_BYTES if config.train_gradient_dtype == "fp32" else footprint.itemsize


def gradient_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """The sums of gradients on each GPU between the micro-batches of an update."""
    if config.zero:
        return zero_gradient_bytes(footprint, config, num_processes)
    # with the optimizer in the backward pass a gradient is freed before the next is computed
    weights = max(footprint.trained_sizes) if config.optimizer_in_backward else footprint.trained_weights
    return gradient_itemsize(footprint, config) * weights


def staged_weights(footprint: Footprint) -> int:
    """Weights in the two buffers of an offloaded step. Buckets alternate between them; each fits its largest bucket."""
    sizes = _bucket_sizes(footprint)
    return max(sizes[::2]) + max(sizes[1::2], default=0)


def update_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """The temporary memory on the GPU between the last backward pass of an update and the end of the step."""
    largest, gradient = max(_bucket_sizes(footprint)), gradient_itemsize(footprint, config)
    step_in_buckets = gradient < FP32_BYTES or config.stochastic_rounding or config.train_use_8bit_adam
    copies = 0
    if config.zero:
        copies = zero_step_bytes(footprint, config, num_processes, largest)
    elif step_in_buckets and config.offload == "none" and not config.optimizer_in_backward:
        copies = step_bytes(footprint, config)
    # PyTorch's fused AdamW on fp32 gradients copies nothing, and an offloaded step copies on the host

    # before the step, processes average their gradients, and each message is a copy of a bucket
    messages = largest * gradient if num_processes > 1 else 0
    kept = 0 if config.offload != "none" else kept_weight_bytes(footprint, config, num_processes)
    return max(copies, messages) + kept


def kept_weight_bytes(footprint: Footprint, config: DDPOConfig, num_processes: int) -> int:
    """The copy of the weights before an update, which a bounded update keeps; it is where the fp32 weights are."""
    if not config.train_target_update or config.optimizer_in_backward:
        return 0
    itemsize = footprint.itemsize if config.stochastic_rounding else FP32_BYTES
    return itemsize * footprint.trained_weights // (num_processes if config.zero else 1)


def step_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """The temporary copies that one call of the optimizer needs in `step_in_buckets`."""
    copies = fp32_gradient_bytes(footprint, config)
    if config.stochastic_rounding:
        # the bucket's weights in fp32, which are rounded one tensor after the other
        copies += FP32_BYTES * _weights_per_step(footprint, config) + ROUNDING_BYTES * max(footprint.trained_sizes)
    return copies


def fp32_gradient_bytes(footprint: Footprint, config: DDPOConfig) -> int:
    """The fp32 copies of gradients in one call of the optimizer, multiplied by the factor that clips and unscales them.

    A half-precision gradient is first converted and then multiplied, one tensor after the other, so one more copy of
    one tensor exists.
    """
    converts = gradient_itemsize(footprint, config) < FP32_BYTES
    converted = max(footprint.trained_sizes) if converts else 0
    return FP32_BYTES * (_weights_per_step(footprint, config) + converted)


def _bucket_sizes(footprint: Footprint) -> list[int]:
    """The number of weights in each bucket, which is sent as one message or updated by one call of the optimizer."""
    sizes = footprint.trained_sizes
    return [sum(sizes[i] for i in bucket) for bucket in buckets(sizes)]


def _weights_per_step(footprint: Footprint, config: DDPOConfig) -> int:
    """The most weights that one call of the optimizer updates in `step_in_buckets`."""
    return max(footprint.trained_sizes if config.optimizer_in_backward else _bucket_sizes(footprint))
