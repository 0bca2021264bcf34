"""Compiles `csrc/` against the headers of several versions of torch; prints registers and spills of its CUDA kernels.

    python bench/compile_cuda.py [--torch 2.11.0 2.13.0 installed] [--architectures 80 90] [--output FILE.jsonl]

This needs nvcc and no GPU. `installed` stands for the torch of this Python. Headers of another version are taken from
a wheel that pip downloads: that for macOS, which is the smallest (80 MB) and has the same headers of the stable ABI as
that for Linux. The exit status is 1 if a source does not compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lib.command_line import new_parser

from ddpo_fast.ops import extension

WHEEL = ("--python-version", "3.12", "--platform", "macosx_11_0_arm64", "--platform", "macosx_14_0_arm64")


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.13.0"], metavar="VERSION")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90], help="default: 80 and 90")
    parser.add_argument("--headers", type=Path, help="keep the unpacked headers in this folder")
    parser.add_argument("--output", type=Path, help="write a row for each source there, as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = [
            {"torch": version, **row}
            for version in options.torch
            for row in compiled(headers(version, options.headers or Path(work)), options.architectures, Path(work))
        ]
    for row in rows:
        kernels = row["kernels"]
        print(f"torch {row['torch']:<12}{row['source']:<20}{row['problem'] or 'compiles'}", end="")
        if kernels:
            registers, spilled = (max(kernel[key] for kernel in kernels) for key in ("registers", "spilled_bytes"))
            print(f", {len(kernels)} kernels, at most {registers} registers, {spilled} bytes spilled", end="")
        print()
    if options.output:
        options.output.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return int(any(row["problem"] for row in rows))


def headers(version: str, folder: Path) -> Path:
    """The include folder of a version of torch. Downloads and unpacks it into `folder` unless it is there already."""
    if version == "installed":
        return Path(torch.__file__).parent / "include"
    unpacked = folder / version
    if not unpacked.exists():
        with tempfile.TemporaryDirectory() as work:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, *WHEEL, "--dest", work, f"torch=={version}"], check=True)
            (wheel,) = Path(work).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(Path(work) / "unpacked", names)
            folder.mkdir(parents=True, exist_ok=True)
            (Path(work) / "unpacked").rename(unpacked)
    return unpacked / "torch" / "include"


def compiled(include: Path, architectures: list[int], work: Path) -> Iterator[dict[str, Any]]:
    """For each source its name, the compiler's error if it fails, and each kernel's registers and spilled bytes."""
    flags = extension.include_flags(include)
    # The sources ask for no architecture, so one front end's PTX serves all of them.
    codes = ",".join(f"sm_{architecture}" for architecture in architectures)
    target = f"-gencode=arch=compute_{min(architectures)},code=[{codes}]"
    cuda = ["nvcc", *extension.CUDA_COMMON, target]
    for source in sorted(extension.CSRC.glob("*.cu")):
        yield row(source, [*cuda, *flags, "-Xptxas", "-v", "-c", "-o", str(work / "made.o")])
    # the C++ sources have no kernels, so their syntax and types are checked and nothing is compiled
    for source in sorted(extension.CSRC.glob("*.cpp")):
        yield row(source, ["c++", *extension.CPU_COMMON, *flags, "-fsyntax-only"])


def row(source: Path, command: list[str]) -> dict[str, Any]:
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", done.stderr, re.S)
    return {
        "source": source.name,
        "problem": done.stderr[-3000:] if done.returncode else "",
        "kernels": [{"registers": int(used), "spilled_bytes": int(out) + int(back)} for out, back, used in kernels],
    }


if __name__ == "__main__":
    sys.exit(main())
