"""Compiles every Triton kernel ahead of time, without a GPU, and prints the resources that each kernel uses.

    python bench/compile_kernels.py [--output FILE.json] [--architectures 80 90] [--only STEM] [--thin]

These are the registers of a thread, the shared memory of a block in bytes, and the spilled bytes of a thread, as
`cuobjdump` reads them from the machine code.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from lib import KERNELS
from lib.command_line import new_parser
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, help="write a row for each kernel there, as JSON lines")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90], help="default: 80 and 90")
    parser.add_argument("--only", default="", help="only the kernels of this op")
    parser.add_argument("--thin", action="store_true", help="fp16 for the first architecture, all else for the others")
    options = parser.parse_args()
    rows = list(compile_all(options.architectures, options.only, options.thin))
    print(f"{'kernel':<72}{'sm':>4}{'warps':>7}{'registers':>11}{'shared':>8}{'spilled':>9}")
    for row in rows:
        name = f"{row['op']} {row['kernel']}"
        print(
            f"{name:<72}{row['sm']:>4}{row['warps']:>7}{row['registers']:>11}{row['shared_bytes']:>8}"
            f"{row['spilled_bytes']:>9}"
        )
    if options.output:
        options.output.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def compile_all(architectures: list[int], only: str, thin: bool) -> Iterator[dict[str, Any]]:
    for module_info in pkgutil.iter_modules([str(KERNELS / "ddpo_fast_kernels")]):
        module = importlib.import_module(f"ddpo_fast_kernels.{module_info.name}")
        if hasattr(module, "ahead_of_time") and only in ("", module_info.name):
            for architecture in architectures:
                for case in module.ahead_of_time():
                    if thin and ("fp16" in case[0]) != (architecture == architectures[0]):
                        continue
                    yield {"op": module_info.name, "triton": triton.__version__, **compiled(architecture, *case)}


def compiled(
    architecture: int, name: str, kernel: Any, signature: dict[str, Any], constants: dict[str, Any], warps: int
) -> dict[str, Any]:
    """A kernel's row: what it needs of a GPU, and what the tests check in its intermediate code."""
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned(signature)),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ttir = made.asm["ttir"]
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", made.asm["ttgir"], re.MULTILINE))
    sums = re.findall(r"\}\) : \(tensor<(\w+), (#\w+)>\) -> f32", made.asm["ttgir"])
    return {
        "kernel": name,
        "sm": architecture,
        "warps": warps,
        "registers": found["REG"],
        "shared_bytes": max(found["SHARED"], made.metadata.shared),
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        # The types of offsets of two-dimensional pointers. These point to activations, which may have more elements
        # than an int32 counts.
        "offsets": sorted(set(re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\w+x(i\d+)>", ttir))),
        "atomics": re.findall(r"\b(atom[.\w:]+)", made.asm["ptx"]),
        # whether the threads of a program wait for each other between their last stores and each of these
        "barriers": all("bar.sync" in code[code.rfind("st.global") :] for code in made.asm["ptx"].split("atom.")[:-1]),
        "contractible": contractible(ttir),
        "sums": [f"{shape} {layouts[layout]}" for shape, layout in sums],
        "vector_loads": len(re.findall(r"ld\.global[.\w:]*\.v[24]", made.asm["ptx"])),
    }


def contractible(ttir: str) -> int:
    """How many additions have a product as an operand.

    A compiler may fuse such an addition with the multiplication, which then rounds once instead of twice. If it does so
    in one kernel and not in another, their results differ.
    """
    products = set(re.findall(r"(%\S+) = arith\.mulf ", ttir))
    sums = re.findall(r"= arith\.(?:addf|subf) (%\S+), (%\S+) :", ttir)
    return sum(not products.isdisjoint(operands) for operands in sums)


def aligned(signature: dict[str, Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Tells the compiler which arguments are multiples of 16: PyTorch's pointers and all sizes here.

    At run time, Triton's just-in-time compiler finds this out from the arguments.
    """
    paths = []
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            paths += [(i, j) for j, part in enumerate(kind) if part.startswith("*")]
        elif kind.startswith(("*", "i32")):
            paths.append((i,))
    return {path: [["tt.divisibility", 16]] for path in paths}


if __name__ == "__main__":
    main()
