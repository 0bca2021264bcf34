"""The 8-bit AdamW step against fp64 and against bitsandbytes, and its C++ code against its definition in PyTorch."""

from __future__ import annotations

import hashlib
import os
import sys

import pytest
import torch
from op_checks import DTYPES, HALVES, assert_as_exact_as_plain, name_of
from run_process import environment, finish

from ddpo_fast import ops
from ddpo_fast.ops import adamw8bit, extension

bitsandbytes = pytest.importorskip("bitsandbytes")

BACKENDS = ("csrc", "reference")
SIZES = (1, 255, 256, 257, 5000, 70_000)
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 1e-2}


def fresh(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Weights, codes and scales of both moments before the first step."""
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    return [torch.randn(n, generator=generator), *codes, *(torch.zeros(-(-n // 256)) for _ in range(2))]


def gradient(n: int, step: int) -> torch.Tensor:
    """A gradient of elements of seven orders of magnitude, a tenth of which are zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    sizes = 10 ** (-7 * torch.rand(n, generator=generator))
    return torch.randn(n, generator=generator) * sizes * (torch.rand(n, generator=generator) > 0.1)


def copies(state: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in state]


def trained(n: int, steps: int = 4, backend: str = "csrc") -> list[torch.Tensor]:
    state = fresh(n)
    with ops.force_backend(backend):
        for step in range(1, steps + 1):
            ops.adamw8bit_(*state, gradient(n, step), step=step, **SETTINGS)
    return state


def scaled_values(signed: bool) -> torch.Tensor:
    """Values of eight orders of magnitude in blocks of 256 whose largest value, and so their scale, is 1."""
    values = 10 ** (-8 * torch.rand(2**18, generator=torch.Generator().manual_seed(0)))
    values *= 0.99 if signed else 1  # a value below -0.993 would make the scale larger
    values[1::2] *= -1 if signed else 1
    values[::256] = 1
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_the_quantization_map_equals_that_of_bitsandbytes(signed):
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(ops.quantization_map(signed), theirs)


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_gets_the_code_of_the_nearest_value(signed):
    values, values_of = scaled_values(signed).double(), ops.quantization_map(signed).double()
    codes, scales = ops.quantise(values.float(), signed)
    assert torch.equal(scales, torch.ones_like(scales))
    # a second moment is never stored as zero
    candidates = values_of if signed else values_of[1:]
    best = torch.cat([(part[:, None] - candidates).abs().amin(dim=1) for part in values.split(4096)])
    # midway between two values rounding decides: positions among 128 codes are computed to about 1e-5
    assert ((values - values_of[codes.int()]).abs() <= best + 1e-6 * values.abs()).all()
    assert len(codes.unique()) == (256 if signed else 255)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3e-38, 1e-45, 1e18])
def test_quantizing_again_changes_nothing(signed, scale):
    values = torch.randn(256 * 2000 + 100, generator=torch.Generator().manual_seed(0)) * scale
    # a block whose largest element is negative has another scale: the signed map's ends are not symmetric
    first = ops.quantise(values if signed else values.square(), signed)
    second = ops.quantise(ops.dequantise(*first, signed), signed)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("n", SIZES)
def test_cpp_quantizes_its_own_states_to_themselves(n):
    state = trained(n)
    again = copies(state)
    arguments = (torch.zeros(n), None, adamw8bit._maps("cpu"), adamw8bit._decades("cpu"))
    torch.ops.ddpo_fast_csrc.adamw8bit(*again, *arguments, 1.0, 1.0, 0.0, 0.0, 1.0, 1e-8, 0.0)
    for before, after in zip(state, again, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cpp_and_the_definition_agree(n, dtype):
    """In one step from the same state. A fused multiply-add rounds once and separate operations twice, so a code may be
    off by one."""
    grad = gradient(n, 9).to(dtype)
    results = []
    for backend in BACKENDS:
        state, out = trained(n), torch.full((n,), float("nan"), dtype=dtype)
        with ops.force_backend(backend):
            ops.adamw8bit_(*state, grad, out, step=5, grad_scale=0.7, **SETTINGS)
        assert torch.equal(out, state[0].to(dtype)), "the copy is the weights, rounded to nearest even"
        results.append(state)
    for mine, plain in zip(*results, strict=True):
        if mine.dtype == torch.uint8:
            difference = (mine.int() - plain.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).sum() <= 1 + 1e-4 * n
        else:
            torch.testing.assert_close(mine, plain, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("n", SIZES)
def test_a_step_is_as_exact_as_plain_pytorch(n):
    state, grad = trained(n), gradient(n, 9)
    m = ops.dequantise(state[1], state[3], signed=True).double() * 0.9 + 0.1 * grad.double()
    v = ops.dequantise(state[2], state[4], signed=False).double() * 0.99 + 0.01 * grad.double() ** 2
    step = (m / (1 - 0.9**5)) / ((v / (1 - 0.99**5)).sqrt() + 1e-8)
    exact = state[0].double() * (1 - 1e-5) - 1e-3 * step
    made = {}
    for backend in BACKENDS:
        mine = copies(state)
        with ops.force_backend(backend):
            ops.adamw8bit_(*mine, grad, step=5, **SETTINGS)
        made[backend] = mine[0]
    assert_as_exact_as_plain([made["csrc"]], [made["reference"]], [exact])


def test_the_number_of_threads_changes_no_bit():
    n, before = 300_000, torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(trained(n))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_flat_buffer_make_the_same_step(backend, monkeypatch):
    monkeypatch.setattr(adamw8bit, "PIECE", 512)  # the definition itself works in pieces of this size
    n, cut = 3000, 1280
    whole, parts, grad, out = trained(n), trained(n), gradient(n, 9), torch.empty(n, dtype=torch.bfloat16)
    with ops.force_backend(backend):
        ops.adamw8bit_(*whole, grad, step=5, **SETTINGS)
        for at in (slice(0, cut), slice(cut, n)):
            blocks = slice(at.start // 256, -(-at.stop // 256))
            part = [*(tensor[at] for tensor in parts[:3]), *(tensor[blocks] for tensor in parts[3:])]
            ops.adamw8bit_(*part, grad[at], out[at], step=5, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(out, whole[0].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_only_decay_the_weights(backend):
    n = 600
    state = fresh(n)
    expected = state[0] * (1 - 1e-5)
    with ops.force_backend(backend):
        ops.adamw8bit_(*state, torch.zeros(n), step=1, **SETTINGS)
    assert torch.equal(state[0], expected)
    assert not state[3].any()
    assert not state[4].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e18])
def test_the_step_does_not_depend_on_the_size_of_gradients_until_eps_or_overflow(backend, size):
    """Adam divides the mean gradient by its root mean square, so its size cancels. Squares of 1e-30 underflow to zero,
    and then the divisor is eps alone."""
    n = 1000
    state = fresh(n)
    start = state[0].clone()
    with ops.force_backend(backend):
        for step in range(1, 4):
            ops.adamw8bit_(*state, torch.full((n,), size), step=step, lr=1e-3, eps=1e-16)
    moved = (start - state[0]).abs().double()
    assert torch.isfinite(state[0]).all()
    expected = 3e-3 * (1 if size > 1e-15 else size / 1e-16)
    # three roundings of a weight near 1, and two scales that differ by one rounding
    assert (moved - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_with_rare_gradients_takes_no_large_step(backend):
    """If 8-bit rounding made the second moment zero and the first one not, the step would be the first moment / eps."""
    n = 2560
    state = fresh(n)
    start = state[0].clone()
    with ops.force_backend(backend):
        for step in range(1, 51):
            ops.adamw8bit_(*state, gradient(n, step), step=step, lr=1e-3)
    # Adam's bound for sparse gradients (arXiv:1412.6980, section 2.1): (1 - beta1) / sqrt(1 - beta2) = 3.2 a step
    assert (state[0] - start).abs().max() <= 50 * 3.2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_the_weights(backend, value):
    n = 600
    state, grad = trained(n), gradient(n, 9)
    grad[300] = value
    with ops.force_backend(backend):
        ops.adamw8bit_(*state, grad, step=5, **SETTINGS)
        ops.adamw8bit_(*state, gradient(n, 10), step=6, **SETTINGS)
    assert state[0].isnan()[256:512].all()
    assert torch.isfinite(state[0][:256]).all()


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_is_only_written(backend, dtype):
    n = 300
    state, out = trained(n), torch.full((n,), float("nan"), dtype=dtype)
    with ops.force_backend(backend):
        ops.adamw8bit_(*state, gradient(n, 9), out, step=5, **SETTINGS)
    assert torch.isfinite(out).all()


def test_an_empty_tensor_of_weights():
    ops.adamw8bit_(*fresh(0), torch.zeros(0), step=1, lr=1e-3)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    state, grad = fresh(300), torch.zeros(300)
    with pytest.raises(ValueError, match="step is 0"):
        ops.adamw8bit_(*state, grad, step=0, lr=1e-3)
    with pytest.raises(ValueError, match=r"grad has shape \(299,\) but must have \(300,\)"):
        ops.adamw8bit_(*state, grad[1:], step=1, lr=1e-3)
    with pytest.raises(ValueError, match="grad is float64 but must be"):
        ops.adamw8bit_(*state, grad.double(), step=1, lr=1e-3)
    with pytest.raises(ValueError, match="grad is not contiguous"):
        ops.adamw8bit_(*state, torch.zeros(600)[::2], step=1, lr=1e-3)
    with pytest.raises(ValueError, match="codes1 is int8 but must be uint8"):
        ops.adamw8bit_(state[0], state[1].char(), *state[2:], grad, step=1, lr=1e-3)
    with pytest.raises(ValueError, match=r"absmax2 has shape \(1,\) but must have \(2,\)"):
        ops.adamw8bit_(*state[:4], state[4][:1], grad, step=1, lr=1e-3)
    with pytest.raises(ValueError, match="out is on meta but master on cpu"):
        ops.adamw8bit_(*state, grad, torch.empty(300, device="meta"), step=1, lr=1e-3)
    assert "for cpu only" in adamw8bit.OP.reasons("csrc", "cuda", torch.float32)


def digest() -> str:
    """SHA-256 of the states and copies after a few steps, one of them with half-precision gradients."""
    found = hashlib.sha256()
    for n in SIZES:
        state, out = trained(n), torch.empty(n, dtype=torch.float16)
        ops.adamw8bit_(*state, gradient(n, 9).bfloat16(), out, step=5, **SETTINGS)
        for tensor in (*state, out.float()):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.skipif("avx512_vbmi" not in extension._processor_flags(), reason="this processor has no AVX-512 VBMI")
def test_loops_and_avx512_make_the_same_bits(tmp_path):
    """Processors without AVX-512 run plain loops: compiled without AVX-512 here, the step gives the same bits."""
    code = "import test_adamw8bit as t; assert not t.extension.reasons('cpu'); print(t.digest())"
    compiler = f"{os.environ.get('CXX') or 'c++'} -mno-avx512vbmi -mno-avx512f"
    variables = environment(CXX=compiler, DDPO_FAST_CACHE=str(tmp_path))
    done = finish([sys.executable, "-c", code], env=variables)
    assert done.stdout.split()[-1] == digest()
