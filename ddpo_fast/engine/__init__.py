"""Turns gradients into new weights: on one device, in host memory, or split over processes by DeepSpeed's ZeRO.

    protocol.py         the interface that the trainer uses
    make_engine.py      chooses a run's engine
    local.py            the engine in which each process has all weights
    zero.py             the engine in which DeepSpeed splits weights and states over processes; zero_fragments.py: which
                        part of a weight a process has; zero_settings.py: DeepSpeed's settings
    master_weights.py   fp32 weights for the optimizer, half-precision copies for the network, and their gradients
    optimizers.py       AdamW, and its step on all weights in place or on a bucket of weights at a time
    offload.py          a step in host memory; host_adamw.py is AdamW with 8-bit moments for it
    from_main.py        gives every process the main one's weights
    moments.py          Adam's moments in checkpoints, in a form that every AdamW implementation here can load
    loss_scale.py       fp16's loss scale
    ema.py              a moving average of the weights

Other packages import from here only.
"""

from ddpo_fast.engine.make_engine import compute_dtype, exact_weights, make_engine
from ddpo_fast.engine.optimizers import BUCKET, buckets, make_optimizer
from ddpo_fast.engine.protocol import Engine
from ddpo_fast.engine.zero_settings import SUB_GROUP, accelerate_settings, zero_settings

__all__ = [
    "BUCKET",
    "SUB_GROUP",
    "Engine",
    "accelerate_settings",
    "buckets",
    "compute_dtype",
    "exact_weights",
    "make_engine",
    "make_optimizer",
    "zero_settings",
]
