"""Chooses which implementation of an op runs, and gives the reasons why others cannot run.

By default an op runs on the first of `BACKENDS` that the op has and that supports the tensor's device and dtype. The
environment variable DDPO_FAST_BACKEND or `use_backend` names another backend. If an op has the named backend and the
backend cannot run, the op raises an error with the reason. An op without the named backend runs on the default.
"""

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

# in order of preference
BACKENDS = ("triton", "csrc", "reference")
VARIABLE = "DDPO_FAST_BACKEND"
# the dtypes that the kernels support; other dtypes (fp64) run on the reference
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# every op, by name
OPS: dict[str, Op] = {}

# The choice of `use_backend`. A global of the process and not a context variable: autograd runs backward passes in
# threads of its own, which would not see the context of the thread that called `backward`.
_choice: str | None = None


class Op:
    """A torch custom op `ddpo_fast::NAME` with several implementations.

    The first argument must be a tensor; its device and dtype decide which implementation runs.

    The registered op is called only where something traces it: torch.compile, a dispatch mode, the device `meta`. Other
    calls run the implementation directly, through a `torch.autograd.Function` if a gradient is needed, because a
    registered Python op costs the host about ten times as much per call (`bench/host_time.py`).

    Args:
        name: the op's name, which is also the name of its modules and kernels.
        reference: the definition in plain PyTorch. Its annotations give the op's schema.
        empty: takes the same arguments and returns uninitialised outputs. It is the op's fake implementation, which
            torch.compile traces. None for an op that only changes its arguments: such an op is called directly, because
            nothing traces or differentiates it.
        triton, csrc: the kernels, if there are any. They import their modules when they are called.
        csrc_devices: the device types that `csrc` is written for.
        shares_memory: whether results may be parts of one tensor. PyTorch forbids that of a registered op, which then
            returns copies.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        empty: Callable[..., Any] | None,
        triton: Callable[..., Any] | None = None,
        csrc: Callable[..., Any] | None = None,
        csrc_devices: tuple[str, ...] = ("cpu",),
        shares_memory: bool = False,
    ) -> None:
        self.name = name
        self.csrc_devices = csrc_devices
        self.implementations = {"triton": triton, "csrc": csrc, "reference": reference}
        self._has_only_reference = triton is None and csrc is None
        OPS[name] = self
        self._function: Any = None
        self._function_with_skip: Any = None
        if empty is None:
            self._torch_op: Any = self._run
            return
        schema = torch.library.infer_schema(reference, mutates_args=())
        run = self._run_apart if shares_memory else self._run
        self._torch_op = torch.library.custom_op(f"ddpo_fast::{name}", run, mutates_args=(), schema=schema)
        self._torch_op.register_fake(empty)

    def __call__(self, *arguments: Any) -> Any:
        if _is_traced(arguments[0]):
            return self._torch_op(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            return self._run(*arguments)
        # an op without a formula for its gradient: the registered one says so when a gradient is asked for
        return self._torch_op(*arguments) if self._function is None else self._function.apply(*arguments)

    def with_skip(self, *arguments: Any) -> Any:
        """The outputs, of which there are several, and after them the first argument, for its next use.

        The gradient of that use is given to the formula of the gradient, after those of the outputs, so that a kernel
        can add it to its own. Otherwise autograd would add them in a kernel that reads and writes both.
        """
        first = arguments[0]
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and first.requires_grad):
            # a compiler fuses the addition itself
            return *self(*arguments), first
        return self._function_with_skip.apply(*arguments)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Registers the gradient, as `torch.library.register_autograd` takes it."""
        self._torch_op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            # not a `setup_context` of its own, for which PyTorch would inspect the signature at each call
            output = self._run(*arguments)
            setup_context(ctx, arguments, output)
            return output

        def forward_with_skip(ctx: Any, *arguments: Any) -> Any:
            output = (self._torch_op if _is_traced(arguments[0]) else self._run)(*arguments)
            setup_context(ctx, arguments, output)
            return *output, arguments[0]

        # a second differentiation would take a kernel's result for a constant
        once = staticmethod(torch.autograd.function.once_differentiable(backward))
        for attribute, run in (("_function", forward), ("_function_with_skip", forward_with_skip)):
            methods = {"forward": staticmethod(run), "backward": once}
            setattr(self, attribute, type(self.name, (torch.autograd.Function,), methods))

    def _run(self, first: torch.Tensor, *others: Any) -> Any:
        # CUDA refuses a launch with an empty grid, and the reference returns what PyTorch does for empty tensors
        backend = self.backend(first.device.type, first.dtype) if first.numel() else "reference"
        implementation = self.implementations[backend]
        assert implementation is not None
        return implementation(first, *others)

    def _run_apart(self, *arguments: Any) -> Any:
        return tuple(result.clone(memory_format=torch.contiguous_format) for result in self._run(*arguments))

    def backend(self, device_type: str, dtype: torch.dtype) -> str:
        """The name of the backend that runs: the chosen one if the op has it, else the first that can run.

        Raises `RuntimeError` with the reason if the chosen one cannot run.
        """
        if self._has_only_reference:
            return "reference"
        choice = chosen_backend()
        if choice == "auto" or not self.has(choice, device_type):
            return next(name for name in BACKENDS if not self.reasons(name, device_type, dtype))
        if reasons := self.reasons(choice, device_type, dtype, forced=True):
            raise RuntimeError(f"{self.name}: the backend {choice!r} was asked for but cannot run: {reasons}")
        return choice

    def has(self, backend: str, device_type: str) -> bool:
        """Whether the op has this backend for a device type."""
        written = backend != "csrc" or device_type in self.csrc_devices
        return written and self.implementations[backend] is not None

    def reasons(self, backend: str, device_type: str, dtype: torch.dtype, forced: bool = False) -> str:
        """Why `backend` does not run for tensors of this device type and dtype, or '' if it does.

        `forced`: the backend was named explicitly. Interpreted Triton kernels are slow and run only then.
        """
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


def _is_traced(first: torch.Tensor) -> bool:
    """Whether torch.compile, a dispatch mode or a tensor without values must see an op, and not what it runs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(first) not in (torch.Tensor, torch.nn.Parameter)
        or first.device.type == "meta"
    )


def triton_kernel(name: str, empty: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of an op by the launcher `name` of a Triton module, which fills what `empty` allocates."""
    module = f"ddpo_fast_kernels.{name.removesuffix('_backward')}"
    return _filled(empty, lambda: getattr(importlib.import_module(module), name))


def csrc_kernel(name: str, empty: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of an op by the op `name` of `csrc/`, which fills what `empty` allocates."""
    return _filled(empty, lambda: getattr(torch.ops.ddpo_fast_csrc, name))


def _filled(empty: Callable[..., Any], launcher: Callable[[], Callable[..., None]]) -> Callable[..., Any]:
    # The launcher is looked up at each call, so that Triton and the compiled library are loaded only when needed.
    def run(*arguments: Any) -> Any:
        made = empty(*arguments)
        launcher()(*arguments, *(made if isinstance(made, tuple) else (made,)))
        return made

    return run


@functools.cache
def triton_reasons(device_type: str, forced: bool = False) -> str:
    """Why Triton kernels do not run on a device type, or '' if they do."""
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
    """Returns 'auto' or the backend named by `use_backend`, else by the environment.

    Raises `ValueError` if the environment names something else.
    """
    choice = _choice or os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"{VARIABLE} is {choice!r} but must be 'auto', {', '.join(map(repr, BACKENDS))}")
    return choice


def use_backend(name: str | None) -> None:
    """Makes this process use the backend `name` for every op that has this backend.

    'auto' and None leave the choice to the environment. Raises `ValueError` for another name.
    """
    global _choice
    if name not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend is {name!r} but must be 'auto', {', '.join(map(repr, BACKENDS))}")
    _choice = None if name == "auto" else name


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """A context in which `use_backend(name)` holds."""
    before = _choice
    use_backend(name)
    try:
        yield
    finally:
        use_backend(before)


def require_backend(name: str, device_type: str) -> None:
    """Calls `use_backend` and checks that every op with this backend on the device can run on it, for fp32 tensors.

    Raises `ValueError` with the reason if an op cannot.
    """
    use_backend(name)
    choice = chosen_backend()
    if choice == "auto":
        return
    having = [op for op in OPS.values() if op.has(choice, device_type)]
    # without one, that of an op which has the backend for another device
    having = having or [op for op in OPS.values() if op.implementations[choice] is not None]
    reasons = next(filter(None, (op.reasons(choice, device_type, torch.float32, forced=True) for op in having)), "")
    if reasons:
        raise ValueError(f"kernel_backend is {choice!r}, which cannot run: {reasons}")


def status(device_type: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields for every op its name, the backend that runs it for fp32 tensors on the device, and why others do not."""
    for op in OPS.values():
        reasons = {name: op.reasons(name, device_type, torch.float32) for name in BACKENDS}
        try:
            running = op.backend(device_type, torch.float32)
        except RuntimeError as error:
            running = f"none ({error})"
        yield op.name, running, {name: reason for name, reason in reasons.items() if reason and name != running}
