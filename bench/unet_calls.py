"""Times calls of the UNet by the number of rows, with each way of launching its kernels.

    python bench/unet_calls.py [--device cpu|cuda] [--size tiny|full] [--rows N ...] [--output FILE.jsonl]

A call is the forward pass without gradients, as in sampling, or forward and backward pass with all weights, as in
training, of the model that `model.py` makes, fused, in half precision; half of the rows have the negative prompt. The
ways: 'plain'; 'timed', for which cuDNN has timed its convolutions; and with that 'graph', a CUDA graph, 'compiled',
repeated blocks by torch.compile, and 'compiled graph'. `first_s` is the first call's time, in which libraries time and
compilers compile. `host_ms` is what the host takes to launch a call: a graph helps where that is more than `ms`.
On a CPU there is the plain way only, in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lib import records
from lib.command_line import add_device_and_size, new_parser, print_progress
from lib.sd15_random import default_model
from torch import Tensor

from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.unet import compile_blocks, faster_layers, fuse_unet

WAYS = ("plain", "timed", "graph", "compiled", "compiled graph")
ROUNDS = 7


def make_unet(folder: Path, device: str) -> Any:
    from diffusers import UNet2DConditionModel

    dtype = torch.float16 if device == "cuda" else torch.float32
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device)
    return fuse_unet(unet.train().to(memory_format=torch.channels_last), faster_layers(device))


def function_of(unet: Any, trains: bool) -> Callable[..., list[Tensor]]:
    """A call as a function of tensors, which a graph can record; gradients are added up."""

    def call(latents: Tensor, timesteps: Tensor, embeds: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            output = unet(latents, timesteps, embeds, return_dict=False)[0]
            if trains:
                output.backward(torch.ones_like(output))
        return [output.detach()]

    return call


def inputs_of(unet: Any, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and timesteps of half of the rows, which share them with the others, and the embeddings of all."""
    config, images = unet.config, rows // 2
    latents = torch.randn(images, config.in_channels, config.sample_size, config.sample_size)
    embeds = torch.randn(rows, 77, config.cross_attention_dim)
    latents, embeds = (tensor.to(unet.device, unet.dtype) for tensor in (latents, embeds))
    return latents, torch.full((images,), 500, device=unet.device), embeds


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of the first call, and the median milliseconds of later ones and of their launches."""
    begun = time.perf_counter()
    run()
    wait(device)
    first = time.perf_counter() - begun
    # more kinds of memory layouts than the first call's may have to be compiled and timed for
    run()
    wait(device)
    of_host, of_all = [], []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        of_host.append(time.perf_counter() - begun)
        wait(device)
        of_all.append(time.perf_counter() - begun)
    return {"first_s": first, "ms": 1e3 * median(of_all), "host_ms": 1e3 * median(of_host)}


def measure(options: argparse.Namespace) -> list[records.Row]:
    folder, found = default_model(options.device, options.size), []
    for way in options.way:
        torch.backends.cudnn.benchmark = way != "plain"
        unet = make_unet(folder, options.device)
        if "compiled" in way:
            compile_blocks(unet)
        for trains in (False, True):
            for rows in options.rows:
                print_progress(f"{way}, {'training' if trains else 'sampling'}, {rows} rows")
                call, inputs = function_of(unet, trains), inputs_of(unet, rows)
                recorded = Recorded(call) if "graph" in way else None
                run = call if recorded is None else recorded
                of = {"bench": "unet_calls", "way": way, "pass": "training" if trains else "sampling", "rows": rows}
                found.append({**of, **timed(lambda run=run, inputs=inputs: run(*inputs), options.device)})
                del run, recorded
                if options.device == "cuda":
                    # a graph's memory is of no use to the next one
                    torch.cuda.empty_cache()
    return found


def print_table(rows: list[records.Row]) -> None:
    print(f"{'way':<16}{'pass':<10}{'rows':>5}{'ms a call':>11}{'ms a row':>10}{'host ms':>9}{'first s':>9}")
    for row in rows:
        line = f"{row['way']:<16}{row['pass']:<10}{row['rows']:>5}{row['ms']:>11.2f}{row['ms'] / row['rows']:>10.3f}"
        print(f"{line}{row['host_ms']:>9.2f}{row['first_s']:>9.1f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_device_and_size(parser)
    parser.add_argument("--rows", type=int, nargs="+", help="even numbers (default: 4, 24 and 48; 2 on a CPU)")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="default: all that the device has")
    parser.add_argument("--output", type=Path, help="records are added to this file")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.rows = options.rows or ([4, 24, 48] if on_gpu else [2])
    options.way = options.way or (list(WAYS) if on_gpu else ["plain"])
    if odd := [rows for rows in options.rows if rows < 2 or rows % 2]:
        parser.error(f"--rows has {odd[0]} but must have even numbers: guidance takes two rows an image")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = measure(options)
    print_table(rows)
    if options.output:
        facts = records.facts(options.device)
        records.append(options.output, ({**row, **facts} for row in rows))


if __name__ == "__main__":
    main()
