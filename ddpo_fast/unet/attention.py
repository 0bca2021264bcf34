"""Which kernels compute the UNet's attention: one of those behind PyTorch's, or xformers'.

B rows, M tokens, H heads of K channels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo_fast.measured import Measured

logger = logging.getLogger(__name__)

ATTENTIONS = ("auto", "sdpa", "xformers")
# Scores of a head for which a CPU's half-precision SDPA is slower than the products that it consists of: its backward
# pass takes 10 to 17 times as long at 64 x 64, and 0.6 times at 1024 x 1024.
FEW_SCORES = 256 * 256
# what PyTorch's attention chooses from on a GPU
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# what kernels are timed on: rows, tokens and heads of a UNet's middle resolutions
TIMED_SHAPE = 4, 1024, 8
WARM_UPS = 3
ROUNDS = 7

# [B, M, H, K] and two of [B, M', H, K] -> [B, M, H, K]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SDPAProcessor(AttnProcessor2_0):
    """Attention as SD's UNets have it, by PyTorch and without diffusers' division by a `rescale_output_factor` of 1.

    For modules that `is_plain` accepts. Masked attention and images that are no token rows go diffusers' way.

    Args:
        kernel: which of `SDPA_KERNELS` computes it wherever it can; None leaves the choice to PyTorch.
    """

    def __init__(self, kernel: str | None = None) -> None:
        super().__init__()
        self.kernel = kernel

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
        with _preferring(self.kernel):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _preferring(kernel: str | None) -> AbstractContextManager[Any]:
    if kernel is None:
        return nullcontext()
    first = SDPA_KERNELS[kernel]
    others = [backend for backend in (*SDPA_KERNELS.values(), SDPBackend.MATH) if backend != first]
    return sdpa_kernel([first, *others], set_priority=True)


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


def candidate_kernels() -> dict[str, Attend]:
    """What a GPU's attention is chosen from: each refuses heads that it has no kernels for."""

    def sdpa(backend: SDPBackend, *rows: torch.Tensor) -> torch.Tensor:
        query, key, value = (row.transpose(1, 2) for row in rows)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    kernels: dict[str, Attend] = {name: partial(sdpa, backend) for name, backend in SDPA_KERNELS.items()}
    return {**kernels, "xformers": XFormersProcessor().attend}


def fastest_kernel(
    head_dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
    attends: Mapping[str, Attend],
    seconds: Callable[[Callable[[], None]], float],
) -> tuple[str, dict[str, str]]:
    """Of `attends` the name that trains heads of this size in the least time, and why others cannot.

    Every one runs forward and backward in turns, and the least of its times counts, as what disturbs a time makes it
    longer. 'sdpa' if none can: then PyTorch composes attention of its products.

    Args:
        seconds: the time that a call takes on the device.
    """
    rows, tokens, heads = TIMED_SHAPE
    shape = rows, tokens, heads, head_dim
    # the default generators are the run's, which draws the same whether it measures or not
    own = torch.Generator(device).manual_seed(0)
    given = [torch.randn(shape, generator=own, device=device, dtype=dtype).requires_grad_() for _ in range(3)]

    def train(attend: Attend) -> None:
        with torch.enable_grad():
            torch.autograd.grad(attend(*given).sum(), given)

    runs: dict[str, Callable[[], None]] = {}
    refused = {}
    for name, attend in attends.items():
        run = partial(train, attend)
        try:
            with warnings.catch_warnings():
                # PyTorch says why it has no kernel in a page of them
                warnings.simplefilter("ignore")
                for _ in range(WARM_UPS):
                    run()
        except (ImportError, RuntimeError, ValueError) as error:
            refused[name] = str(error).strip().partition("\n")[0].partition(" with inputs")[0]
        else:
            runs[name] = run
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    return min(runs, key=lambda name: min(round_[name] for round_ in times), default="sdpa"), refused


def _cuda_seconds(run: Callable[[], None]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def choose_kernels(
    head_dims: Collection[int],
    device: torch.device,
    dtype: torch.dtype,
    measured: Measured | None = None,
    agree: Callable[[str], str] = lambda value: value,
) -> tuple[dict[int, str], dict[str, str]]:
    """What 'auto' is for heads of these sizes, measured on a GPU, and why not another: by head size and by name.

    Args:
        measured: what the run measured before is taken from here, and what it measures now is put there.
        agree: the main process's value in every process.

    Raises `ValueError` if the run's attention of before cannot run now.
    """
    if device.type != "cuda":
        return dict.fromkeys(head_dims, "sdpa"), {"xformers": attention_problem("xformers", (), device)}
    measured = Measured() if measured is None else measured
    kind, where = str(dtype).removeprefix("torch."), torch.cuda.get_device_name(device)
    reasons: dict[str, str] = {}

    def measure(head_dim: int) -> str:
        name, refused = fastest_kernel(head_dim, device, dtype, candidate_kernels(), _cuda_seconds)
        reasons.update({other: f"head dim {head_dim}: {why}" for other, why in refused.items()})
        return agree(name)

    chosen = {}
    for head_dim in sorted(head_dims):
        name = f"attention of head dim {head_dim} in {kind} on {where}"
        chosen[head_dim] = measured.once(name, partial(measure, head_dim))
    late = [head_dim for head_dim, name in chosen.items() if name == "xformers"]
    if late and (problem := attention_problem("xformers", late, device, dtype)):
        raise ValueError(f"the run's attention was xformers', which cannot run now: {problem}. Set attention='sdpa'")
    return chosen, reasons


def describe_kernels(kernels: Mapping[int, str]) -> str:
    """One word for all head sizes if they have one, else one for each."""
    names = set(kernels.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{name} (head dim {k})" for k, name in kernels.items())


def set_attention(
    unet: torch.nn.Module,
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    measured: Measured | None = None,
    agree: Callable[[str], str] = lambda value: value,
) -> tuple[str, str]:
    """Gives a diffusers UNet the attention `name`: 'sdpa' (PyTorch's), 'xformers', or 'auto'.

    'auto' is the fastest on a GPU, for each size of heads, and PyTorch's elsewhere. Modules whose attention is more
    than the usual (norms of q and k, processors of somebody else, ...) keep the processor that they have.

    Args:
        device, dtype: where and in what the UNet will compute; the device and dtype of its first parameter if None.
        measured, agree: as for `choose_kernels`.

    Returns the name of what runs, and why 'auto' could not choose from all. Raises `ValueError` for another name, and
    for 'xformers' where it cannot run.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r} but must be {', '.join(map(repr, ATTENTIONS))}")
    modules: list[Any] = [module for module in unet.modules() if isinstance(module, Attention) and is_plain(module)]
    parameter = next(unet.parameters())
    device, dtype = torch.device(device or parameter.device), dtype or parameter.dtype
    head_dims = {module.inner_dim // module.heads for module in modules}
    kernels = dict.fromkeys(head_dims, name)
    reasons: dict[str, str] = {}
    if name == "auto":
        kernels, reasons = choose_kernels(head_dims, device, dtype, measured, agree)
    elif problem := attention_problem(name, head_dims, device, dtype):
        raise ValueError(f"attention {name!r} was asked for but cannot run: {problem}")
    running = describe_kernels(kernels) or name
    why = "; ".join(f"not {other}: {reason}" for other, reason in reasons.items())
    logger.info("attention: %s%s", running, f" ({why})" if why else "")
    for module in modules:
        module.set_processor(_processor(kernels[module.inner_dim // module.heads]))
    return running, why


def _processor(kernel: str) -> SDPAProcessor:
    if kernel == "xformers":
        return XFormersProcessor()
    return SDPAProcessor(kernel if kernel in SDPA_KERNELS else None)
