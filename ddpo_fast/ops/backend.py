"""Which implementation of an op runs, and in words why the others do not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ddpo_fast.ops import extension

BACKENDS = ("triton", "csrc", "reference")  # in the order of preference
VARIABLE = "DDPO_FAST_BACKEND"
# what the kernels compute with; the rest is the reference's
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

OPS: dict[str, Op] = {}

# one for the process and not for a context: autograd runs backward passes in threads of its own
_choice: str | None = None


class Op:
    """A torch custom op `ddpo_fast::NAME` with several implementations; its first argument is a tensor that decides.

    Args:
        name: the op's stem.
        reference: plain PyTorch, the definition: its annotations are the op's schema.
        empty: what the op returns, allocated only, for the same arguments; the op's fake. None for an op that only
            changes its arguments: it is called as it is, since nothing traces or differentiates it.
        triton, csrc: the kernels, where there are any. They import what they need when they are called.
        csrc_devices: where `csrc` runs.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        empty: Callable[..., Any] | None,
        triton: Callable[..., Any] | None = None,
        csrc: Callable[..., Any] | None = None,
        csrc_devices: tuple[str, ...] = ("cpu", "cuda"),
    ) -> None:
        self.name = name
        self.csrc_devices = csrc_devices
        self.implementations = {"triton": triton, "csrc": csrc, "reference": reference}
        OPS[name] = self
        if empty is None:
            self._torch_op: Any = self._run
            return
        schema = torch.library.infer_schema(reference, mutates_args=())
        self._torch_op = torch.library.custom_op(f"ddpo_fast::{name}", self._run, mutates_args=(), schema=schema)
        self._torch_op.register_fake(empty)

    def __call__(self, *arguments: Any) -> Any:
        return self._torch_op(*arguments)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        self._torch_op.register_autograd(backward, setup_context=setup_context)

    def _run(self, first: torch.Tensor, *others: Any) -> Any:
        # no kernel launches without elements, and the mean of nothing is the definition's
        backend = self.backend(first.device.type, first.dtype) if first.numel() else "reference"
        implementation = self.implementations[backend]
        assert implementation is not None
        return implementation(first, *others)

    def backend(self, device_type: str, dtype: torch.dtype) -> str:
        """The backend that runs: the chosen one if the op has it, else the first that can.

        Raises `RuntimeError` with the reasons if the chosen one cannot run.
        """
        choice = chosen_backend()
        if choice == "auto" or self.implementations[choice] is None:
            return next(name for name in BACKENDS if not self.reasons(name, device_type, dtype))
        if reasons := self.reasons(choice, device_type, dtype, forced=True):
            raise RuntimeError(f"{self.name}: the backend {choice!r} was asked for but cannot run: {reasons}")
        return choice

    def reasons(self, backend: str, device_type: str, dtype: torch.dtype, forced: bool = False) -> str:
        """Why `backend` does not run for tensors of this kind, or ''. `forced`: when nothing else would do."""
        if backend == "reference":
            return ""
        if self.implementations[backend] is None:
            return f"{self.name} has no {backend} version"
        if dtype not in KERNEL_DTYPES:
            return f"{str(dtype).removeprefix('torch.')} is computed by the reference only"
        if backend == "triton":
            return triton_reasons(device_type, forced)
        if device_type not in self.csrc_devices:
            return f"{self.name} has C++ for {' and '.join(self.csrc_devices)} only"
        return extension.reasons(device_type)


def triton_kernel(name: str, empty: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that allocates with `empty` what the launcher `name` of its Triton module fills."""
    module = f"ddpo_fast_kernels.{name.removesuffix('_backward')}"
    return _filled(empty, lambda: getattr(importlib.import_module(module), name))


def csrc_kernel(name: str, empty: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that allocates with `empty` what the op `name` of `csrc/` fills."""
    return _filled(empty, lambda: getattr(torch.ops.ddpo_fast_csrc, name))


def _filled(empty: Callable[..., Any], launcher: Callable[[], Callable[..., None]]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        made = empty(*arguments)
        launcher()(*arguments, *(made if isinstance(made, tuple) else (made,)))
        return made

    return run


@functools.cache
def triton_reasons(device_type: str, forced: bool = False) -> str:
    """Why Triton kernels do not run on a device, or ''."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("ddpo_fast_kernels") is None:
        return "ddpo_fast_kernels is not installed: put the folder kernels/ on PYTHONPATH"
    from triton import knobs

    if knobs.runtime.interpret:
        return "" if forced else "TRITON_INTERPRET is set: interpreted kernels run only when asked for"
    if device_type != "cuda":
        return f"Triton has no compiler for {device_type} (TRITON_INTERPRET=1 runs kernels for tests)"
    return ""


def chosen_backend() -> str:
    """'auto' or a backend's name: `use_backend`'s, else the environment's. Raises `ValueError` for another name."""
    choice = _choice or os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"{VARIABLE} is {choice!r} but must be 'auto', {', '.join(map(repr, BACKENDS))}")
    return choice


def use_backend(name: str | None) -> None:
    """Makes this process use a backend wherever an op has it; 'auto' and None leave the choice to the environment."""
    global _choice
    if name not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend is {name!r} but must be 'auto', {', '.join(map(repr, BACKENDS))}")
    _choice = None if name == "auto" else name


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """`use_backend` for a while."""
    before = _choice
    use_backend(name)
    try:
        yield
    finally:
        use_backend(before)


def require_backend(name: str, device_type: str) -> None:
    """`use_backend`, if it can compute every op that it has, for fp32 tensors on the device; else `ValueError`."""
    use_backend(name)
    choice = chosen_backend()
    if choice == "auto":
        return
    having = (op for op in OPS.values() if op.implementations[choice] is not None)
    reasons = next(filter(None, (op.reasons(choice, device_type, torch.float32, forced=True) for op in having)), "")
    if reasons:
        raise ValueError(f"kernel_backend is {choice!r}, which cannot run: {reasons}")


def status(device_type: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """For every op: its name, the backend that runs fp32 tensors on the device, and the others' reasons."""
    for op in OPS.values():
        reasons = {name: op.reasons(name, device_type, torch.float32) for name in BACKENDS}
        try:
            running = op.backend(device_type, torch.float32)
        except RuntimeError as error:
            running = f"none ({error})"
        yield op.name, running, {name: reason for name, reason in reasons.items() if reason and name != running}
