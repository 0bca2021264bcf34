from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, name_of

from ddpo_fast.ops.lora_linear import lora_linear, two_products

SCALING = 1.7


def plain(x, weight, bias, lora_a, lora_b, scaling=SCALING):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)


def example(dtype=torch.float64, rows=(3, 7), inputs=13, outputs=11, rank=4, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    weight, bias = draw(outputs, inputs) / inputs**0.5, draw(outputs) if bias else None
    trained = [draw(*rows, inputs), draw(rank, inputs) / inputs**0.5, draw(outputs, rank)]
    return weight, bias, [t.requires_grad_() for t in trained], draw(*rows, outputs)


def run(function, weight, bias, trained, grad, dtype=None):
    """The output and the gradients of x, A and B, after all operands were converted to `dtype` if one is given."""
    weight, bias, grad = [None if t is None else t.to(dtype or t.dtype) for t in (weight, bias, grad)]
    x, a, b = [t.detach().to(dtype or t.dtype).requires_grad_() for t in trained]
    y = function(x, weight, bias, a, b, SCALING)
    return y, *torch.autograd.grad(y, (x, a, b), grad.to(y.dtype))


SHAPES = [((1,), 1, 1, 1), ((3, 7), 13, 11, 4), ((2, 3, 5), 33, 64, 7), ((257,), 40, 24, 16)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_is_as_exact_as_plain_pytorch(dtype, shape, bias):
    case = example(dtype, *shape, bias=bias)
    assert_as_exact_as_plain(run(lora_linear, *case), run(plain, *case), run(plain, *case, dtype=torch.float64))


def test_an_expanded_gradient_and_a_transposed_input():
    weight, bias, (_, a, b), _ = example()
    x = torch.randn(3, 13, 7, dtype=torch.float64, device=DEVICE).transpose(1, 2).requires_grad_()
    grads = [torch.autograd.grad(f(x, weight, bias, a, b, SCALING).sum(), (x, a, b)) for f in (lora_linear, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_products_of_one_input(dtype):
    weight, _, (x, a, _), grad = example(dtype)

    def both(function, dtype=dtype):
        operands = [tensor.detach().to(dtype) for tensor in (x, weight, a)]
        leaves = [operands[i].requires_grad_() for i in (0, 2)]
        results = function(*operands)
        grads = grad.to(dtype), grad[..., : len(a)].to(dtype)
        return *results, *torch.autograd.grad(results, leaves, grads)

    def separately(x, weight, a):
        return F.linear(x, weight), F.linear(x, a)

    assert_as_exact_as_plain(both(two_products), both(separately), both(separately, torch.float64))


def test_gradcheck_and_opcheck_of_two_products():
    weight, _, (x, a, _), grad = example()
    assert torch.autograd.gradcheck(lambda x, a: two_products(x, weight, a), (x, a))
    torch.library.opcheck(torch.ops.ddpo_fast.two_products, (x, weight, a))
    backward = grad, grad[..., : len(a)].contiguous(), x.detach(), weight, a.detach()
    torch.library.opcheck(torch.ops.ddpo_fast.two_products_backward, backward)


def test_empty_batch():
    case = example(rows=(0, 7))
    y, dx, da, db = run(lora_linear, *case)
    assert y.shape == (0, 7, 11)
    assert dx.shape == (0, 7, 13)
    assert not da.any()
    assert not db.any()


def test_gradcheck():
    weight, bias, trained, _ = example()
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALING), trained)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needed):
    weight, bias, trained, grad = example()
    for tensor, needs in zip(trained, needed, strict=True):
        tensor.requires_grad_(needs)
    (leaf,) = [t for t in trained if t.requires_grad]
    (alone,) = torch.autograd.grad(lora_linear(trained[0], weight, bias, *trained[1:], SCALING), leaf, grad)
    torch.testing.assert_close(alone, run(plain, weight, bias, trained, grad)[1 + needed.index(True)])


def test_opcheck():
    weight, bias, (x, a, b), grad = example()
    forward = torch.ops.ddpo_fast.lora_linear
    torch.library.opcheck(forward, (x, weight, bias, a, b, SCALING))
    torch.library.opcheck(forward, (x, weight, None, a, b, SCALING))
    plain_tensors = [t.detach() for t in (x, weight, a, b)]
    low = plain_tensors[0].reshape(-1, 13) @ plain_tensors[2].t()
    for needs_x in (True, False):
        torch.library.opcheck(torch.ops.ddpo_fast.lora_linear_backward, (grad, *plain_tensors, low, SCALING, needs_x))


def test_fp32_adapters_on_a_half_precision_layer():
    """Without autocast it computes in the layer's dtype, and the gradients of the fp32 adapter are fp32."""
    weight, bias, trained, grad = example(torch.float32)
    half = [t.bfloat16() for t in (weight, bias)]

    def in_bf16(x, weight, bias, a, b, scaling):
        return plain(x.bfloat16(), weight, bias, a.bfloat16(), b.bfloat16(), scaling)

    actual = run(lora_linear, *half, trained, grad)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 3]
    exact = run(plain, *half, trained, grad.bfloat16(), dtype=torch.float64)
    # these gradients were computed in bf16, so their errors are compared with bf16's rounding
    compared = [[t.bfloat16() for t in tensors] for tensors in (actual, run(in_bf16, *half, trained, grad))]
    assert_as_exact_as_plain(*compared, exact)


def test_autocast_decides_the_dtype():
    case = example(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual, expected = run(lora_linear, *case), run(plain, *case)
    exact = run(plain, *case[:3], case[3].bfloat16(), dtype=torch.float64)
    assert [t.dtype for t in actual] == [t.dtype for t in expected] == [torch.bfloat16, *[torch.float32] * 3]
    compared = [[t.bfloat16() for t in tensors] for tensors in (actual, expected)]
    assert_as_exact_as_plain(*compared, exact)


def test_saves_its_operands_and_the_small_product():
    weight, bias, (x, a, b), _ = example()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, SCALING)
    assert sorted(t.shape for t in saved) == sorted([x.shape, weight.shape, a.shape, b.shape, (21, 4)])
    own = {t.untyped_storage().data_ptr() for t in (x, weight, a, b)}
    assert sum(t.untyped_storage().data_ptr() not in own for t in saved) == 1


def test_trained_weights_are_refused():
    weight, bias, (x, a, b), _ = example()
    with pytest.raises(ValueError, match="frozen weights"):
        lora_linear(x, weight.requires_grad_(), bias, a, b, SCALING)
    with pytest.raises(ValueError, match="frozen weights"):
        lora_linear(x, weight.detach(), bias.requires_grad_(), a, b, SCALING)
