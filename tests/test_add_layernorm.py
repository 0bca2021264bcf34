from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ddpo_fast_kernels import add_layernorm as kernels
from op_checks import DEVICE, DTYPES, HALVES, assert_as_exact_as_plain, name_of

from ddpo_fast.ops.add_layernorm import FORWARD as add_layernorm_op
from ddpo_fast.ops.add_layernorm import add_layernorm
from ddpo_fast.ops.backend import force_backend

BACKENDS = ("reference", "triton")
EPS = 1e-5
FACTOR = 1.7
# which operands there are, beside x and the norm's vectors
NORM, SUM, BIASED = (), ("residual",), ("residual", "added")
MODULATED, GATED = ("modulated",), ("residual", "added", "gate", "modulated")
# without a residual, x has the bias already
AFTER, LAST, LATER = ("added",), ("residual", "added", "later"), ("later",)
# with the last factors of an adapter
ADAPTED = ("residual", "added", "low", "up")
# one row, several tiles of rows, widths that are and are not a power of two
SHAPES = [(1, 8), (2, 37, 40), (1, 3, 320), (3, 2, 5, 64)]


def example(shape, given, dtype=torch.float32, vectors=None, seed=0):
    """The operands by name; the gradients of s and of y."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, of)

    images, width = shape[0], shape[-1]
    of_norm = (images, width) if "modulated" in given else (width,)
    operands = {
        "x": 2 * draw(*shape) + 0.5,
        **{name: draw(*of_norm, of=vectors or dtype) for name in ("scale", "shift")},
    }
    sizes = {"residual": shape, "added": (width,), "gate": (images, width), "later": (width,)}
    sizes |= {"low": (*shape[:-1], 3), "up": (width, 3)}
    operands |= {name: draw(*sizes[name]) for name in given if name in sizes}
    return operands, (draw(*shape), draw(*shape))


def plain(x, scale, shift, residual=None, added=None, gate=None, later=None, low=None, up=None):
    def over_rows(vector):
        return vector if vector.ndim == 1 else vector.view(len(vector), *[1] * (x.ndim - 2), -1)

    # without a residual, only the gradient of what was added is asked for
    s = x if added is None else x + (added - added.detach() if residual is None else added)
    s = s if low is None else s + FACTOR * (low @ up.t())
    s = s if gate is None else over_rows(gate) * s
    s = s if residual is None else residual + s
    y = F.layer_norm(s, x.shape[-1:], eps=EPS) * over_rows(scale) + over_rows(shift)
    return s if later is None else s + later, y


def fused(x, scale, shift, **others):
    s, y = add_layernorm(x, scale, shift, EPS, **others, factor=FACTOR)
    return s.view(x.shape), y


def norm_of(operands):
    return *(operands[name] for name in ("x", "scale", "shift")), EPS


def with_gradients(function, operands, grads):
    """s, y and the gradients of all operands."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
    results = function(**leaves)
    return *(result.detach() for result in results), *torch.autograd.grad(results, list(leaves.values()), grads)


def check(backend, operands, grads):
    with force_backend(backend):
        actual = with_gradients(fused, operands, grads)
    dtype = operands["x"].dtype
    expected = with_gradients(plain, {name: tensor.to(dtype) for name, tensor in operands.items()}, grads)
    expected = [*expected[:2], *(e.to(o.dtype) for e, o in zip(expected[2:], operands.values(), strict=True))]
    wide = {name: tensor.double() for name, tensor in operands.items()}
    exact = with_gradients(plain, wide, [grad.double() for grad in grads])
    assert_as_exact_as_plain(actual, expected, exact)
    return actual


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [NORM, SUM, BIASED, MODULATED, GATED, AFTER, LAST, LATER, ADAPTED], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, given, shape, monkeypatch):
    """With few programs, one takes several tiles of rows."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(backend, *example(shape, given))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("given", [BIASED, GATED, LAST, ADAPTED], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, given, dtype):
    operands, grads = example((2, 9, 80), given, dtype)
    s, y, *_ = check(backend, operands, grads)
    assert s.dtype == y.dtype == dtype


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_weights_of_a_half_precision_input(backend, dtype):
    check(backend, *example((2, 9, 80), BIASED, dtype, vectors=torch.float32))


@pytest.mark.parametrize("given", [LAST, ADAPTED], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_requires_a_gradient_gets_one(backend, given):
    operands, grads = example((2, 9, 40), given)
    with force_backend(backend):
        everything = dict(zip(operands, with_gradients(fused, operands, grads)[2:], strict=True))
        for name in operands:
            operands[name].requires_grad_()
            torch.autograd.backward(fused(**operands), grads)
            assert torch.equal(operands[name].grad, everything[name])
            operands[name].requires_grad_(False)


@pytest.mark.parametrize("given", [NORM, SUM, LAST], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_results_is_not_used(backend, given):
    operands, grads = example((2, 3, 40), given, torch.float64)
    for used in (0, 1):
        x = operands["x"].requires_grad_()
        with force_backend("reference" if backend == "triton" else backend):
            found = torch.autograd.grad(fused(**operands)[used], x, grads[used])
        expected = torch.autograd.grad(plain(**operands)[used], x, grads[used])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_causes_no_cancellation(backend):
    operands, grads = example((2, 5, 40), SUM)
    operands["x"] += 1000
    with force_backend(backend):
        _, y, *gradients = with_gradients(fused, operands, grads)
    _, exact = plain(**{name: tensor.double() for name, tensor in operands.items()})
    # the sum is rounded to 2^-14, as are the steps of its mean, and the difference is multiplied by less than 2. A
    # variance that cancels is wrong by a hundredth.
    torch.testing.assert_close(y.double(), exact, atol=8 * 2**-14, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_kernels_do_not_support(backend):
    operands, grads = example((4, 6, 40), BIASED)
    operands = {name: t.transpose(0, 1) if t.ndim == 3 else t for name, t in operands.items()}
    check(backend, operands, [grad[:1].expand_as(grad).transpose(0, 1) for grad in grads])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_to_the_last_bit(backend):
    with force_backend(backend):
        first, second = (with_gradients(fused, *example((3, 7, 40), GATED, torch.float16)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("given", [NORM, GATED, LAST, ADAPTED], ids="-".join)
def test_gradcheck(given):
    operands, _ = example((2, 3, 4), given, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in operands.values()]
    assert torch.autograd.gradcheck(lambda *values: fused(**dict(zip(operands, values, strict=True))), leaves)


@pytest.mark.parametrize("given", [BIASED, GATED, LAST, ADAPTED], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, given):
    operands, (of_s, of_y) = example((2, 3, 8), given)
    x, scale, shift, residual, added = (operands[name] for name in ("x", "scale", "shift", "residual", "added"))
    gate, later, low, up = (operands.get(name) for name in ("gate", "later", "low", "up"))
    with force_backend(backend):
        arguments = (x, scale, shift, EPS, residual, added, gate, later, True, low, up, FACTOR)
        _, s, _, mean, rstd = torch.ops.ddpo_fast.add_layernorm(*arguments)
        for needs in ([True, True, gate is not None, later is not None], [False] * 4):
            backward = (of_y, of_s, s, x, scale, mean, rstd, added, gate, later, needs)
            torch.library.opcheck(torch.ops.ddpo_fast.add_layernorm_backward.default, backward)
        arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(torch.ops.ddpo_fast.add_layernorm.default, tuple(arguments))


@pytest.mark.parametrize("given", [NORM, GATED, LAST, ADAPTED], ids="-".join)
def test_compiles_without_a_graph_break(given):
    inputs = example((2, 3, 8), given)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, *inputs), with_gradients(fused, *inputs)))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("parts", [64, 67])
def test_many_parts_are_added_up_in_shares_in_a_fixed_order(parts, monkeypatch):
    """One share, and shares of which the last is smaller."""
    monkeypatch.setattr(kernels, "PROGRAMS", parts)
    monkeypatch.setattr(kernels, "TILE", 8)
    check("triton", *example((1, parts, 8), LAST))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_sum_is_not_stored_beside_its_copy(backend):
    operands, _ = example((2, 3, 40), LAST, torch.float16)
    with force_backend(backend):
        s, y = fused(**operands)
        with torch.no_grad():
            arguments = (operands[name] for name in ("residual", "added"))
            _, stored, *_ = add_layernorm_op(
                *norm_of(operands), *arguments, None, operands["later"], False, None, None, 1.0
            )
            assert not stored.numel()
            assert all(map(torch.equal, fused(**operands), (s, y)))


def test_an_empty_batch():
    results = with_gradients(fused, *example((0, 3, 8), BIASED))
    assert results[0].shape == results[1].shape == (0, 3, 8)
    assert not results[-1].any()


def test_shapes_that_do_not_fit_are_refused():
    operands, _ = example((2, 3, 8), GATED)
    with pytest.raises(ValueError, match="scale and shift have shapes"):
        fused(**{**operands, "shift": operands["shift"][:1]})
    with pytest.raises(ValueError, match="gate has shape"):
        fused(**{**operands, "gate": operands["gate"][:1]})
    with pytest.raises(ValueError, match="no residual"):
        fused(**{name: tensor for name, tensor in operands.items() if name != "residual"})
