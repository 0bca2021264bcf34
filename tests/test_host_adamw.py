"""The 8-bit optimizer for weights in host memory: its steps and states are those of bitsandbytes."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from run_process import PYTHONPATH, environment, finish
from torch import nn

from ddpo_fast import ops
from ddpo_fast.engine.host_adamw import HostAdamW8bit

bitsandbytes = pytest.importorskip("bitsandbytes")

HYPER_PARAMETERS = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 3e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2},
    {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1},
]
GRADIENTS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "seven magnitudes": lambda n, g: torch.randn(n, generator=g) * 10 ** (-7 * torch.rand(n, generator=g)),
    "mostly zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.1),
    "smooth": lambda n, g: torch.sin(torch.arange(n) * 0.01) + 0.3 * torch.randn(n, generator=g),
}


def parameter(n: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype))


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int = 0, kind: str = "normal") -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = GRADIENTS[kind](p.numel(), generator).view(p.shape).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("settings", HYPER_PARAMETERS)
@pytest.mark.parametrize("n", [1, 300, 4096, 10_000])
def test_fifty_steps_are_those_of_bitsandbytes_and_of_fp64(n, settings, kind):
    """Relative to how far the weights travel. The allowance has two reasons.

    A value in the upper of the seven decades is rounded by up to 3.5 % (half of a 64th of a decade), 2 % on average
    over the moments of gradients that are all of one size. Those of smaller gradients have fewer codes: there the
    error may be that of bitsandbytes on a CPU, whose table of codes is coarser below 3e-5 of a scale.
    """
    ours, theirs, exact = parameter(n), parameter(n), parameter(n, torch.float64)
    start = exact.detach().clone()
    steps(HostAdamW8bit([ours], **settings, min_8bit_size=1), 50, kind=kind)
    steps(bitsandbytes.optim.AdamW8bit([theirs], **settings, min_8bit_size=1), 50, kind=kind)
    steps(torch.optim.AdamW([exact], **settings), 50, kind=kind)
    travelled = rms(exact - start)
    error, their_error = rms(ours - exact) / travelled, rms(theirs - exact) / travelled
    assert error <= 1.1 * their_error + 1e-3
    if kind in ("normal", "smooth"):
        assert error <= 0.035


@pytest.mark.parametrize("settings", HYPER_PARAMETERS)
def test_small_parameters_keep_fp32_moments(settings):
    ours, plain = parameter(4095), parameter(4095)
    optimizer = HostAdamW8bit([ours], **settings)
    steps(optimizer, 20)
    steps(torch.optim.AdamW([plain], **settings), 20)
    assert optimizer.state[ours]["state1"].dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("min_8bit_size", [1, 10**6])
def test_step_with_is_step_and_fills_half_copies(min_8bit_size):
    shapes = ((70, 100), (3,), (4096,))
    made = [[nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
    first, second = (HostAdamW8bit(params, lr=1e-2, min_8bit_size=min_8bit_size) for params in made)
    for i in range(3):
        grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16() for shape in shapes]
        for p, grad in zip(made[0], grads, strict=True):
            p.grad = grad.float() * 0.25
        first.step()
        out = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        second.step_with(grads, out, grad_scale=0.25)
    for p, q, copied in zip(*made, out, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert torch.equal(copied, q.bfloat16())
    second.step_with([None] * 3)
    assert second.state[made[1][0]]["step"] == 3, "without a gradient nothing happens"
    with pytest.raises(ValueError, match="shorter"):
        second.step_with([None])


def test_views_of_a_flat_buffer():
    flat = torch.randn(3 * 5120)
    views = [nn.Parameter(part) for part in flat.clone().split(5120)]
    whole = nn.Parameter(flat.clone())
    one, many = HostAdamW8bit([whole]), HostAdamW8bit(views)
    for i in range(3):
        grad = torch.randn(len(flat), generator=torch.Generator().manual_seed(i))
        one.step_with([grad])
        many.step_with(list(grad.split(5120)))
    assert torch.equal(torch.cat(views), whole)


def test_saved_states_are_loaded_and_training_continues_with_the_same_bits():
    kept, resumed = [parameter(10_000), parameter(100)], [parameter(10_000), parameter(100)]
    first = HostAdamW8bit(kept, lr=1e-2)
    steps(first, 3)
    second = HostAdamW8bit(resumed, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(kept, resumed, strict=True):
        q.data.copy_(p)
        for key, value in first.state[p].items():
            loaded = second.state[q][key]
            assert loaded == value if key == "step" else torch.equal(loaded, value) and loaded.dtype == value.dtype
    assert second.param_groups[0]["lr"] == 1e-2
    steps(first, 2, seed=1)
    steps(second, 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(kept, resumed, strict=True))


def test_states_are_loaded_by_bitsandbytes_and_back():
    ours, theirs, back = parameter(10_000), parameter(10_000), parameter(10_000)
    first, second = HostAdamW8bit([ours], lr=1e-2), bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2)
    steps(first, 3)
    saved = copy.deepcopy(first.state_dict())
    saved["state"][0] |= {"qmap1": ops.quantization_map(True), "qmap2": ops.quantization_map(False)}
    second.load_state_dict(saved)
    third = HostAdamW8bit([back], lr=1e-2)
    third.load_state_dict(second.state_dict())
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(second.state[theirs][key], first.state[ours][key])
        assert torch.equal(third.state[back][key], first.state[ours][key])
    theirs.data.copy_(ours)
    back.data.copy_(ours)
    start = ours.detach().clone()
    for optimizer in (first, second, third):
        steps(optimizer, 1, seed=5)
    assert torch.equal(back, ours)
    # a step is computed before its states are rounded to 8 bits, so from equal states it is equal
    assert rms(theirs - ours) <= 1e-5 * rms(ours - start)


def test_states_of_other_optimizers_are_refused():
    p = parameter(10_000)
    optimizer = HostAdamW8bit([p])
    steps(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["state1"] = wrong["state"][0]["state1"].float()
    with pytest.raises(ValueError, match="state1 of parameter 0 is"):
        optimizer.load_state_dict(wrong)
    saved["state"][0]["qmap1"] = torch.linspace(-1, 1, 256)
    with pytest.raises(ValueError, match="another qmap1"):
        optimizer.load_state_dict(saved)


def test_bad_settings_and_parameters_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        HostAdamW8bit([parameter(3)], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        HostAdamW8bit([parameter(3)], betas=(0.9, 1.0))
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="contiguous fp32 on the CPU"):
        HostAdamW8bit([p]).step()


def test_it_runs_without_a_compiler(tmp_path):
    code = """
import torch
from ddpo_fast.engine.host_adamw import HostAdamW8bit
from ddpo_fast.ops import adamw8bit
assert adamw8bit.OP.backend("cpu", torch.float32) == "reference"
p = torch.nn.Parameter(torch.ones(5000))
HostAdamW8bit([p], lr=0.1, weight_decay=0).step_with([torch.ones(5000)])
assert torch.allclose(p, torch.tensor(0.9)), p
"""
    variables = {"PATH": "/nonexistent", "DDPO_FAST_CACHE": str(tmp_path), "PYTHONPATH": PYTHONPATH}
    finish([sys.executable, "-c", code], env=variables)


DEEPSPEED = """
import sys
import torch
import deepspeed
# DeepSpeed would first compile its op for communication by shared memory
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from ddpo_fast.engine.host_adamw import HostAdamW8bit

deepspeed.init_distributed("gloo", init_method="file://" + sys.argv[1] + "/meeting", rank=0, world_size=1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
optimizer = HostAdamW8bit(net.parameters(), lr=1e-3)
config = {
    "train_micro_batch_size_per_gpu": 16,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
x, y = torch.randn(16, 64).bfloat16(), torch.randn(16, 8)
losses = []
for _ in range(30):
    loss = (engine(x).float() - y).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
assert losses[-1] < 0.2 * losses[0], losses
[state] = optimizer.state.values()
assert state["state1"].dtype == torch.uint8 and state["step"] == 30
engine.save_checkpoint(sys.argv[1], tag="saved")
saved = {key: state[key].clone() for key in ("state1", "state2", "absmax1", "absmax2")}
for tensor in saved:
    state[tensor].zero_()
engine.load_checkpoint(sys.argv[1], tag="saved")
[state] = optimizer.state.values()
for key, tensor in saved.items():
    assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
print("trained by DeepSpeed")
"""


def test_deepspeed_trains_with_it(tmp_path):
    pytest.importorskip("deepspeed")
    variables = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # DeepSpeed requires an address, and does not use it: the process group meets in a file
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", DEEPSPEED, str(tmp_path)]
    done = finish(command, env=environment(**variables), cwd=tmp_path)
    assert "trained by DeepSpeed" in done.stdout
