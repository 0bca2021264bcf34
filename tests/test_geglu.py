from __future__ import annotations

import math

import pytest
import torch
from ddpo_fast_kernels import geglu as kernels
from diffusers.models.activations import GEGLU
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, backends_of, name_of

from ddpo_fast.ops.backend import force_backend
from ddpo_fast.ops.geglu import geglu

BACKENDS = backends_of("geglu")


class WithoutProjection(GEGLU):
    """diffusers' GEGLU, applied to the output of its projection."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.proj = torch.nn.Identity()


plain = WithoutProjection()


def example(shape, dtype=torch.float32, seed=0):
    """x [..., 2I] and the gradient of y [..., I]."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype), grad.to(DEVICE, dtype)


def with_gradient(function, x, grad, bias=None):
    """y, dx and, with a bias, its gradient."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, bias) if tensor is not None]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def check(backend, x, grad, bias=None):
    def plain_sum(x, bias=None):
        return plain(x if bias is None else x + bias.to(x.dtype))

    with force_backend(backend):
        actual = with_gradient(geglu, x, grad, bias)
    expected = with_gradient(plain_sum, x, grad, bias)
    wide = (tensor if tensor is None else tensor.double() for tensor in (x, grad, bias))
    assert_as_exact_as_plain(actual, expected, with_gradient(plain_sum, *wide))
    return actual


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(2,), (1, 2), (63, 10), (3, 41, 246), (2, 9, 2560), (5, 1, 514)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(backend, dtype, shape):
    y, dx = check(backend, *example(shape, dtype))
    assert y.is_contiguous()
    assert dx.is_contiguous()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(2,), (63, 10), (3, 41, 246), (2, 9, 1030)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_the_projection_has_not_added(backend, dtype, shape, monkeypatch):
    """With few programs, one takes several tiles of rows."""
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    bias = torch.linspace(-1, 1, shape[-1], device=DEVICE)
    # in the dtype of x, and in fp32, as the weights that autocast casts
    for parameter in (bias.to(dtype), bias):
        check(backend, *example(shape, dtype), parameter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_bias_gets_no_gradient_and_does_not_change_that_of_x(backend):
    x, grad = example((9, 40), torch.float16)
    bias = torch.linspace(-1, 1, 40, device=DEVICE, dtype=torch.float16)
    with force_backend(backend):
        y, dx, _ = with_gradient(geglu, x, grad, bias)
        assert all(map(torch.equal, with_gradient(lambda x: geglu(x, bias), x, grad), (y, dx)))


# hypothesis does not shrink a failure, which would take minutes of interpreted kernels
@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.generate])
@given(shape=st.lists(st.integers(1, 9), max_size=3), inner=st.integers(1, 300), seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_any_shape(backend, shape, inner, seed):
    check(backend, *example((*shape, 2 * inner), seed=seed))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 4442), (193, 34)])
def test_cpp_takes_long_rows_in_pieces_and_sums_many_rows_in_chunks(shape, dtype):
    check("csrc", *example(shape, dtype), torch.linspace(-1, 1, shape[1], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_has_the_same_bits_in_a_batch_of_any_size_in_cpp(dtype):
    x, grad = example((9, 7, 70), dtype)
    with force_backend("csrc"):
        whole = with_gradient(geglu, x, grad)
        parts = [with_gradient(geglu, x[rows], grad[rows]) for rows in (slice(0, 4), slice(4, 9))]
    for together, *apart in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_from_far_below_to_far_above_zero(backend):
    gates = torch.linspace(-30, 30, 1201, device=DEVICE)
    x, grad = example((1, 2402))
    x[:, 1201:] = gates
    check(backend, x, grad)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_kernels_do_not_support(backend):
    x, grad = example((6, 5, 24))
    check(backend, x.transpose(0, 1), grad.transpose(0, 1))
    check(backend, x[..., ::2], grad[..., ::2])
    check(backend, x, grad[:1].expand_as(grad))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_stay_in_their_place(backend, value):
    x, grad = example((3, 40), torch.float16)
    with force_backend(backend):
        y, dx = with_gradient(geglu, x, grad)
        x[1, 27] = value
        hit, dhit = with_gradient(geglu, x, grad)
    assert not hit[1, 7].isfinite()
    assert not dhit[1, [7, 27]].isfinite().all()
    hit[1, 7], dhit[1, 7], dhit[1, 27] = y[1, 7], dx[1, 7], dx[1, 27]
    assert torch.equal(hit, y)
    assert torch.equal(dhit, dx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_to_the_last_bit(backend):
    x, grad = example((7, 50), torch.float16)
    with force_backend(backend):
        first, second = with_gradient(geglu, x, grad), with_gradient(geglu, x, grad)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors(backend, shape):
    x, grad = example(shape)
    with force_backend(backend):
        y, dx = with_gradient(geglu, x, grad)
    assert y.shape == grad.shape
    assert dx.shape == x.shape


def test_gradcheck():
    x, _ = example((3, 8), torch.float64)
    assert torch.autograd.gradcheck(geglu, x.requires_grad_())
    assert torch.autograd.gradcheck(
        geglu, (x, torch.linspace(-1, 1, 8, dtype=torch.float64, device=DEVICE).requires_grad_())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, grad = example((3, 8))
    with force_backend(backend):
        for bias in (None, x[0].clone()):
            backward = torch.ops.ddpo_fast.geglu_backward.default
            torch.library.opcheck(backward, (grad, x.detach(), bias, bias is not None))
            given = bias if bias is None else bias.requires_grad_()
            torch.library.opcheck(torch.ops.ddpo_fast.geglu.default, (x.requires_grad_(), given))


def test_compiles_without_a_graph_break():
    inputs = example((3, 8))
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradient(compiled, *inputs), with_gradient(geglu, *inputs)))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="must be even"):
        geglu(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="x has 6 columns"):
        geglu(torch.zeros(3, 6), torch.zeros(3))
