from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ddpo_fast_kernels import groups as kernels
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, HALVES, assert_as_exact_as_plain, backends_of, in_layout, name_of
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast.ops.backend import force_backend
from ddpo_fast.ops.groupnorm_silu import groupnorm_silu, groupnorm_silu_and_skip

BACKENDS = backends_of("groupnorm_silu")
EPS = 1e-5

# (N, C, H, W), groups, channels_last: 1, 10, 20, 30, 40, 60, 80 channels a group; 1, 63, 123, 4096 pixels. Interpreted
# programs take tens of milliseconds each, so there are few.
CASES = [
    ((2, 8, 7, 9), 8, True),
    ((2, 8, 7, 9), 8, False),
    ((1, 320, 1, 1), 32, True),
    ((1, 40, 64, 64), 4, True),
    ((1, 20, 64, 64), 2, False),
    ((1, 160, 3, 41), 8, True),
    ((1, 80, 3, 41), 2, False),
    ((1, 240, 9, 7), 8, True),
    ((2, 320, 8, 8), 8, True),
    ((1, 120, 5, 5), 2, False),
    ((1, 320, 3, 3), 4, True),
]


@pytest.fixture
def several_groups(monkeypatch):
    """Makes a kernel program take several groups of a channels_last image, as it does for a large batch."""
    monkeypatch.setattr(kernels, "FULL_GRID", 1)


def example(shape, dtype=torch.float32, channels_last=True, seed=0):
    """x, weight, bias and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    x = 2 * x + 0.5
    if x.ndim == 4:
        x, grad = in_layout(x, channels_last), in_layout(grad, channels_last)
    return [tensor.to(DEVICE, dtype) for tensor in (x, weight, bias, grad)]


def plain(x, weight, bias, groups, eps, silu=True):
    # F.group_norm refuses a group of one value, and its channels_last kernel for CPUs is inexact
    z = torch.group_norm(x.contiguous(), groups, weight, bias, eps)
    return F.silu(z) if silu else z


def with_gradients(function, x, weight, bias, grad, groups, silu=True, eps=EPS):
    """y, dx, dweight and dbias."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*inputs, groups, eps, silu)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def check(backend, inputs, groups, silu=True, eps=EPS):
    with force_backend(backend):
        actual = with_gradients(groupnorm_silu, *inputs, groups, silu, eps)
    x = inputs[0]
    same = [tensor.to(x.dtype) for tensor in inputs]
    exact = with_gradients(plain, *(tensor.double() for tensor in inputs), groups, silu, eps)
    expected = list(with_gradients(plain, *same, groups, silu, eps))
    for i, parameter in enumerate(inputs[1:3], start=2):
        expected[i] = expected[i].to(parameter.dtype)
    assert_as_exact_as_plain(actual, expected, exact)
    return actual


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize(("shape", "groups", "channels_last"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients(backend, dtype, shape, groups, channels_last):
    x, *others = example(shape, dtype, channels_last)
    y, dx, *_ = check(backend, (x, *others), groups)
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_silu_and_with_another_eps(backend, dtype):
    check(backend, example((2, 32, 5, 7), dtype), groups=4, silu=False, eps=0.1)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_parameters_of_a_half_precision_input(backend, dtype):
    x, weight, bias, grad = example((2, 32, 5, 7), dtype)
    check(backend, (x, weight.float(), bias.float(), grad), groups=4)


# hypothesis does not shrink a failure, which would take minutes of interpreted kernels
@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    images=st.integers(1, 2),
    groups=st.sampled_from([2, 3, 4, 6]),
    group_size=st.integers(2, 17),
    pixels=st.lists(st.integers(4, 23), min_size=1, max_size=2),
    channels_last=st.booleans(),
    full_grid=st.sampled_from([1, 4, 264]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_any_shape(backend, poisoned_empty, images, groups, group_size, pixels, channels_last, full_grid, seed):
    shape = (images, groups * group_size, *pixels)
    x, weight, bias, grad = example(shape, channels_last=channels_last, seed=seed)
    if channels_last:
        x, grad = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (x, grad))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FULL_GRID", full_grid)
        y, *_ = check(backend, (x, weight, bias, grad), groups)
    assert y.stride() == x.stride()


# several blocks of channels for each image, of which the last is smaller; more pixels of a channel than are summed at
# once; channels that are not whole vectors
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 96, 32, 33), 6), ((1, 180, 40, 30), 18), ((2, 6, 41, 39), 2), ((3, 1040, 2, 3), 4)]
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cpp_for_many_channels_and_pixels(dtype, channels_last, shape, groups):
    check("csrc", example(shape, dtype, channels_last), groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_image_has_the_same_bits_in_a_batch_of_any_size_in_cpp(channels_last, dtype):
    x, weight, bias, grad = example((5, 24, 9, 11), dtype, channels_last)
    with force_backend("csrc"):
        whole = with_gradients(groupnorm_silu, x, weight, bias, grad, 4)[:2]
        parts = [
            with_gradients(groupnorm_silu, x[rows], weight, bias, grad[rows], 4)[:2]
            for rows in (slice(0, 2), slice(2, 5))
        ]
    for together, *apart in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1, 24, 1, 1), (1, 24, 5, 1), (1, 24, 1, 7), (3, 24, 1, 7), (2, 1, 4, 5)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_sizes_of_one_have_no_meaning(backend, channels_last, shape):
    x, weight, bias, grad = example(shape, channels_last=channels_last)
    odd = [stride if size > 1 else 77 for size, stride in zip(shape, x.stride(), strict=True)]
    check(backend, (x.as_strided(shape, odd), weight, bias, grad), groups=1)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_from_far_below_to_far_above_zero(backend):
    """SiLU and its gradient where the exponential function would be 0 or infinite."""
    x, weight, bias, grad = example((1, 32, 6, 7))
    check(backend, (x, 60 * weight, bias, grad), groups=4)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(2, 16, 40, 40), (2, 16, 3, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_causes_no_cancellation(backend, shape):
    x, weight, bias, grad = example(shape)
    x = x + 1000
    y, *_ = check(backend, (x, weight, bias, grad), groups=2)
    # x itself is rounded to 2^-14, and the statistics must not be less exact
    torch.testing.assert_close(y.double(), plain(*(t.double() for t in (x, weight, bias)), 2, EPS), atol=2e-4, rtol=0)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_of_one_group_that_differ_in_mean(backend):
    x, *others = example((2, 24, 5, 7))
    offsets = torch.arange(24, device=DEVICE, dtype=x.dtype).sub(12).mul(30)[:, None, None]
    check(backend, (x + offsets, *others), groups=2)


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient_and_do_not_change_others(backend):
    x, weight, bias, grad = example((2, 40, 5, 7), torch.float16)
    x.requires_grad_()
    with force_backend(backend):
        _, dx, *_ = with_gradients(groupnorm_silu, x, weight, bias, grad, 4)
        y = groupnorm_silu(x, weight, bias, 4, EPS)
        y.backward(grad)
        assert torch.equal(x.grad, dx)
        # only one of the two parameters is trained
        x.grad = None
        bias.requires_grad_()
        groupnorm_silu(x, weight, bias, 4, EPS).backward(grad)
    assert torch.equal(x.grad, dx)
    assert weight.grad is None
    assert bias.grad.isfinite().all()


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_addend_and_the_gradient_of_a_skip_connection(backend, dtype, channels_last, images):
    """The addend is of each image, or one for all."""
    x, weight, bias, grad = example((2, 40, 9, 7), dtype, channels_last)
    addend = torch.linspace(-3, 3, images * 40, device=DEVICE, dtype=torch.float64).view(images, 40).to(dtype)

    def with_addend(x, weight, bias, addend, of=plain):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, addend)]
        x, *norm, addend = inputs
        if of is plain:
            y = plain(x + addend[:, :, None, None], *norm, 4, EPS)
        else:
            y = groupnorm_silu(x, *norm, 4, EPS, True, addend)
        return y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))

    def with_skip(x, weight, bias, addend, of=plain):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y, skipped = (plain(*inputs, 4, EPS), inputs[0]) if of is plain else groupnorm_silu_and_skip(*inputs, 4, EPS)
        assert torch.equal(skipped, inputs[0])
        return y.detach(), *torch.autograd.grad((y, 3 * skipped), inputs, (grad.to(y.dtype), grad.flip(0).to(y.dtype)))

    inputs = (x, weight, bias, addend)
    for function in (with_addend, with_skip):
        with force_backend(backend):
            actual = function(*inputs, of=groupnorm_silu)
        exact = function(*(tensor.double() for tensor in inputs))
        assert_as_exact_as_plain(actual, function(*inputs), exact)


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize("given", ["residual addend", "residual", "residual addend later", "later"])
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_and_a_later_bias(backend, dtype, channels_last, given):
    """The addend is one for all images. s has other uses, or with a later bias another layer adds to it."""
    x, weight, bias, grad = example((3, 40, 9, 7), dtype, channels_last)
    others = {"residual": 3 * grad.roll(5, 0), "addend": weight[None].flip(1), "later": bias.flip(0)}
    others = {name: others[name] for name in given.split()}

    def both(x, weight, bias, *values, of=plain):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, *values)]
        operands = dict(zip(others, inputs[3:], strict=True))
        if of is plain:
            s = inputs[0] + operands.get("residual", 0)
            s = s + operands["addend"][:, :, None, None] if "addend" in operands else s
            y = plain(s, *inputs[1:3], 4, EPS)
            s = s + operands["later"][:, None, None] if "later" in operands else s
        else:
            y, s = of(*inputs[:3], **operands)
            s = s.view(3, 9, 7, 40).permute(0, 3, 1, 2) if "later" in operands else s
        grads = grad.to(y.dtype), grad.flip(0).to(y.dtype)
        return y.detach(), s.detach(), *torch.autograd.grad((y, s), inputs, grads)

    def fused(x, weight, bias, **operands):
        return groupnorm_silu_and_skip(x, weight, bias, 4, EPS, **operands)

    values = (x, weight, bias, *others.values())
    with force_backend(backend):
        actual = both(*values, of=fused)
        with torch.no_grad():
            y, s = fused(x, weight, bias, **others)
    exact = both(*(tensor.double() for tensor in values))
    assert_as_exact_as_plain(actual, both(*values), exact)
    assert torch.equal(y, actual[0])
    assert torch.equal(s if s.ndim == 4 else s.view(3, 9, 7, 40).permute(0, 3, 1, 2), actual[1])


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_channels_of_two_tensors(backend, dtype, channels_last):
    """Their border is within a group, and a bias is added to the first. Each gets its gradient as a dense tensor; s has
    other uses, or none."""
    s, weight, bias, grad = example((3, 40, 9, 7), dtype, channels_last)
    # the second tensor has another layout than the first
    x, beside = in_layout(s[:, :27], channels_last), in_layout(s[:, 27:], not channels_last)

    def all_of(x, weight, bias, addend, beside, of=plain, uses=2):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, addend, beside)]
        if of is plain:
            s = torch.cat([inputs[0] + inputs[3][:, :, None, None], inputs[4]], 1)
            made = plain(s, *inputs[1:3], 4, EPS), s
        else:
            made = groupnorm_silu_and_skip(*inputs[:3], 4, EPS, addend=inputs[3], beside=inputs[4])
        grads = grad.to(made[0].dtype), grad.flip(0).to(made[0].dtype)
        return *(t.detach() for t in made), *torch.autograd.grad(made[:uses], inputs, grads[:uses])

    values = (x, weight, bias, bias[None, 9:36], beside)
    for uses in (1, 2):
        with force_backend(backend):
            actual = all_of(*values, of=groupnorm_silu_and_skip, uses=uses)
        exact = all_of(*(tensor.double() for tensor in values), uses=uses)
        assert_as_exact_as_plain(actual, all_of(*values, uses=uses), exact)
        for tensor in (*actual[:3], actual[6]):
            assert tensor.stride() == in_layout(tensor, channels_last).stride()
    with force_backend(backend):
        assert torch.equal(groupnorm_silu_and_skip(x, weight, bias, 4, EPS, beside=beside)[1], s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_addend_of_any_strides(backend):
    x, weight, bias, grad = example((3, 40, 5, 4))
    addend = torch.linspace(-3, 3, 120, device=DEVICE).view(40, 3).t()
    results = []
    for added in (addend, addend.contiguous()):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, added)]
        with force_backend(backend):
            y = groupnorm_silu(inputs[0], weight, bias, 4, EPS, True, inputs[1])
            results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    assert all(map(torch.equal, *results))


class Filled(TorchDispatchMode):
    """Counts the tensors that are filled with zeros."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "zero" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_made_of_zeros_for_the_statistics():
    x, weight, bias, grad = example((2, 40, 5, 7))
    y = groupnorm_silu(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 4, EPS)
    with Filled() as filled:
        torch.autograd.grad(y, (x, weight, bias), grad)
    assert filled.count == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_to_the_last_bit(backend):
    inputs = example((3, 40, 5, 7), torch.float16)
    with force_backend(backend):
        first, second = (with_gradients(groupnorm_silu, *inputs, 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("poisoned_empty", "several_groups")
@pytest.mark.parametrize(("value", "channels_last"), [(math.inf, True), (math.nan, True), (math.nan, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_stay_in_their_image_and_group(backend, value, channels_last):
    inputs = example((3, 40, 5, 7), torch.float16, channels_last)
    with force_backend(backend):
        clean = with_gradients(groupnorm_silu, *inputs, 4)[:2]
        inputs[0][1, 23, 2, 3] = value
        hit = with_gradients(groupnorm_silu, *inputs, 4)[:2]
    for before, after in zip(clean, hit, strict=True):
        assert not after[1, 20:30].isfinite().any()
        after[1, 20:30] = before[1, 20:30]
        assert torch.equal(before, after)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_kernels_do_not_support(backend):
    x, weight, bias, grad = example((2, 32, 5, 14))
    check(backend, (x[..., ::2], weight, bias, grad[..., ::2]), groups=2)
    # the gradient has another layout than x
    check(backend, (x, weight, bias, grad.contiguous()), groups=2)
    check(backend, (x.contiguous(), weight, bias, grad[:1].expand_as(x)), groups=2)
    # the parameters are columns of a matrix, so not contiguous
    columns = torch.stack([weight, bias], dim=1)
    check(backend, (x, columns[:, 0], columns[:, 1], grad), groups=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    x, weight, bias, grad = example((0, 32, 5, 7))
    with force_backend(backend):
        y, dx, dweight, dbias = with_gradients(groupnorm_silu, x, weight, bias, grad, 8)
    assert y.shape == dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_one_value_becomes_the_bias(backend):
    x, weight, bias, _ = example((2, 8, 1, 1))
    with force_backend(backend):
        y = groupnorm_silu(x, weight, bias, 8, EPS)
    # plain PyTorch multiplies x and the mean by the scale before it subtracts them, which rounds
    torch.testing.assert_close(y, F.silu(bias)[None, :, None, None].expand_as(y), atol=1e-4, rtol=0)


def test_gradcheck_of_a_sum():
    x, weight, bias, _ = example((2, 4, 2, 3), torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, 2 * weight[None], x.roll(3, 0), 3 * bias)]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def of(x, weight, bias, *others):
        return groupnorm_silu_and_skip(x, weight, bias, 2, EPS, True, *others)

    assert torch.autograd.gradcheck(of, inputs)


def test_gradcheck_of_two_tensors():
    s, weight, bias, _ = example((2, 6, 2, 3), torch.float64)
    inputs = [tensor.detach().requires_grad_() for tensor in (s[:, :4], weight, bias, s[:, 4:])]

    def of(x, weight, bias, beside):
        return groupnorm_silu_and_skip(x, weight, bias, 2, EPS, True, beside=beside)

    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu, channels_last):
    x, weight, bias, _ = example((2, 4, 2, 3), torch.float64, channels_last)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *inputs: groupnorm_silu(*inputs, 2, EPS, silu), inputs)


@pytest.mark.parametrize(
    ("backend", "channels_last"),
    [("reference", True), ("reference", False), ("triton", True), ("csrc", True), ("csrc", False)],
)
def test_opcheck(backend, channels_last):
    x, weight, bias, grad = example((2, 8, 2, 3), torch.float32, channels_last)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    with force_backend(backend):
        forward = torch.ops.ddpo_fast.groupnorm_silu.default
        torch.library.opcheck(forward, (*inputs, 2, EPS, True, None, None, None, True, None))
        parts = [in_layout(part, channels_last).detach().requires_grad_() for part in x.split([5, 3], 1)]
        torch.library.opcheck(forward, (parts[0], *inputs[1:], 2, EPS, True, None, None, None, True, parts[1]))
        addend, skip = torch.ones(2, 8, device=DEVICE), grad.clone()
        torch.library.opcheck(forward, (*inputs, 2, EPS, True, addend, None, None, True, None))
        torch.library.opcheck(forward, (*inputs, 2, EPS, True, addend[:1], skip, weight.clone(), True, None))
        saved = [t.detach() for t in forward(*inputs, 2, EPS, True, addend, None, None, True, None)[3:]]
        for affine, summed, width in ((True, False, 0), (False, False, 0), (True, True, 0), (True, True, 5)):
            backward = torch.ops.ddpo_fast.groupnorm_silu_backward.default
            given = (x.detach(), grad, skip if summed else None, weight.detach(), bias.detach())
            given += (addend[:1] if summed else addend, bias.detach() if summed else None, *saved)
            torch.library.opcheck(backward, (*given, EPS, True, summed, width, [affine, affine, summed]))


def test_compiles_without_a_graph_break():
    inputs = example((2, 8, 2, 3))
    compiled = torch.compile(groupnorm_silu, fullgraph=True, backend="aot_eager")
    expected = with_gradients(groupnorm_silu, *inputs, 2)
    assert all(map(torch.equal, with_gradients(compiled, *inputs, 2), expected))


def test_shapes_that_do_not_fit_are_refused():
    x, weight, bias, _ = example((2, 8, 2, 3))
    with pytest.raises(ValueError, match="divisible by 3 groups"):
        groupnorm_silu(x, weight, bias, 3, EPS)
    with pytest.raises(ValueError, match="bias has shape"):
        groupnorm_silu(x, weight, bias[:4], 2, EPS)
    with pytest.raises(ValueError, match="addend has shape"):
        groupnorm_silu(x, weight, bias, 2, EPS, True, bias)


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560])
@pytest.mark.parametrize(("images", "itemsize"), [(2, 2), (24, 2), (96, 2), (96, 4)])
def test_a_program_takes_several_groups_only_if_there_are_enough_programs(images, channels, itemsize):
    (blocks, _), tile, _ = kernels.tiling(images, channels, 4096, 32, itemsize, channels_last=True)
    owned = tile["GROUPS"]
    assert blocks * owned == 32
    assert owned == 1 or blocks * images >= kernels.FULL_GRID
    if images == 96:
        segment = owned * tile["GROUP_SIZE"] * itemsize
        assert segment >= 64
        assert segment % 16 == 0
