"""Chooses the kernels that compute the UNet's attention: PyTorch's scaled_dot_product_attention (SDPA), or xformers'.

On a GPU, SDPA itself has several kernels. The setting 'auto' times all of them, forward and backward, on the device and
takes the fastest. B rows, M tokens, H heads of K channels.
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
# Up to this many scores (query tokens x key tokens) of a head, half-precision SDPA on a CPU is slower than separate
# matrix products and softmax: its backward pass takes 10 to 17 times as long as theirs at 64 x 64 tokens, and 0.6 times
# as long at 1024 x 1024.
FEW_SCORES = 256 * 256
# the kernels that SDPA chooses from on a GPU
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# rows, tokens and heads of the tensors that kernels are timed on, as at a UNet's middle resolutions
TIMED_SHAPE = 4, 1024, 8
WARM_UPS = 3
ROUNDS = 7

# [B, M, H, K] and two of [B, M', H, K] -> [B, M, H, K]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SDPAProcessor(AttnProcessor2_0):
    """The attention of SD's UNets by SDPA, for modules that `is_plain` accepts.

    diffusers' processor divides its result by `rescale_output_factor` even if the factor is 1, in a kernel that reads
    and writes every activation; this processor does not. Calls with a mask, or with images [B, C, H, W] instead of
    token rows, are left to diffusers' processor.

    Args:
        kernel: the name in `SDPA_KERNELS` that SDPA prefers; None leaves the choice to PyTorch.
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
        with _first_choice(self.kernel):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _first_choice(kernel: str | None) -> AbstractContextManager[Any]:
    """A context in which SDPA tries `kernel` first. The others stay allowed, for calls that it does not support."""
    if kernel is None:
        return nullcontext()
    first = SDPA_KERNELS[kernel]
    others = [backend for backend in (*SDPA_KERNELS.values(), SDPBackend.MATH) if backend != first]
    return sdpa_kernel([first, *others], set_priority=True)


def attend_to_few(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention composed of matrix products, for few scores: [B, H, M, K] and two of [B, H, M', K] -> [B, H, M, K].

    The scores are computed in fp32, as in SDPA.
    """
    scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(-1, -2)
    return scores.softmax(-1).to(value.dtype) @ value


class XFormersProcessor(SDPAProcessor):
    """The same attention by xformers, which reads [B, M, H, K] as the projections write it, without a transpose."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # imported here because the import takes seconds
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)


def is_plain(attn: Attention) -> bool:
    """Whether a module consists of projections and softmax attention only, and has one of the usual processors.

    Modules with norms of queries or keys, added projections, a residual connection or a custom processor (IP-Adapter's,
    for instance) compute more than `SDPAProcessor` does, so they must keep their processor.
    """
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
    """Why the attention `name` ('sdpa' or 'xformers') cannot train heads of these sizes on a device, or '' if it can.

    xformers decides by device, dtype and head size whether it has a kernel, so a forward and backward pass over a few
    tokens tries it.
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
    """Why xformers cannot compute heads of this size, forward and backward, or '' if it can."""
    tokens = torch.zeros(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            XFormersProcessor().attend(tokens, tokens, tokens).sum().backward()
    except (RuntimeError, ValueError) as error:
        # only the beginning: xformers' message continues with a list of the inputs, over many lines
        said = str(error).strip().partition("\n")[0].partition(" with inputs")[0]
        kind = str(dtype).removeprefix("torch.")
        return f"xformers refuses head dim {head_dim} in {kind} on {torch.device(device).type}: {said}"
    return ""


def candidate_kernels() -> dict[str, Attend]:
    """The kernels that 'auto' chooses from on a GPU, by name; each raises for head sizes that it does not support."""

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
    """Times a forward and backward pass of each of `attends` for heads of this size.

    The kernels take turns, so that a change of the GPU's clock affects all of them. The shortest time of each kernel
    counts, because disturbances only make times longer.

    Args:
        seconds: measures how long a call takes on the device.

    Returns the name of the fastest kernel, or 'sdpa' if none can run (SDPA then uses plain matrix products), and the
    reason for each kernel that cannot run.
    """
    rows, tokens, heads = TIMED_SHAPE
    shape = rows, tokens, heads, head_dim
    # a separate generator, so that the run's random numbers do not depend on whether kernels are timed
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
                # if a kernel does not support the inputs, PyTorch prints a page of warnings about it
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
    """Resolves 'auto' for heads of these sizes: SDPA on a CPU, the fastest kernel on a GPU.

    Args:
        measured: the results of the run's earlier measurements, which are used again, and extended. A resumed run must
            use the same kernels as before to end with the same bits.
        agree: returns the main process's value in every process.

    Returns the kernel of each head size, and for each kernel that cannot run the reason.

    Raises `ValueError` if the run began with a kernel that cannot run here.
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
        chosen[head_dim] = measured.measure_once(name, partial(measure, head_dim))
    # a choice from an earlier session may need an xformers that is not installed here
    by_xformers = [head_dim for head_dim, name in chosen.items() if name == "xformers"]
    if by_xformers and (problem := attention_problem("xformers", by_xformers, device, dtype)):
        raise ValueError(f"the run's attention was xformers', which cannot run now: {problem}. Set attention='sdpa'")
    return chosen, reasons


def describe_kernels(kernels: Mapping[int, str]) -> str:
    """The kernel's name if all head sizes use the same, else each name with its head size."""
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
    """Sets the attention of a diffusers UNet to `name`: 'sdpa' (PyTorch's), 'xformers', or 'auto'.

    'auto' is the fastest kernel for each head size on a GPU, and 'sdpa' elsewhere. Modules that `is_plain` rejects keep
    their processor.

    Args:
        device, dtype: where and in which dtype the UNet will compute; those of its first parameter if None.
        measured, agree: as for `choose_kernels`.

    Returns the name of the attention that runs, and the reasons why 'auto' could not choose others. Raises `ValueError`
    for an unknown name, and for 'xformers' where it cannot run.
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
