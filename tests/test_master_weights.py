"""The optimizer trains fp32 master weights, the network computes in half precision, and outside it has fp32 weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast.engine.master_weights import MasterWeights


def make(dtype: torch.dtype) -> tuple[nn.Linear, MasterWeights]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    return layer, MasterWeights(list(layer.parameters()), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_is_in_half_precision_only_while_it_computes(dtype):
    layer, weights = make(dtype)
    exact = layer.weight.detach().clone()
    with weights.computing(), weights.computing():
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, exact.to(dtype))
        assert layer(torch.ones(1, 8, dtype=dtype)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, exact)
    assert layer.weight.data_ptr() == weights.masters[0].data_ptr(), "one set of fp32 weights"


def test_gradients_are_accumulated_in_fp32():
    """A sum of 256 ones and then 256 times 2^-9: a bf16 sum would not change after the ones."""
    layer, weights = make(torch.bfloat16)
    with weights.computing():
        for scale in [1.0] * 4 + [2.0**-9] * 256:
            layer(torch.full((1, 8), scale, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is None, "half gradients are freed as soon as they are added"
    gradient = weights.gradients[0]
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((4, 8), 4.5))


def test_small_updates_are_kept():
    """A bf16 weight of 1 cannot change by 1e-4. Its fp32 master weight can, and after 100 steps its copy has."""
    layer, weights = make(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        for _ in range(100):
            with weights.computing():
                for master in weights.masters:
                    master.add_(1e-4)
    torch.testing.assert_close(layer.weight, torch.full((4, 8), 1.01))
    with weights.computing():
        assert layer.weight[0, 0].item() == torch.tensor(1.01).bfloat16().item()


def test_weights_that_are_changed_from_outside_are_used():
    layer, weights = make(torch.float16)
    layer.load_state_dict({"weight": torch.full((4, 8), 0.3), "bias": torch.zeros(4)})
    with weights.computing():
        assert torch.equal(layer.weight, torch.full((4, 8), 0.3).half())


def test_fp32_has_one_set_of_weights():
    layer, weights = make(torch.float32)
    assert all(master is parameter for master, parameter in zip(weights.masters, layer.parameters(), strict=True))
    with weights.computing():
        assert layer.weight.dtype == torch.float32


class Launches(TorchDispatchMode):
    names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_that_keep_their_memory_are_cleared_by_one_launch():
    _, weights = make(torch.bfloat16)
    weights.set_gradient(0, torch.ones(4, 8))
    weights.set_gradient(1, torch.ones(4))
    gradients = weights.gradients
    with Launches() as launches:
        weights.clear_gradients(keep=True)
    assert launches.names == ["_foreach_zero_"]
    assert not any(gradient.any() for gradient in gradients)
    assert all(a is b for a, b in zip(weights.gradients, gradients, strict=True))
    weights.clear_gradients()
    assert weights.gradients == [None, None]
    weights.clear_gradients(keep=True)
