"""From gradients to new weights: on one device, in host memory, or split over processes by DeepSpeed's ZeRO.

    protocol.py         what the trainer asks of an engine
    make_engine.py      which engine a run has
    local.py            the engine in which each process has all weights
    zero.py             the engine that DeepSpeed splits over processes; zero_fragments.py: which part of a
                        weight a process has; zero_settings.py: DeepSpeed's settings
    master_weights.py   fp32 weights to train, half-precision copies to compute with, and their gradients
    optimizers.py       AdamW, and a step on all weights in place or on a bucket at a time
    offload.py          a step in host memory; host_adamw.py is AdamW with 8-bit moments for it
    moments.py          Adam's moments in checkpoints, whichever optimizer wrote them
    loss_scale.py       fp16's loss scale
    ema.py              a moving average of the weights

Other packages import from here only.
"""

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
