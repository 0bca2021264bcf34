from __future__ import annotations

import pytest
import torch
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, name_of

from ddpo_fast.ops.qkv_linear import lora_qkv_linear, qkv_linear

SCALING = 1.5


def example(shape=(2, 5, 24), lora=False, dtype=torch.float32, biased=False):
    """x, three weights of 16 outputs, with `biased` three biases, and with `lora` six factors of rank 3 in fp32 or
    wider; three gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, of)

    wide = torch.promote_types(dtype, torch.float32)
    factors = [draw(3, shape[-1], of=wide) for _ in range(3)] + [draw(16, 3, of=wide) for _ in range(3)]
    x, weights = draw(*shape), [draw(16, shape[-1]) for _ in range(3)]
    grads = [draw(*shape[:-1], 16) for _ in range(3)]
    biases = [draw(16) for _ in range(3)] if biased else []
    return [x, *weights, *biases, *(factors if lora else [])], grads


def parts(operands):
    """Weights, biases or None, and the factors of adapters."""
    biased = len(operands) in (6, 12)
    rest = operands[6 if biased else 3 :]
    return operands[:3], operands[3:6] if biased else None, rest[:3], rest[3:]


def plain(x, *operands):
    weights, biases, low, high = parts(operands)
    results = [x @ weight.t() for weight in weights]
    if biases:
        results = [result + bias for result, bias in zip(results, biases, strict=True)]
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        results[i] = results[i] + SCALING * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
    return results


def fused(x, *operands, packed=True):
    weights, biases, low, high = parts(operands)
    if not low:
        return qkv_linear(x, weights, biases, packed)
    return lora_qkv_linear(x, weights, low, high, SCALING, biases, packed)


def with_gradients(function, operands, grads):
    """q, k, v and the gradients of x and of weights and biases or, with an adapter, of x and of its factors."""
    frozen = len(operands) - 7 if len(operands) > 7 else 0
    trained = [not 1 <= i <= frozen for i in range(len(operands))]
    leaves = [tensor.detach().requires_grad_(of) for tensor, of in zip(operands, trained, strict=True)]
    results = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return *(result.detach() for result in results), *torch.autograd.grad(results, wanted, grads)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (2, 9, 24)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_and_gradients(dtype, biased, shape, lora):
    operands, grads = example(shape, lora, dtype, biased)
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
    # in which one product makes all three, so that a registered op must copy them
    (x, *operands), _ = example((2, 9, 24), lora)
    weights, factors = operands[:3], operands[3:] or [None] * 6
    given = (x.requires_grad_(), *weights, *[None] * 3, *factors, SCALING, True)
    torch.library.opcheck(torch.ops.ddpo_fast.qkv_linear.default, given)


def test_results_that_are_not_packed_are_dense():
    (x, *weights), _ = example((2, 9, 24))
    assert all(result.stride(-2) == 3 * 16 for result in fused(x, *weights))
    assert all(result.is_contiguous() for result in fused(x, *weights, packed=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_with_adapters_a_row_of_the_packed_results_is_whole_16_bytes(dtype):
    """It also has the products by the three first factors, of rank 3."""
    (x, *operands), _ = example((2, 9, 24), lora=True, dtype=dtype)
    expected = {torch.float32: 3 * 16 + 9 + 3}.get(dtype, 3 * 16 + 9 + 7)
    assert all(result.stride(-2) == expected for result in fused(x, *operands))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_compiles_without_a_graph_break(lora):
    inputs = example(lora=lora)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, *inputs), with_gradients(fused, *inputs)))


@pytest.mark.parametrize("trained", [2, 5], ids=["weight", "bias"])
def test_an_adapter_on_trained_weights_is_refused(trained):
    operands, _ = example(lora=True, biased=True)
    operands[trained].requires_grad_()
    with pytest.raises(ValueError, match="is for frozen weights"):
        fused(*operands)
