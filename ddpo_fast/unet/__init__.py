"""Makes a diffusers UNet compute the same function in less time or memory.

`fuse_unet` replaces layers by fused ones, `compile_blocks` compiles repeated blocks, `set_attention` chooses the
attention kernels, `set_gradient_checkpointing` chooses which activations are kept for the backward pass, and
`UNetCache` computes layers whose output does not change between the steps of a rollout only once. None of them changes
a parameter or its name, and outputs stay equal up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from ddpo_fast.unet.attention import (
        FEW_SCORES,
        SDPAProcessor,
        attend_to_few,
        attention_problem,
        choose_kernels,
        describe_kernels,
        is_plain,
        set_attention,
    )
    from ddpo_fast.unet.compiled_blocks import compile_blocks
    from ddpo_fast.unet.fused_layers import faster_layers, fuse_unet, unfuse_unet
    from ddpo_fast.unet.gradient_checkpointing import set_gradient_checkpointing
    from ddpo_fast.unet.linear_layers import FusedLoraLinear
    from ddpo_fast.unet.sampling_cache import UNetCache, cache_problem
    from ddpo_fast.unet.shared_halves import shares_halves

__all__ = [
    "FEW_SCORES",
    "FusedLoraLinear",
    "SDPAProcessor",
    "UNetCache",
    "attend_to_few",
    "attention_problem",
    "cache_problem",
    "choose_kernels",
    "compile_blocks",
    "describe_kernels",
    "faster_layers",
    "fuse_unet",
    "is_plain",
    "set_attention",
    "set_gradient_checkpointing",
    "shares_halves",
    "unfuse_unet",
]

# The module that defines each name, imported when the name is first used: fused_layers needs peft, whose import takes
# seconds, and `ddpo-fast info` asks for the attention only.
_MODULES = {
    "FEW_SCORES": "attention",
    "FusedLoraLinear": "linear_layers",
    "SDPAProcessor": "attention",
    "UNetCache": "sampling_cache",
    "attend_to_few": "attention",
    "attention_problem": "attention",
    "cache_problem": "sampling_cache",
    "choose_kernels": "attention",
    "compile_blocks": "compiled_blocks",
    "describe_kernels": "attention",
    "faster_layers": "fused_layers",
    "fuse_unet": "fused_layers",
    "is_plain": "attention",
    "set_attention": "attention",
    "set_gradient_checkpointing": "gradient_checkpointing",
    "shares_halves": "shared_halves",
    "unfuse_unet": "fused_layers",
}

__getattr__ = lazy_names(__name__, _MODULES)
