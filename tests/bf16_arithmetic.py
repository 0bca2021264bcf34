"""Matrix products and convolutions of bf16 for processors that have no instructions for it.

There PyTorch takes plain loops, which need 10 to 50 times as long as fp32. Here the operands are multiplied in fp32 and
the result is rounded to bf16: what a processor with the instructions does, which sums in fp32 too.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
# the capabilities, as PyTorch names them, of processors of the kind x86 without AVX-512
WITHOUT_BF16 = ("DEFAULT", "AVX2")


def multiply_in_fp32() -> torch.library.Library | None:
    """Replaces the operators for as long as the returned library lives; None if the processor multiplies bf16."""
    if torch.backends.cpu.get_cpu_capability() not in WITHOUT_BF16:
        return None
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name in OPERATORS:
            library.impl(name, _in_fp32(torch.library.get_kernel(f"aten::{name}", "CPU")), with_keyset=True)
    return library


def _in_fp32(kernel: Any) -> Any:
    def call(keys: Any, *args: Any, **options: Any) -> Any:
        if args[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keys, *args, **options)
        result = kernel.call_boxed(keys, *(_cast(value, torch.bfloat16, torch.float32) for value in args), **options)
        if isinstance(result, tuple):
            return tuple(_cast(value, torch.float32, torch.bfloat16) for value in result)
        return _cast(result, torch.float32, torch.bfloat16)

    return call


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return value.to(new) if isinstance(value, torch.Tensor) and value.dtype == old else value
