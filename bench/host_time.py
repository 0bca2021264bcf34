"""Times what a call of an op costs the host, on tensors that are too small to matter.

    python bench/host_time.py [--rounds N] [--output FILE.jsonl]

For each op a forward pass, and a forward and a backward pass, of the registered custom op ('registered'), of the op as
the trainer calls it ('called'), and of the plain PyTorch that it replaces ('plain'), which take turns in every round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch
import torch.nn.functional as F
from lib import records
from lib.command_line import new_parser

from ddpo_fast.ops import backend
from ddpo_fast.ops.frozen import frozen_conv2d
from ddpo_fast.ops.geglu import geglu
from ddpo_fast.ops.groupnorm_silu import groupnorm_silu
from ddpo_fast.ops.linear import linear
from ddpo_fast.ops.lora_linear import lora_linear

CALLS = 50
Call = Callable[[], torch.Tensor]


def cases() -> dict[str, tuple[Call, Call, list[torch.Tensor]]]:
    """(the op, plain PyTorch, the tensors with a gradient) by name."""

    def trained(*shape: int) -> torch.Tensor:
        return torch.randn(shape).requires_grad_()

    x, image = trained(2, 8), trained(1, 4, 2, 2)
    weight, bias, kernel = torch.randn(8, 8), torch.randn(8), torch.randn(4, 4, 1, 1)
    low, high, scale, shift = trained(2, 8), trained(8, 2), trained(4), trained(4)

    def adapted() -> torch.Tensor:
        return F.linear(x, weight, bias) + 0.5 * F.linear(F.linear(x, low), high)

    def normalised() -> torch.Tensor:
        return F.silu(F.group_norm(image, 2, scale, shift))

    def gated() -> torch.Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return {
        "lora_linear": (lambda: lora_linear(x, weight, bias, low, high, 0.5), adapted, [x, low, high]),
        "frozen_conv2d": (lambda: frozen_conv2d(image, kernel, None), lambda: F.conv2d(image, kernel), [image]),
        "linear": (lambda: linear(x, weight, bias), lambda: F.linear(x, weight, bias), [x]),
        "groupnorm_silu": (
            lambda: groupnorm_silu(image, scale, shift, 2, 1e-5),
            normalised,
            [image, scale, shift],
        ),
        "geglu": (lambda: geglu(x), gated, [x]),
    }


def microseconds(run: Callable[[], Any]) -> float:
    begun = thread_time()
    for _ in range(CALLS):
        run()
    return (thread_time() - begun) / CALLS * 1e6


def measure(rounds: int) -> list[records.Row]:
    registered = backend.Op.__call__, lambda op, *arguments: op._torch_op(*arguments)
    times: dict[tuple[str, str, str], list[float]] = {}
    for index in range(rounds + 1):
        for name, (op, plain, given) in cases().items():
            for way, call, caller in (
                ("registered", op, registered[1]),
                ("called", op, registered[0]),
                ("plain", plain, registered[0]),
            ):
                backend.Op.__call__ = caller
                try:
                    with torch.no_grad():
                        forward = microseconds(call)
                    both = microseconds(lambda call=call, given=given: torch.autograd.grad(call().sum(), given))
                finally:
                    backend.Op.__call__ = registered[0]
                # the first round warms up
                if index:
                    times.setdefault((name, way, "forward"), []).append(forward)
                    times.setdefault((name, way, "forward + backward"), []).append(both)
    return [
        {"bench": "host_time", "op": op, "way": way, "pass": what, "us": median(us), "rounds": us}
        for (op, way, what), us in times.items()
    ]


def print_table(rows: list[records.Row]) -> None:
    print("microseconds of a call: the median of the rounds (least to most)")
    for row in rows:
        line = f"{row['op']:<16}{row['pass']:<20}{row['way']:<12}{row['us']:>8.0f}"
        print(f"{line} ({min(row['rounds']):.0f} to {max(row['rounds']):.0f})")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="records are added to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    print_table(rows)
    if options.output:
        facts = records.facts("cpu")
        records.append(options.output, ({**row, **facts} for row in rows))


if __name__ == "__main__":
    main()
