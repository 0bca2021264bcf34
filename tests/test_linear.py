"""The linear layer by oneDNN: PyTorch's results, and activations are kept only if a gradient needs them."""

from __future__ import annotations

import sys

import pytest
import torch
from op_checks import assert_as_exact_as_plain
from torch import nn

from ddpo_fast.ops.linear import linear, onednn_is_faster

# `ddpo_fast.ops.linear` is the function, which hides the module
module = sys.modules["ddpo_fast.ops.linear"]


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no mkldnn::_linear_pointwise")
    monkeypatch.setattr(
        module, "onednn_is_faster", lambda device, dtype: request.param == "onednn" and dtype == torch.float32
    )


def operands(*shape: int, outputs: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(*shape), draw(outputs, shape[-1]), draw(outputs)


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (3, 7, 123), (2, 64, 80)], ids=str)
@pytest.mark.parametrize("outputs", [1, 33, 320])
def test_as_exact_as_plain_pytorch(library, shape, outputs):
    narrow = operands(*shape, outputs=outputs)
    exact = [t.detach().double().requires_grad_() for t in narrow]
    results = []
    for function, tensors in ((linear, narrow), (nn.functional.linear, narrow), (nn.functional.linear, exact)):
        y = function(*tensors)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert_as_exact_as_plain(*results)


def test_gradients(library):
    torch.autograd.gradcheck(linear, operands(3, 4, outputs=5, dtype=torch.float64))
    torch.library.opcheck(torch.ops.ddpo_fast.linear.default, operands(3, 4, outputs=5), atol=1e-5, rtol=1e-5)


def test_compiles_without_a_graph_break():
    from ddpo_fast.unet.fused_layers import FusedLinear

    layer = nn.Linear(4, 5)
    layer.__class__ = FusedLinear
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_without_a_bias_and_without_rows(library):
    x, weight, bias = operands(0, 4, outputs=5)
    assert linear(x, weight, None).shape == (0, 5)
    (grad,) = torch.autograd.grad(linear(x, weight, bias).sum(), weight)
    assert torch.equal(grad, torch.zeros(5, 4))


def test_a_frozen_layer_keeps_no_input(library):
    x, weight, _ = operands(6, 4, outputs=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        linear(x, weight.detach(), None)
    assert kept == [weight.shape]
    y = linear(x, weight.detach(), None)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weight.detach().sum(0).expand(6, 4))


def test_used_only_where_it_is_faster():
    assert not onednn_is_faster("cuda", torch.float32)
    assert not onednn_is_faster("cpu", torch.bfloat16)
