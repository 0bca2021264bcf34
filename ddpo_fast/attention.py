"""Which kernels compute the UNet's attention: PyTorch's or xformers'.

B rows, M tokens, H heads of K channels.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor

logger = logging.getLogger(__name__)

ATTENTIONS = ("auto", "sdpa", "xformers")
# Scores of a head for which a CPU's half-precision SDPA is slower than the products that it consists of: its backward
# pass takes 10 to 17 times as long at 64 x 64, and 0.6 times at 1024 x 1024.
FEW_SCORES = 256 * 256


class SDPAProcessor(AttnProcessor2_0):
    """Attention as SD's UNets have it, by PyTorch and without diffusers' division by a `rescale_output_factor` of 1.

    For modules that `is_plain` accepts. Masked attention and images that are no token rows go diffusers' way.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (rows.unflatten(-1, (attn.heads, -1)) for rows in projected)
        projection, dropout = attn.to_out
        return dropout(projection(self.attend(query, key, value).flatten(2)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, M, H, K] and two of [B, M', H, K] -> [B, M, H, K]."""
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        few = query.shape[-2] * key.shape[-2] <= FEW_SCORES
        if few and query.device.type == "cpu" and query.dtype in (torch.float16, torch.bfloat16):
            return attend_to_few(query, key, value).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_to_few(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, H, M, K] and two of [B, H, M', K] -> [B, H, M, K]; the scores are fp32, as in SDPA."""
    scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(-1, -2)
    return scores.softmax(-1).to(value.dtype) @ value


class XFormersProcessor(SDPAProcessor):
    """The same by xformers, which takes the heads where the projections put them."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # importing it takes seconds, so nobody pays who does not use it
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)


def is_plain(attn: Attention) -> bool:
    """Whether a module's attention is the projections, the softmax and nothing else, in one of the usual processors."""
    usual = (AttnProcessor2_0, XFormersAttnProcessor, SDPAProcessor, XFormersProcessor)
    absent = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        type(attn.processor) in usual
        and all(getattr(attn, name, None) is None for name in absent)
        and attn.to_k is not None
        and attn.to_out is not None
        and attn.scale_qk
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


def attention_problem(
    name: str, head_dims: Collection[int], device: torch.device | str, dtype: torch.dtype = torch.float16
) -> str:
    """Why the attention `name` ('sdpa' or 'xformers') cannot train heads of these sizes on a device, or ''.

    xformers is asked for kernels by a forward and backward pass over a few tokens.
    """
    if name == "sdpa":
        return ""
    device_type = torch.device(device).type
    if device_type != "cuda":
        return f"xformers' attention runs on CUDA only, not on {device_type}"
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return f"xformers cannot be imported ({error})"
    return next(filter(None, (_refusal(head_dim, device, dtype) for head_dim in sorted(set(head_dims)))), "")


def _refusal(head_dim: int, device: torch.device | str, dtype: torch.dtype) -> str:
    """Why xformers does not compute heads of this size, forward and backward, or ''."""
    tokens = torch.zeros(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            XFormersProcessor().attend(tokens, tokens, tokens).sum().backward()
    except (RuntimeError, ValueError) as error:
        # its own message goes on with the inputs, over many lines
        said = str(error).strip().partition("\n")[0].partition(" with inputs")[0]
        kind = str(dtype).removeprefix("torch.")
        return f"xformers refuses head dim {head_dim} in {kind} on {torch.device(device).type}: {said}"
    return ""


def set_attention(
    unet: torch.nn.Module, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """Gives a diffusers UNet the attention `name`: 'sdpa' (PyTorch's), 'xformers', or 'auto'.

    'auto' is xformers where it has kernels and PyTorch elsewhere. Modules whose attention is more than the usual (norms
    of q and k, processors of somebody else, ...) keep the processor that they have.

    Args:
        device, dtype: where and in what the UNet will compute; the device and dtype of its first parameter if None.

    Returns the name of what runs, and why it is not xformers where 'auto' could not have that, else ''. Raises
    `ValueError` for another name, and for 'xformers' where it cannot run.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r} but must be {', '.join(map(repr, ATTENTIONS))}")
    modules: list[Any] = [module for module in unet.modules() if isinstance(module, Attention) and is_plain(module)]
    parameter = next(unet.parameters())
    head_dims = {module.inner_dim // module.heads for module in modules}
    wanted = "xformers" if name == "auto" else name
    problem = attention_problem(wanted, head_dims, device or parameter.device, dtype or parameter.dtype)
    if problem and name != "auto":
        raise ValueError(f"attention {name!r} was asked for but cannot run: {problem}")
    running = "sdpa" if problem else wanted
    logger.info("attention: %s%s", running, f" ({problem})" if problem else "")
    processor = {"sdpa": SDPAProcessor, "xformers": XFormersProcessor}[running]
    for module in modules:
        module.set_processor(processor())
    return running, problem
