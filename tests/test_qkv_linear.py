from __future__ import annotations

import pytest
import torch
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, name_of

from ddpo_fast.ops.qkv_linear import lora_qkv_linear, qkv_linear

SCALING = 1.5


def example(shape=(2, 5, 24), lora=False, dtype=torch.float32):
    """x, three weights of 16 outputs, and with `lora` six factors of rank 3 in fp32 or wider; three gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, of)

    wide = torch.promote_types(dtype, torch.float32)
    factors = [draw(3, shape[-1], of=wide) for _ in range(3)] + [draw(16, 3, of=wide) for _ in range(3)]
    operands = [draw(*shape), *(draw(16, shape[-1]) for _ in range(3)), *(factors if lora else [])]
    return operands, [draw(*shape[:-1], 16) for _ in range(3)]


def plain(x, *operands):
    weights, low, high = operands[:3], operands[3:6], operands[6:]
    results = [x @ weight.t() for weight in weights]
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        results[i] = results[i] + SCALING * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
    return results


def fused(x, *operands):
    if len(operands) == 3:
        return qkv_linear(x, operands)
    return lora_qkv_linear(x, operands[:3], operands[3:6], operands[6:], SCALING)


def with_gradients(function, operands, grads):
    """q, k, v and the gradients of x and of the weights or, with an adapter, of x and of its factors."""
    trained = [len(operands) == 4 or not 1 <= i <= 3 for i in range(len(operands))]
    leaves = [tensor.detach().requires_grad_(of) for tensor, of in zip(operands, trained, strict=True)]
    results = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return *(result.detach() for result in results), *torch.autograd.grad(results, wanted, grads)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (2, 9, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_and_gradients(dtype, shape, lora):
    operands, grads = example(shape, lora, dtype)
    exact = with_gradients(plain, [tensor.double() for tensor in operands], [grad.double() for grad in grads])
    assert_as_exact_as_plain(with_gradients(fused, operands, grads), with_gradients(plain, operands, grads), exact)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradients_of_only_some_results_and_operands(lora):
    operands, grads = example(lora=lora, dtype=torch.float64)
    everything = with_gradients(fused, operands, [grads[0], torch.zeros_like(grads[1]), grads[2]])[3:]
    trained = [0, *range(1, 4)] if not lora else [0, *range(4, 10)]
    for index, expected in zip(trained, everything, strict=True):
        leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(operands)]
        q, _, v = fused(*leaves)
        if index not in (2, 5, 8):
            (found,) = torch.autograd.grad((q, v), leaves[index], (grads[0], grads[2]))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_frozen_weights_do_not_keep_the_input():
    operands, grads = example()
    x = operands[0].requires_grad_()
    q, k, v = fused(*operands)
    assert all(tensor is None or tensor.data_ptr() != x.data_ptr() for tensor in q.grad_fn.saved_tensors)
    (found,) = torch.autograd.grad((q, k, v), x, grads)
    (expected,) = torch.autograd.grad(plain(*operands), x, grads)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_opcheck(lora):
    (x, *operands), _ = example(lora=lora)
    given = [x.requires_grad_(), *operands, *([] if lora else [None] * 6), SCALING]
    torch.library.opcheck(torch.ops.ddpo_fast.qkv_linear.default, tuple(given))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_compiles_without_a_graph_break(lora):
    inputs = example(lora=lora)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, *inputs), with_gradients(fused, *inputs)))


def test_an_adapter_on_trained_weights_is_refused():
    operands, _ = example(lora=True)
    operands[2].requires_grad_()
    with pytest.raises(ValueError, match="is for frozen weights"):
        fused(*operands)
