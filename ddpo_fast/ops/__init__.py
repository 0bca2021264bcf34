"""The ops and the choice of their backend. No other package imports kernels.

Each op is defined in plain PyTorch (the backend `reference`) and may have a Triton kernel (`triton`) and a C++ or CUDA
kernel (`csrc`). `backend.py` decides which of them runs; `ddpo-fast info` prints the decision and its reasons.
"""

from ddpo_fast.ops.adamw8bit import adamw8bit_, dequantise, quantise, quantization_map
from ddpo_fast.ops.add_layernorm import add_layernorm
from ddpo_fast.ops.backend import BACKENDS, force_backend, require_backend, status, use_backend
from ddpo_fast.ops.frozen import frozen_conv2d
from ddpo_fast.ops.gaussian import guided, score_step, take_step
from ddpo_fast.ops.geglu import geglu
from ddpo_fast.ops.groupnorm_silu import groupnorm_silu
from ddpo_fast.ops.linear import linear
from ddpo_fast.ops.lora_linear import lora_linear
from ddpo_fast.ops.ppo_loss import PPOLoss, clipped_surrogate, is_clipped, ppo_loss
from ddpo_fast.ops.qkv_linear import lora_qkv_linear, qkv_linear
from ddpo_fast.ops.step_logprob import Step, step_logprob

__all__ = [
    "BACKENDS",
    "PPOLoss",
    "Step",
    "adamw8bit_",
    "add_layernorm",
    "clipped_surrogate",
    "dequantise",
    "force_backend",
    "frozen_conv2d",
    "geglu",
    "groupnorm_silu",
    "guided",
    "is_clipped",
    "linear",
    "lora_linear",
    "lora_qkv_linear",
    "ppo_loss",
    "qkv_linear",
    "quantise",
    "quantization_map",
    "require_backend",
    "score_step",
    "status",
    "step_logprob",
    "take_step",
    "use_backend",
]
