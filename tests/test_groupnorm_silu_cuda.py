"""The CUDA of csrc/groupnorm_silu.cu against fp64, on a CPU: `emulated_cuda/` runs it as C++.

On a GPU, test_groupnorm_silu.py runs it as the backend `csrc`.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import test_groupnorm_silu as cases
import torch
import torch.nn.functional as F
from op_checks import DTYPES, HALVES, assert_as_exact_as_plain, in_layout, name_of

from ddpo_fast.ops import extension, groupnorm_silu
from ddpo_fast.ops.backend import OPS, force_backend
from ddpo_fast.ops.groupnorm_silu import csrc_declines

EPS = 1e-5
# what a block may have of a multiprocessor's shared memory
SM_80, SM_90 = 163 * 1024, 227 * 1024
NAMES = ("groupnorm_silu", "groupnorm_silu_backward", "groupnorm_silu_fits")

# (N, C, H, W), groups: 10, 20, 30, 40, 60 and 80 channels a group, and widths that make packs of 2, 4, 8 and 16 bytes;
# numbers of pixels that the rows of a block divide and do not divide, one pixel, and more packs than are under way
CASES = [
    ((2, 40, 7, 9), 4),
    ((2, 80, 3, 41), 4),
    ((1, 60, 5, 7), 2),
    ((1, 80, 9, 7), 2),
    ((1, 120, 5, 5), 2),
    ((2, 160, 8, 8), 2),
    ((2, 8, 7, 9), 8),
    ((1, 21, 11, 5), 7),
    ((1, 34, 6, 7), 2),
    ((3, 32, 1, 1), 4),
    ((1, 10, 40, 41), 1),
    ((1, 65, 2, 3), 1),
]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """Compiles the CUDA; `emulate(shared_bytes, processors, backwards)` describes the device that it then runs on."""
    assert extension.reasons("cpu") == ""
    made = tmp_path_factory.mktemp("emulated") / "groupnorm_silu.so"
    # for few elements: to compile with less optimization takes less time than it costs
    command = [*extension._cpu_command(), "-O1", f"-I{Path(__file__).parent / 'emulated_cuda'}"]
    command += ["-x", "c++", str(extension.CSRC / "groupnorm_silu.cu"), "-shared", "-o", str(made)]
    subprocess.run([*command, *extension._link_flags("cpu")], check=True)
    library = torch.library.Library("ddpo_fast_emulated", "DEF")
    for name in NAMES:
        schema = str(getattr(torch.ops.ddpo_fast_csrc, name).default._schema)
        library.define(schema.split("::", 1)[1])
    torch.ops.load_library(str(made))
    yield ctypes.CDLL(str(made)).emulate_device
    library._destroy()


@pytest.fixture(autouse=True)
def device(emulate, monkeypatch):
    """Runs the emulation in place of what is compiled for this machine, on a device like an H100."""
    monkeypatch.setattr(torch.ops, "ddpo_fast_csrc", torch.ops.ddpo_fast_emulated)
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    emulate(SM_90, 132, False)
    return emulate


def example(shape, dtype=torch.float32):
    """x, grad, skip, weight, bias and an addend of each image, in channels_last."""
    x, weight, bias, grad = cases.example(shape, dtype)
    addend = torch.linspace(-3, 3, math.prod(shape[:2]), dtype=torch.float64).view(shape[:2]).to(dtype)
    return x, grad, 3 * grad.roll(2, 1), weight, bias, addend


def run(x, grad, skip, weight, bias, addend, groups, silu=True, affine=True):
    """y, dx and the gradients of weight and bias and of the addend, of those that are given."""
    y, dx = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    mean, rstd = torch.full((2, x.shape[0], groups), math.nan)
    daffine = torch.full((2, len(weight)), math.nan, dtype=weight.dtype) if affine else None
    daddend = None if addend is None else torch.full(addend.shape, math.nan, dtype=addend.dtype)
    operands = weight, bias
    torch.ops.ddpo_fast_emulated.groupnorm_silu(x, *operands, EPS, silu, addend, y, mean, rstd)
    torch.ops.ddpo_fast_emulated.groupnorm_silu_backward(
        x, grad, skip, *operands, addend, mean, rstd, silu, dx, daffine, daddend
    )
    return [y, dx, *(tensor for tensor in (daffine, daddend) if tensor is not None)]


def plain(x, grad, skip, weight, bias, addend, groups, silu=True, affine=True):
    """The same by PyTorch."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, addend) if tensor is not None]
    s = inputs[0] if addend is None else inputs[0] + inputs[3][:, :, None, None]
    z = torch.group_norm(s.contiguous(), groups, *inputs[1:3], EPS)
    y = F.silu(z) if silu else z
    outputs, grads = ([y], [grad]) if skip is None else ([y, s], [grad, skip])
    dx, dweight, dbias, *daddend = torch.autograd.grad(outputs, inputs, grads)
    return [y.detach(), dx, *([torch.stack([dweight, dbias])] if affine else []), *daddend]


def check(inputs, groups, silu=True):
    actual = run(*inputs, groups, silu)
    exact = plain(*(None if tensor is None else tensor.double() for tensor in inputs), groups, silu)
    same = [None if tensor is None else tensor.to(inputs[0].dtype) for tensor in inputs]
    expected = [made.to(found.dtype) for made, found in zip(plain(*same, groups, silu), actual, strict=True)]
    assert_as_exact_as_plain(actual, expected, exact)
    return actual


# with one multiprocessor there are always enough blocks, so that groups with short segments are joined
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_value_and_gradients(device, dtype, shape, groups, processors):
    device(SM_90, processors, False)
    check(example(shape, dtype), groups)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("addends", ["none", "each", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_operands(dtype, addends, skips, silu):
    x, grad, skip, weight, bias, addend = example((2, 20, 5, 7), dtype)
    addend = {"none": None, "each": addend, "shared": addend[:1]}[addends]
    check((x, grad, skip if skips else None, weight, bias, addend), 2, silu)


@pytest.mark.parametrize("affine", [True, False])
def test_what_is_not_trained_changes_no_other_gradient(affine):
    inputs = example((2, 20, 5, 7), torch.float16)
    y, dx, *_, daddend = run(*inputs, 2, affine=affine)
    expected = run(*inputs, 2)
    assert all(map(torch.equal, (y, dx, daddend), (expected[0], expected[1], expected[3])))
    assert torch.equal(run(*inputs[:5], None, 2, affine=affine)[0], run(*inputs[:5], None, 2)[0])


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_vectors_in_fp32_and_of_any_strides(dtype):
    x, grad, skip, weight, bias, addend = example((2, 20, 5, 7), dtype)
    columns = torch.stack([weight, bias], dim=1).float()
    check((x, grad, skip, columns[:, 0], columns[:, 1], addend.float().t().contiguous().t()), 2)


@pytest.mark.parametrize(("shape", "groups"), [((2, 40, 7, 9), 4), ((1, 21, 11, 5), 7), ((1, 20, 64, 64), 2)])
def test_threads_in_another_order_give_the_same_bits(device, shape, groups):
    """Else a thread would read what another may not have written yet."""
    inputs = example(shape, torch.float16)
    forwards = check(inputs, groups)
    device(SM_90, 132, True)
    assert all(map(torch.equal, forwards, run(*inputs, groups)))


def test_an_image_has_the_same_bits_in_a_batch_of_any_size():
    inputs = example((5, 24, 9, 11), torch.float16)
    whole = run(*inputs, 4)
    for rows in (slice(0, 2), slice(2, 5)):
        part = run(*(t[rows] if len(t) == 5 else t for t in inputs), 4)
        assert all(torch.equal(part[i], whole[i][rows]) for i in (0, 1, 3))


def test_tensors_that_begin_anywhere():
    """Packs are as wide as the addresses allow."""
    inputs = example((2, 160, 5, 5), torch.float16)
    expected = run(*inputs, 2)

    def moved(tensor, by):
        space = torch.empty(tensor.numel() + by, dtype=tensor.dtype)[by:]
        return space.as_strided(tensor.shape, tensor.stride(), by).copy_(tensor)

    for by in (1, 2, 4):
        actual = run(*(moved(t, by) if t.ndim == 4 else t for t in inputs), 2)
        assert_as_exact_as_plain(actual, expected, [t.double() for t in expected])


@pytest.mark.parametrize("shape", [(2, 16, 40, 40), (2, 16, 3, 5)])
def test_a_large_mean_causes_no_cancellation(shape):
    x, *others = example(shape)
    check((x + 1000, *others), 2)


def test_channels_of_one_group_that_differ_in_mean():
    x, *others, addend = example((2, 24, 5, 7))
    check((x, *others, 100 * addend), 2)


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite_stay_in_their_image_and_group(device, value, processors):
    device(SM_90, processors, False)
    inputs = example((3, 40, 5, 7), torch.float16)
    clean = run(*inputs, 4)[:2]
    inputs[0][1, 23, 2, 3] = value
    hit = run(*inputs, 4)[:2]
    for before, after in zip(clean, hit, strict=True):
        assert not after[1, 20:30].isfinite().any()
        after[1, 20:30] = before[1, 20:30]
        assert torch.equal(before, after)


def test_norms_from_far_below_to_far_above_zero():
    x, grad, skip, weight, bias, addend = example((1, 32, 6, 7))
    check((x, grad, skip, 60 * weight, bias, addend), 4)


# of Stable Diffusion 1.5 at 512 x 512 with 32 groups in half precision: channels, edge, and where a group fits, forward
# and backward
FITTING = {
    (320, 64): "80 90, 80 90",
    (640, 64): "90, ",
    (960, 64): ", ",
    (320, 32): "80 90, 80 90",
    (960, 32): "80 90, 80 90",
    (1280, 32): "80 90, 90",
    (1920, 32): "80 90, ",
    (2560, 16): "80 90, 80 90",
    (2560, 8): "80 90, 80 90",
}


@pytest.mark.parametrize(("channels", "edge"), FITTING)
def test_what_fits(device, channels, edge):
    x = in_layout(torch.empty(1, channels, edge, edge, dtype=torch.float16), True)
    for backward, expected in enumerate(FITTING[channels, edge].split(", ")):
        fitting = []
        for name, shared_bytes in (("80", SM_80), ("90", SM_90)):
            device(shared_bytes, 132, False)
            if torch.ops.ddpo_fast_emulated.groupnorm_silu_fits(x, 32, bool(backward)):
                fitting.append(name)
        assert fitting == expected.split()


def test_a_block_takes_what_the_device_has_and_no_more(device):
    """Half as many threads add up, where the sums of more would not fit beside the slabs."""
    inputs = example((1, 20, 40, 41), torch.float16)
    slabs, mean_and_rstd = 2 * 20 * 40 * 41 * 2, 2 * 4
    sums = [threads // 5 * 20 * 4 for threads in (512, 256)]
    for shared_bytes in (slabs + sums[0] + mean_and_rstd, slabs + sums[1] + mean_and_rstd):
        device(shared_bytes, 132, False)
        assert torch.ops.ddpo_fast_emulated.groupnorm_silu_fits(inputs[0], 1, True)
        check(inputs, 1)
    device(shared_bytes - 1, 132, False)
    assert not torch.ops.ddpo_fast_emulated.groupnorm_silu_fits(inputs[0], 1, True)
    with pytest.raises(RuntimeError, match="must fit into the device's shared memory"):
        run(*inputs, 1)


def test_what_is_declined_runs_on_another_backend(monkeypatch):
    x, weight, bias, grad = cases.example((2, 40, 5, 7))
    assert not torch.ops.ddpo_fast_emulated.groupnorm_silu_fits(x.contiguous(), 4, False)
    with pytest.raises(RuntimeError, match="x must be channels_last"):
        run(x.contiguous(), grad.contiguous(), None, weight, bias, None, 4)

    def called():
        with force_backend("csrc"):
            return cases.with_gradients(groupnorm_silu, x, weight, bias, grad, 4)

    with force_backend("reference"):
        expected = cases.with_gradients(groupnorm_silu, x, weight, bias, grad, 4)
    assert not all(map(torch.equal, called(), expected))
    monkeypatch.setattr(sys.modules[csrc_declines.__module__], "csrc_declines", lambda *call: True)
    assert all(map(torch.equal, called(), expected))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_op_with_this_backend(monkeypatch, dtype):
    """What the op gives the kernels, through autograd."""
    assert OPS["groupnorm_silu"].has("csrc", "cuda")
    cases.check("csrc", cases.example((2, 40, 7, 9), dtype), 4)
    for test in (cases.test_an_addend_and_the_gradient_of_a_skip_connection,):
        for images in (1, 2):
            test("csrc", dtype, True, images)
