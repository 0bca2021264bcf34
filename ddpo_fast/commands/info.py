"""`ddpo-fast info`: versions, and which implementation of each op and of attention runs on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from ddpo_fast import ops
from ddpo_fast.unet import choose_kernels, describe_kernels
from ddpo_fast.version import __version__

PACKAGES = ("torch", "triton", "diffusers", "xformers")
# channels of an attention head: 40, 80 and 160 in Stable Diffusion 1.x, 64 in 2.x and XL
SD_HEAD_DIMS = (40, 80, 160, 64)


def run() -> None:
    """Prints the versions, then for each device what runs there and why the rest does not."""
    versions = [f"{name} {version}" for name, version in installed_versions(PACKAGES)]
    print(f"ddpo_fast {__version__}, {', '.join(versions)}")
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        print(f"\n{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
        for op, running, reasons in ops.status(device):
            print(f"  {op:<26}{running}")
            for backend, reason in reasons.items():
                print(f"  {'':<26}not {backend}: {reason}")
        kernels, problems = choose_kernels(SD_HEAD_DIMS, torch.device(device), torch.float16)
        print(f"  {'attention':<26}{describe_kernels(kernels)}")
        for name, problem in problems.items():
            print(f"  {'':<26}not {name}: {problem}")


def installed_versions(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of package and version, or of package and 'not installed'."""
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"
