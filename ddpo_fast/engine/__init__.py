"""From gradients to weights: on one device, with weights in host memory, or split by DeepSpeed's ZeRO."""

from ddpo_fast.engine.make_engine import compute_dtype, exact_weights, make_engine
from ddpo_fast.engine.optimizers import buckets, make_optimizer
from ddpo_fast.engine.protocol import Engine
from ddpo_fast.engine.zero_settings import accelerate_settings, zero_settings

__all__ = [
    "Engine",
    "accelerate_settings",
    "buckets",
    "compute_dtype",
    "exact_weights",
    "make_engine",
    "make_optimizer",
    "zero_settings",
]
