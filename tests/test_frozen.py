from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, in_layout, name_of
from torch.overrides import TorchFunctionMode

from ddpo_fast.ops import frozen
from ddpo_fast.ops.frozen import frozen_conv2d

# the input, the weight, stride, padding, dilation, groups
CASES = {
    "3x3": ((2, 6, 9, 7), (8, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "shortcut": ((2, 6, 5, 5), (8, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "downsampling": ((2, 6, 8, 8), (6, 6, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "grouped, dilated": ((3, 6, 9, 8), (4, 3, 3, 2), (2, 1), (2, 0), (1, 2), 2),
    "one pixel": ((1, 1, 1, 1), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    # on a CPU only calls of more than 16 images run channels_last kernels
    "many images": ((17, 2, 3, 3), (4, 2, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "many shortcuts": ((17, 2, 3, 3), (4, 2, 1, 1), (1, 1), (0, 0), (1, 1), 1),
}


def example(case, dtype=torch.float64, channels_last=False, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    shape, weight_shape, *geometry = CASES[case]
    x, weight = [in_layout(draw(*s), channels_last) for s in (shape, weight_shape)]
    return x, weight, draw(weight_shape[0]) if bias else None, geometry


def run(function, x, weight, bias, geometry, dtype=None):
    """The output, and the gradient of x for a fixed gradient of the output."""
    x, weight, bias = [None if t is None else t.detach().to(dtype or t.dtype) for t in (x, weight, bias)]
    y = function(x.requires_grad_(), weight, bias, *geometry)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16).to(y.dtype)
    grad = in_layout(grad, x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    return y, torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_equals_pytorchs_convolution(dtype, case, channels_last, bias):
    arguments = example(case, dtype, channels_last, bias)
    actual, plain = run(frozen_conv2d, *arguments), run(F.conv2d, *arguments)
    assert_as_exact_as_plain(actual, plain, run(F.conv2d, *arguments, dtype=torch.float64))
    assert torch.equal(actual[0], plain[0])
    assert actual[0].stride() == plain[0].stride()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_has_the_layout_of_plain_pytorchs(case, channels_last):
    arguments = example(case, torch.float32, channels_last)
    actual, plain = run(frozen_conv2d, *arguments)[1], run(F.conv2d, *arguments)[1]
    assert actual.stride() == plain.stride()


@pytest.mark.parametrize("case", ["3x3", "shortcut", "grouped, dilated"])
def test_gradcheck(case):
    x, weight, bias, geometry = example(case)
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, weight, bias, *geometry), x.requires_grad_())


def test_empty_batch():
    x, weight, bias, geometry = example("3x3")
    y, dx = run(frozen_conv2d, x[:0], weight, bias, geometry)
    assert y.shape == (0, 8, 9, 7)
    assert dx.shape == (0, 6, 9, 7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ["3x3", "many shortcuts", "grouped, dilated"])
def test_opcheck(case, channels_last):
    x, weight, bias, geometry = example(case, torch.float32, channels_last)
    y = F.conv2d(x, weight, bias, *geometry)
    backward = (torch.randn_like(y), weight, x.shape, channels_last, *geometry)
    torch.library.opcheck(torch.ops.ddpo_fast.frozen_conv2d_backward, backward)
    torch.library.opcheck(torch.ops.ddpo_fast.frozen_conv2d, (x.requires_grad_(), weight, bias, *geometry))


def saved_storages(function):
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        output = function()
    assert output.requires_grad
    return saved


def test_the_input_is_not_kept():
    x, weight, bias, geometry = example("3x3")
    x.requires_grad_()
    kept = x.untyped_storage().data_ptr()
    assert kept in saved_storages(lambda: F.conv2d(x, weight, bias, *geometry))
    assert saved_storages(lambda: frozen_conv2d(x, weight, bias, *geometry)) == {weight.untyped_storage().data_ptr()}


class OnCUDA(TorchFunctionMode):
    """Makes tensors claim to be CUDA's; the arguments of each call of a convolution's backward op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if "convolution_backward" in str(func):
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", ["3x3", "shortcut", "downsampling"])
def test_cudnn_takes_the_layout_from_a_placeholder_of_the_input(case, channels_last):
    """As on a GPU: cuDNN gets a tensor in the input's layout, whose values it does not read."""
    x, weight, _, geometry = example(case, torch.float32, channels_last)
    y, plain = run(F.conv2d, x, weight, None, geometry)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16).to(y.dtype)
    with OnCUDA() as cuda:
        dx = frozen._backward(in_layout(grad, channels_last), weight, x.shape, channels_last, *geometry)
    ((_, stand_in, *_),) = cuda.calls
    assert stand_in.shape == x.shape
    assert stand_in.dtype == x.dtype
    assert stand_in.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert stand_in.untyped_storage().nbytes() == (x.nbytes if channels_last else x.element_size())
    torch.testing.assert_close(dx, plain)
    assert dx.stride() == plain.stride()


@pytest.mark.parametrize(("convolution", "kept"), [(F.conv2d, True), (frozen_conv2d, False)])
def test_the_input_is_freed_before_the_backward_pass(convolution, kept):
    x, weight, bias, geometry = example("3x3")
    hidden = x.requires_grad_() * 2
    alive = weakref.ref(hidden)
    y = convolution(hidden, weight, bias, *geometry)
    del hidden
    assert (alive() is not None) == kept
    y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_pytorchs_linear_needs_no_such_operator(dtype, bias, autocast):
    weight = torch.randn(4, 3, device=DEVICE, dtype=dtype)
    bias = torch.randn(4, device=DEVICE, dtype=dtype) if bias else None
    x = torch.randn(2, 5, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    shapes = []
    with (
        torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t),
    ):
        F.linear(x, weight, bias)
    assert shapes == [(3, 4)]


def test_autocast_decides_the_dtype():
    arguments = example("3x3", torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual, plain = run(frozen_conv2d, *arguments), run(F.conv2d, *arguments)
    assert [t.dtype for t in actual] == [t.dtype for t in plain] == [torch.bfloat16, torch.float32]
    for a, p in zip(actual, plain, strict=True):
        assert torch.equal(a, p)


def test_trained_weights_are_refused():
    x, weight, bias, geometry = example("3x3")
    with pytest.raises(ValueError, match="frozen weights"):
        frozen_conv2d(x, weight.requires_grad_(), bias, *geometry)
    with pytest.raises(ValueError, match="frozen weights"):
        frozen_conv2d(x, weight.detach(), bias.requires_grad_(), *geometry)
