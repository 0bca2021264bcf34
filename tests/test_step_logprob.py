"""The fused sampling step: every backend against fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, assert_as_exact_as_plain, backends_of, in_layout, name_of
from step_example import GUIDANCE, SHAPES, scheduler_table, step_example

from ddpo_fast.ddim import PREDICTION_TYPES
from ddpo_fast.ops import force_backend, guided, score_step, step_logprob, take_step
from ddpo_fast.ops.gaussian import table_rows

BACKENDS = backends_of("step_logprob")


def plain(example):
    """The step from PyTorch's functions, which the op fuses; autograd gives its gradients."""
    m, x, z, table, t, scale = example.arguments()
    combined = guided(m, scale) if example.guided else m
    rows = table_rows(table, t, x)[:3]
    following = take_step(combined, x, z, *rows)
    scores = score_step(combined, x, following, *rows)
    return following, scores, torch.cat([following] * (2 if example.guided else 1)).to(m.dtype)


def with_gradients(run, example, weights):
    """Outputs of `run`, and gradients of their weighted sum to the model's output and the latents."""
    example.model_output.requires_grad_()
    example.latents.requires_grad_()
    outputs = run(example)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, [example.model_output, example.latents])
    return [o.detach() for o in outputs], grads


def weights_of(example):
    generator = torch.Generator().manual_seed(1)
    shapes = example.latents.shape, example.latents.shape[:1], example.model_output.shape
    # in half precision the gradient with respect to the UNet's output is rounded once more
    return [torch.randn(s, generator=generator).to(DEVICE, example.model_output.dtype).double() for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(backend, dtype, channels_last, guided, shape, poisoned_empty):
    def example():
        return step_example(shape, dtype, guided, channels_last)

    weights = weights_of(example())
    exact, exact_grads = with_gradients(plain, example().in_double(), weights)
    usual, usual_grads = with_gradients(plain, example(), weights)
    with force_backend(backend):
        got, grads = with_gradients(lambda e: step_logprob(*e.arguments()), example(), weights)
    assert got[2].stride() == example().model_output.stride()
    assert_as_exact_as_plain(got, usual, exact)
    assert_as_exact_as_plain(grads, usual_grads, exact_grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_size_of_stable_diffusion(backend, poisoned_empty):
    example = step_example((2, 4, 64, 64), torch.float16, channels_last=True)
    with force_backend(backend):
        got = step_logprob(*example.arguments())
    assert_as_exact_as_plain(got, plain(example), plain(example.in_double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_of_a_chain(backend, prediction_type):
    _, chain = scheduler_table(prediction_type, steps=5)
    example = step_example((2, 4, 8, 8), prediction_type=prediction_type)
    for t in chain:
        example.timesteps = t
        with force_backend(backend):
            got = step_logprob(*example.arguments())
        assert_as_exact_as_plain(got, plain(example), plain(example.in_double()))
        example.latents = got.latents


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.booleans())
def test_any_shape(images, channels, height, width, guided, channels_last):
    example = step_example((images, channels, height, width), torch.float16, guided, channels_last)
    for backend in BACKENDS:
        with force_backend(backend):
            got = step_logprob(*example.arguments())
        assert_as_exact_as_plain(got, plain(example), plain(example.in_double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_of_any_rank(backend):
    example = step_example((3, 130))
    with force_backend(backend):
        assert_as_exact_as_plain(step_logprob(*example.arguments()), plain(example), plain(example.in_double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_image(backend, value):
    example = step_example((3, 4, 8, 8))
    clean = step_logprob(*example.arguments())
    example.model_output[1, 2, 3, 4] = value
    with force_backend(backend):
        got = step_logprob(*example.arguments())
    assert not torch.isfinite(got.latents[1, 2, 3, 4])
    assert torch.isnan(got.log_probs[1])
    for i in (0, 2):
        torch.testing.assert_close(got.latents[i], clean.latents[i])
        torch.testing.assert_close(got.log_probs[i], clean.log_probs[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_deterministic(backend):
    example = step_example((3, 4, 16, 16), torch.float16)
    with force_backend(backend):
        first, second = (step_logprob(*example.arguments()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_sigma_zero_the_step_is_the_mean(backend):
    example = step_example()
    example.table = example.table.clone()
    example.table[:, 2] = 0
    with force_backend(backend):
        got = step_logprob(*example.arguments())
    torch.testing.assert_close(got.latents, plain(example)[0])
    assert not torch.isfinite(got.log_probs).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_credit_changes_no_bit(backend):
    """Log-probs are stored without credit: only the loss uses it."""
    plain_example, credited = step_example(), step_example(credit="equal")
    assert not torch.equal(plain_example.table, credited.table)
    with force_backend(backend):
        outputs = [
            with_gradients(lambda e: step_logprob(*e.arguments()), e, weights_of(e)) for e in (plain_example, credited)
        ]
    for a, b in zip(*([*values, *grads] for values, grads in outputs), strict=True):
        assert torch.equal(a, b)


def test_gradient_in_fp64():
    example = step_example((2, 4, 3, 2)).in_double()
    m, x = example.model_output.requires_grad_(), example.latents.requires_grad_()
    other = example.arguments()[2:]

    # the log-prob's gradient holds the next latents fixed, and finite differences would change them
    assert torch.autograd.gradcheck(lambda m, x: step_logprob(m, x, *other)[::2], (m, x))


def test_custom_op_rules():
    example = step_example((2, 4, 3, 2), channels_last=True)
    example.model_output.requires_grad_()
    arguments = example.arguments()
    torch.library.opcheck(torch.ops.ddpo_fast.step_logprob, arguments)
    following, scores, rows = (v.detach() for v in step_logprob(*arguments))
    m, x, _, table, t, scale = arguments
    backward = (m.detach(), x, following, table, t, scale, torch.ones_like(x), scores, rows)
    torch.library.opcheck(torch.ops.ddpo_fast.step_logprob_backward, backward)


def test_compiles_without_a_graph_break():
    example = step_example((2, 4, 8, 8))

    def run(m, x, z, table, t):
        return step_logprob(m, x, z, table, t, GUIDANCE)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*example.arguments()[:-1]), run(*example.arguments()[:-1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": None}, r"model_output has shape \(4, 4, 9, 7\) but must have \(2, 4, 9, 7\)"),
        ({"noise": torch.zeros(2, 4, 9, 8)}, "noise has shape"),
        ({"latents": torch.zeros(2, 4, 9, 7, dtype=torch.float16)}, "latents are torch.float16"),
        ({"table": torch.zeros(10, 3)}, r"table is torch.float32 \(10, 3\) but must be float32 \[K, 4\]"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, "timesteps are"),
        ({"timesteps": torch.zeros(2, dtype=torch.int32)}, "timesteps are"),
    ],
)
def test_bad_input_is_refused(change, message):
    example = step_example()
    for name, value in change.items():
        setattr(example, name, value)
    with pytest.raises(ValueError, match=message):
        step_logprob(*example.arguments())


def test_rows_that_are_not_dense_are_copied():
    example = step_example((2, 4, 8, 8))
    expected = step_logprob(*example.arguments())
    example.model_output = example.model_output.transpose(2, 3).contiguous().transpose(2, 3)
    example.latents = in_layout(example.latents, channels_last=True)
    for backend in BACKENDS:
        with force_backend(backend):
            for a, b in zip(step_logprob(*example.arguments()), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
