"""What rewards with networks share: weights that are loaded once, at their first use, and where they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ddpo_fast.offload_frozen import offload, on_device

# by the names of the setting `mixed_precision`, with which options in text give them
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# transformers replaces functions of torch while it loads a network: a second load at the same time would make the
# replacements permanent
_LOADING = threading.Lock()


class Network:
    """A network without gradients that is loaded at its first use and follows the images from device to device.

    Several threads may use it. They take turns: a move of the weights in one thread would pull them from under the
    kernels of another. On a GPU a turn is over as soon as the kernels are queued.

    Args:
        load: makes the network in host memory, in fp32.
        device: where it computes (default: where the images are).
        dtype: of the weights, or its name in `DTYPES` (default: fp16 on a GPU, which the published CLIPs are used in,
            and fp32 on a CPU).
        offload: whether the weights wait in host memory between uses; each use then copies them to the device.
    """

    def __init__(
        self, load: Callable[[], nn.Module], device: str | None, dtype: torch.dtype | str | None, offload: bool
    ) -> None:
        self.device = None if device is None else checked_device(device)
        self.dtype = None if dtype is None else checked_dtype(dtype)
        self.offload = offload
        self._load = load
        self._lock = threading.RLock()
        self._module: nn.Module | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[tuple[Any, torch.device, torch.dtype]]:
        """Inside, the network is ready for images that are on `device`: (network, its device, its dtype).

        Gradients and autocast are off inside. Uses may be nested, which copies offloaded weights only once.
        """
        device = self.device or device
        dtype = self.dtype or default_dtype(device)
        with self._lock:
            module = self._placed(device, dtype)
            weights = on_device(module, device) if self.offload else nullcontext()
            with weights, torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield module, device, dtype

    def load(self) -> nn.Module:
        """The network, loaded if this is its first use."""
        with self._lock:
            if self._module is None:
                with _LOADING:
                    self._module = self._load().eval().requires_grad_(False)
            return self._module

    def _placed(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        module = self.load()
        if self._place != (device, dtype):
            # a move that fails half-way is made again
            self._place = None
            if self.offload:
                offload(module, dtype)
            else:
                module.to(device, dtype)
                if device.type == "cuda":
                    # other threads have streams of their own, which do not wait for this one
                    torch.cuda.current_stream(device).synchronize()
            self._place = device, dtype
        return module


def default_dtype(device: torch.device) -> torch.dtype:
    """The type that networks compute in on the device, if none is given."""
    return torch.float16 if device.type == "cuda" else torch.float32


def checked_device(name: str) -> torch.device:
    """The device of that name. Raises `ValueError` if there is none."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {name!r} but must be a name such as 'cpu', 'cuda' or 'cuda:1'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and torch sees {torch.cuda.device_count()} GPUs here: give 'cpu'")
    return device


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype, also of its name. Raises `ValueError` for one that networks are not used in."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r} but must be one of {', '.join(DTYPES)}, or torch's dtype of these")
    return found


def checked_batch_size(batch_size: int) -> int:
    """Returns it. Raises `ValueError` unless it is a whole number of at least 1."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r} but must be a whole number of at least 1")
    return batch_size


def weight_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the network's parameters in `dtype`; the network may be on the meta device."""
    return sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
