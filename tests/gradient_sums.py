"""What an engine makes of known gradients in several processes, against the same in fp64; and the bytes that it takes.

`measure` runs in each process. The processes make different numbers of backward passes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from tiny_run import forget_accelerate_state
from torch import nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import make_engine
from ddpo_fast.plan import zero_bytes
from ddpo_fast.plan.live_bytes import LiveBytes
from ddpo_fast.plan.update_bytes import gradient_bytes

CASES = {
    "ddp-bf16": {"mixed_precision": "bf16"},
    "zero-1-bf16": {"mixed_precision": "bf16", "zero": 1},
    "zero-2-bf16": {"mixed_precision": "bf16", "zero": 2},
    "zero-3-bf16": {"mixed_precision": "bf16", "zero": 3},
    "zero-2-no": {"mixed_precision": "no", "zero": 2},
    "zero-3-no": {"mixed_precision": "no", "zero": 3},
    "zero-2-offload-bf16": {"mixed_precision": "bf16", "zero": 2, "offload": "optimizer"},
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
# backward passes of each process in each update: in the last one no process has a pair to train on
PASSES = ((3, 2), (2, 3), (0, 0))
WIDTH, LAYERS, ROWS, RATE = 48, 12, 8, 0.01
# of the norms of the gradients, 472 and 2425, the second is clipped
LARGEST_NORM = 490.0
# elements of DeepSpeed's buckets, so that a gradient takes several of them, and of the groups of its step
BUCKET, GROUP = 3 * WIDTH**2, 2 * WIDTH**2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(LAYERS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))


def micro_batch(process: int, update: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's input, and the gradient of a loss by its output."""
    generator = torch.Generator().manual_seed(100 * process + 10 * update + number)
    inputs, gradient = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    return inputs, 100 * gradient


def measure(folder: Path) -> None:
    """Saves in `folder`, from the main process: by case, the weights after all updates, the norms, and the bytes."""
    sizes = mock.patch.multiple(sys.modules["ddpo_fast.engine.zero_settings"], BUCKET=BUCKET, SUB_GROUP=GROUP)
    with sizes, mock.patch.multiple(zero_bytes, BUCKET=BUCKET, SUB_GROUP=GROUP):
        found = {name: _case(settings) for name, settings in CASES.items()}
    if torch.distributed.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        torch.save(found, folder / "gradients.pt")


def _case(settings: dict[str, Any]) -> dict[str, Any]:
    forget_accelerate_state()
    accelerator = Accelerator(cpu=True)
    config = DDPOConfig(train_max_grad_norm=LARGEST_NORM, train_learning_rate=RATE, **settings)
    trained, process = network(), accelerator.process_index
    parameters, dtype = list(trained.parameters()), DTYPES[config.mixed_precision]
    footprint: Any = SimpleNamespace(
        trained_weights=sum(p.numel() for p in parameters),
        trained_sizes=[p.numel() for p in parameters],
        itemsize=dtype.itemsize,
    )
    # plain gradient descent, so that a step shows the gradient
    engine = make_engine(
        trained, parameters, lambda p: torch.optim.SGD(list(p), RATE), config.mixed_precision, config, accelerator
    )
    norms, held, peak = [], 0, 0
    for update, passes in enumerate(PASSES):
        mine = passes[process]
        with LiveBytes("cpu") as live, engine.computing():
            for number in range(engine.forward_passes(mine)):
                inputs, gradient = micro_batch(process, update, number)
                output = trained(inputs.to(dtype))
                gradient = gradient * engine.loss_scale() * (number < mine)
                before, started = live.now, len(live.after_op)
                engine.backward_from(output, gradient.to(dtype))
                del inputs, output, gradient
                held, peak = live.now, max(peak, max(live.after_op[started:]) - before)
        norms.append(engine.step()["grad_norm"].item())
    with engine.exact(write=True):
        weights = {name: p.detach().clone() for name, p in trained.named_parameters()}
    return {
        "weights": weights,
        "norms": norms,
        "held": held,
        "peak": peak,
        "predicted_held": gradient_bytes(footprint, config, accelerator.num_processes),
        "predicted_peak": zero_bytes.zero_backward_bytes(footprint, config, accelerator.num_processes),
    }


def exact(precision: str, processes: int = 2) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after all updates, and the norms, computed in fp64 from the rounded weights and inputs."""
    weights, norms, dtype = {n: p.detach().double() for n, p in network().named_parameters()}, [], DTYPES[precision]
    for update, passes in enumerate(PASSES):
        rounded = network().double()
        rounded.load_state_dict({name: weight.to(dtype).double() for name, weight in weights.items()})
        for process in range(processes):
            for number in range(passes[process]):
                inputs, gradient = (x.to(dtype).double() for x in micro_batch(process, update, number))
                rounded(inputs).backward(gradient / processes)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in rounded.named_parameters()}
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
        share = min(1.0, LARGEST_NORM / (norms[-1] + 1e-6))
        weights = {name: weight - RATE * share * gradients[name] for name, weight in weights.items()}
    return weights, norms
