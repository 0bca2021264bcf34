"""The fused loss: every backend against autograd in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from ddpo_fast_kernels import launch
from ddpo_fast_kernels import ppo_loss as kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, HALVES, assert_as_exact_as_plain, backends_of, largest, name_of
from step_example import SHAPES, step_example

from ddpo_fast.ddim import PREDICTION_TYPES
from ddpo_fast.ops import clipped_surrogate, force_backend, guided, ppo_loss, score_step, step_logprob
from ddpo_fast.ops.gaussian import per_image, step_mean, table_rows

BACKENDS = backends_of("ppo_loss")
CLIP = 0.05
SETTINGS = {"clip_range": CLIP, "advantage_limit": 5.0}


class LossExample:
    """A sampled step with slightly different old log-probs and advantages of both signs."""

    def __init__(
        self, shape=(5, 4, 9, 7), dtype=torch.float32, guided=True, channels_last=False, reference=False, **of_step
    ):
        self.step = step_example(shape, dtype, guided, channels_last, **of_step)
        sampled = step_logprob(*self.step.arguments())
        generator = torch.Generator().manual_seed(2)
        count = shape[0]
        self.next_latents = sampled.latents
        # the credited log-ratio is the same with every credit: the clip leaves about half of the pairs
        changes = (0.1 * torch.randn(count, generator=generator)).to(DEVICE)
        self.old = sampled.log_probs + changes / self.credit
        self.advantages = (3 * torch.randn(count, generator=generator)).to(DEVICE)
        self.reference = None
        self.weight = 0.0
        if reference:
            shift = torch.randn(self.step.model_output.shape, generator=generator).to(DEVICE, dtype)
            self.reference = (self.step.model_output + shift).detach()
            self.weight = 0.3

    @property
    def credit(self):
        return self.step.table[self.step.timesteps, 3]

    def in_double(self):
        self.step = self.step.in_double()
        for name in ("next_latents", "old", "advantages", "reference"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.double())
        return self

    def fused(self, grad_scale=None):
        m, x, _, table, t, scale = self.step.arguments()
        return ppo_loss(
            m,
            x,
            self.next_latents,
            self.old,
            self.advantages,
            table,
            t,
            scale,
            reference_output=self.reference,
            reference_weight=self.weight,
            grad_scale=grad_scale,
            **SETTINGS,
        )

    def plain(self):
        """The loss from PyTorch's functions: TRL's, but for the credit and the KL to the reference."""
        m, x, _, table, t, scale = self.step.arguments()
        *rows, credit = table_rows(table, t, x)
        combined = guided(m, scale) if self.step.guided else m
        log_probs = score_step(combined, x, self.next_latents, *rows)
        ratio = torch.exp(credit * (log_probs - self.old))
        loss = clipped_surrogate(self.advantages.clamp(-5.0, 5.0), CLIP, ratio)
        kl = torch.zeros((), dtype=x.dtype, device=DEVICE)
        if self.reference is not None:
            other = guided(self.reference, scale) if self.step.guided else self.reference
            apart = step_mean(combined, x, *rows[:2]) - step_mean(other, x, *rows[:2])
            # credit times how far the mean moved, in standard deviations of the step
            moved = per_image(credit / rows[2], x) * apart
            kl = 0.5 * moved.square().mean()
            loss = loss + self.weight * kl
        moved = (ratio - 1).abs()
        approx_kl = 0.5 * (log_probs - self.old).square().mean()
        return loss, approx_kl, (moved > CLIP).to(moved.dtype).mean(), moved.max(), kl, log_probs


def with_gradient(example, run):
    example.step.model_output.requires_grad_()
    outputs = run(example)
    (grad,) = torch.autograd.grad(outputs[0], example.step.model_output)
    return [v.detach() for v in outputs], grad


def assert_matches(backend, make):
    """Loss, metrics, log-probs and gradient by a backend, of an example that `make` makes."""
    exact, exact_grad = with_gradient(make().in_double(), LossExample.plain)
    usual, usual_grad = with_gradient(make(), LossExample.plain)
    with force_backend(backend):
        got, grad = with_gradient(make(), LossExample.fused)
    # An absolute error of a log-prob becomes a relative error of its ratio, and the loss and the clip fraction are
    # means over ratios: the smallest error that is allowed is a rounding of the largest log-prob.
    # The ratio is the exponential of the log-ratio times the credit, which multiplies that error.
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, largest(exact[5])) * max(1.0, largest(make().credit))
    for i in (0, 1, 2, 3, 4):
        allowed = 2 * largest(usual[i] - exact[i]) + floor * max(1.0, largest(exact[i]))
        assert largest(got[i].double() - exact[i]) <= allowed, f"output {i}: {got[i]} for {exact[i]}"
    assert_as_exact_as_plain([got[5]], [usual[5]], [exact[5]])
    assert grad.stride() == make().step.model_output.stride()
    slack = floor * largest(exact_grad)
    allowed = 2 * largest(usual_grad.double() - exact_grad) + 2 * torch.finfo(grad.dtype).eps * largest(exact_grad)
    assert largest(grad.double() - exact_grad) <= allowed + slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
def test_against_autograd_in_fp64(backend, dtype, channels_last, guided, reference, poisoned_empty):
    assert_matches(backend, lambda: LossExample((5, 4, 9, 7), dtype, guided, channels_last, reference))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("credit", ["equal", "sqrt"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("reference", "grad_scale"), [(False, None), (True, 2.0**10)], ids=["alone", "scaled, with a reference"]
)
def test_credit_against_autograd_in_fp64(
    backend, credit, prediction_type, guided, reference, grad_scale, poisoned_empty
):
    """Of every step's pair by itself: the gradients of the last steps are many times those of the others."""

    def make(dtype=torch.float32):
        of_step = {"prediction_type": prediction_type, "credit": credit}
        return LossExample((6, 4, 5, 6), dtype, guided, reference=reference, **of_step)

    assert_matches(backend, make)
    _, exact = with_gradient(make().in_double(), LossExample.plain)
    _, usual = with_gradient(make(), LossExample.plain)
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=DEVICE)
    with force_backend(backend):
        got, grad = with_gradient(make(), lambda example: example.fused(scale))
    assert torch.equal(got[6], grad * (grad_scale or 1.0)), "the scale is a power of two"
    each = exact.flatten(1).norm(dim=1)
    errors, usual_errors = ((g.double() - exact).flatten(1).norm(dim=1) for g in (grad, usual))
    # as above: the ratio's relative error
    credits = make().credit.repeat(len(exact) // 6).double()
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, largest(got[5])) * credits.clamp(min=1.0)
    assert (each > 0).sum() > 2, "the clip leaves pairs that have a gradient"
    assert (errors <= 2 * usual_errors + floor * each).all(), errors / each


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("credit", ["equal", "sqrt"])
def test_credit_in_half_precision(backend, dtype, credit):
    assert_matches(backend, lambda: LossExample((5, 4, 9, 7), dtype, channels_last=True, reference=True, credit=credit))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_credit_multiplies_the_log_ratio_and_its_square_the_kl(backend):
    """A credit of 2 does what a credit of 1 does at twice the log-ratio, and a credit of 0 leaves nothing."""
    found = []
    for credit, change in ((2.0, 0.0078125), (1.0, 0.015625), (0.0, 0.5)):
        example = LossExample((1, 4, 8, 8), reference=True)
        example.step.table = example.step.table.clone()
        example.step.table[:, 3] = credit
        example.advantages = torch.ones(1, device=DEVICE)
        with force_backend(backend):
            # rounded: the log-ratio is `change` to within 1e-4 of it
            example.old = example.fused().log_probs - change
            got, grad = with_gradient(example, LossExample.fused)
        found.append((got, grad))
    (twice, _), (once, _), (none, none_grad) = found
    torch.testing.assert_close(twice[3], once[3], rtol=1e-4, atol=0)
    torch.testing.assert_close(once[1], 4 * twice[1], rtol=1e-4, atol=0)  # TRL's approx_kl has no credit
    assert torch.equal(twice[4], 4 * once[4])
    assert none[3].item() == none[4].item() == 0.0
    assert none[0].item() == -1.0
    assert not none_grad.any()


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
def test_a_credit_of_one_has_the_bits_of_ppos_loss(reference):
    example = LossExample(reference=reference)
    _, x, _, table, t, scale = example.step.arguments()
    rows = table_rows(table, t, x)[:3]
    with force_backend("reference"):
        got = example.fused()
    log_probs = score_step(guided(example.step.model_output, scale), x, example.next_latents, *rows)
    assert torch.equal(got.log_probs, log_probs)
    ratio = torch.exp(log_probs - example.old)
    assert torch.equal(got.ratio_drift, (ratio - 1).abs().max())
    if not reference:
        assert torch.equal(got.loss, clipped_surrogate(example.advantages.clamp(-5.0, 5.0), CLIP, ratio))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 64, 64)], ids=str)
def test_several_shapes(backend, shape, poisoned_empty):
    assert_matches(backend, lambda: LossExample(shape, torch.float16))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from(["none", "equal", "sqrt"]),
)
def test_any_shape(pairs, channels, height, width, channels_last, credit):
    shape = (pairs, channels, height, width)
    for backend in BACKENDS:
        assert_matches(backend, lambda: LossExample(shape, channels_last=channels_last, reference=True, credit=credit))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("advantage", "change", "live"),
    [
        (2.0, 0.0, True),
        (2.0, 0.2, False),  # the ratio of a good action is not increased beyond the clip range
        (2.0, -0.2, True),  # but is decreased if the advantage is negative
        (-2.0, 0.2, True),
        (-2.0, -0.2, False),
        (0.0, 0.2, False),
        (80.0, 0.0, True),  # the advantage is clipped to 5
        (-80.0, 0.0, True),
    ],
)
def test_one_pair(backend, advantage, change, live):
    example = LossExample((1, 4, 8, 8))
    _, x, _, table, t, scale = example.step.arguments()
    log_prob = step_logprob(*example.step.arguments()).log_probs
    example.old, example.advantages = log_prob - change, torch.full((1,), advantage, device=DEVICE)
    with force_backend(backend):
        got, grad = with_gradient(example, LossExample.fused)
    limited = max(-5.0, min(5.0, advantage))
    ratio = math.exp(change)
    expected = max(-limited * ratio, -limited * min(max(ratio, 1 - CLIP), 1 + CLIP))
    assert got[0].item() == pytest.approx(expected, rel=1e-5)
    assert got[2].item() == (1.0 if abs(change) > CLIP else 0.0)
    assert got[3].item() == pytest.approx(abs(ratio - 1), rel=1e-4, abs=1e-6)
    assert bool(grad.any()) is live
    if live:
        # a larger log-prob of an action with a positive advantage lowers the loss
        moved = example.step
        moved.model_output = (moved.model_output - 1e-3 * grad / grad.norm()).detach()
        better = step_logprob(moved.model_output, x, torch.zeros_like(x), table, t, scale)
        after = ppo_loss(
            moved.model_output, x, example.next_latents, example.old, example.advantages, table, t, scale, **SETTINGS
        )
        assert better.latents.shape == x.shape
        assert (after.log_probs - got[5]).item() * advantage > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [-1, 1])
def test_a_ratio_at_the_edge_is_not_clipped(backend, side):
    """With a ratio exactly at the clip range's bound the gradient is not zero, as with `torch.clamp`."""
    example = LossExample((1, 4, 8, 8))
    with force_backend(backend):
        log_prob = example.fused().log_probs
        ratios = {}
        for steps in range(-3, 4):
            example.old = log_prob - math.log1p(side * CLIP) + steps * 2**-23
            example.advantages = torch.full((1,), float(side), device=DEVICE)
            got, grad = with_gradient(example, LossExample.fused)
            ratios[got[3].item()] = bool(grad.any())
    # a ratio well inside of the range has a gradient, and one well outside has none
    assert ratios[max(ratios)] is False
    assert ratios[min(ratios)] is True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unchanged_weights_have_ratio_one(backend, channels_last, guided, dtype):
    """Sampling and training score the same latents with the same log-prob, to the last bit."""
    example = LossExample((3, 4, 40, 30), dtype, guided, channels_last)
    with force_backend(backend):
        sampled = step_logprob(*example.step.arguments())
        example.next_latents, example.old = sampled.latents, sampled.log_probs
        got = example.fused()
    assert torch.equal(got.log_probs, sampled.log_probs)
    assert got.ratio_drift.item() == 0.0
    assert got.clip_fraction.item() == 0.0
    assert got.approx_kl.item() == 0.0
    assert got.loss.item() == pytest.approx(-example.advantages.clamp(-5, 5).mean().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_of_zero_have_no_gradient(backend):
    example = LossExample()
    example.advantages = torch.zeros_like(example.advantages)
    with force_backend(backend):
        got, grad = with_gradient(example, LossExample.fused)
    assert got[0].item() == 0.0
    assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["model_output", "advantages", "old"])
def test_nan_reaches_the_loss_and_stays_in_its_pair(backend, where):
    example, clean = LossExample(), LossExample()
    target = example.step.model_output if where == "model_output" else getattr(example, where)
    target[1] = float("nan")
    with force_backend(backend):
        got, grad = with_gradient(example, LossExample.fused)
        want, clean_grad = with_gradient(clean, LossExample.fused)
    assert torch.isnan(got[0])
    if where != "advantages":
        assert torch.isnan(got[3])
    others = [0, 2, 3, 4]
    assert torch.equal(got[5][others], want[5][others])
    assert torch.equal(grad[others], clean_grad[others])
    assert torch.isnan(grad[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pairs(backend):
    example = LossExample((0, 4, 8, 8))
    with force_backend(backend):
        got = example.fused()
    assert torch.isnan(got.loss)
    assert got.log_probs.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_dense(backend):
    """Rows of the reference's output are converted to the layout of the output's rows."""
    expected = LossExample((3, 4, 8, 8), reference=True)
    example = LossExample((3, 4, 8, 8), reference=True)
    output = example.step.model_output
    example.step.model_output = output.transpose(2, 3).contiguous().transpose(2, 3)
    with force_backend(backend):
        torch.testing.assert_close(example.fused().reference_kl, expected.fused().reference_kl)
        torch.testing.assert_close(example.fused().loss, expected.fused().loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_deterministic(backend):
    example = LossExample((7, 4, 16, 16), torch.float16, reference=True)
    with force_backend(backend):
        first, second = (with_gradient(example, LossExample.fused) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_scale_keeps_fp16_gradients_from_underflow(backend):
    """For small advantages an fp16 gradient underflows without the loss scale; with it, its error is a rounding."""
    scale = torch.tensor(2.0**16, device=DEVICE)

    def gradient(example, grad_scale, factor):
        example.advantages = example.advantages * 1e-4
        example.step.model_output.requires_grad_()
        loss = example.fused(grad_scale).loss * factor
        return torch.autograd.grad(loss, example.step.model_output)[0].double() / factor

    with force_backend("reference"):
        exact = gradient(LossExample((3, 4, 32, 32)).in_double(), None, 1.0)
    with force_backend(backend):
        scaled = gradient(LossExample((3, 4, 32, 32), torch.float16), scale, 2.0**16)
        lost = gradient(LossExample((3, 4, 32, 32), torch.float16), None, 1.0)
    assert largest(scaled - exact) < 0.02 * largest(exact)
    assert largest(lost - exact) > 0.05 * largest(exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
def test_the_loss_scale_multiplies_the_whole_gradient(backend, reference):
    """Of the clipped loss and of the KL to the reference. The scale is a power of two, so nothing is rounded."""
    example = LossExample((3, 4, 5, 6), reference=reference)
    with force_backend(backend):
        plain, scaled = (example.fused(scale).gradient for scale in (None, torch.tensor(2.0**12, device=DEVICE)))
    assert plain.all()
    assert torch.equal(scaled, 2.0**12 * plain)


def test_the_counters_of_a_graph_are_its_own_and_not_filled_in_its_capture(monkeypatch):
    """With a stand-in for a CUDA device that has one stream."""
    capturing, made = [False], []

    def zeros(count, device, **kwargs):
        made.append(capturing[0])
        return torch.empty(count, device="meta", **kwargs)

    monkeypatch.setattr(launch, "_TICKETS", {})
    monkeypatch.setattr(launch, "_CAPTURED", [])
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def of_calls(counts):
        return [launch.tickets(torch.device("cuda", 0), count) for count in counts]

    graphs = []
    for _ in range(2):
        capturing[0] = False
        warm, again = of_calls((1, 3000))
        assert warm is again
        capturing[0] = True
        captured, later = of_calls((3000, 1))
        assert captured is later is warm
        graphs.append(captured)
    assert graphs[0] is not graphs[1]
    assert made == [False, False]
    # of a launch that no warm-up had
    assert of_calls([5000])[0] is not graphs[1]


def test_the_atomic_counter_is_zero_after_each_launch(monkeypatch):
    """Launches on one stream share the counter, which tells the last program of a launch: it must start at 0."""
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernels, "tickets", lambda device: ticket)
    with force_backend("triton"):
        first, second = (LossExample().fused() for _ in range(2))
    assert ticket.item() == 0
    assert first.loss.isfinite()
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("credit", ["none", "equal"])
def test_gradient_in_fp64(credit):
    example = LossExample((3, 4, 3, 2), reference=True, credit=credit).in_double()
    m = example.step.model_output.requires_grad_()

    def loss(m):
        example.step.model_output = m
        return example.fused().loss

    assert torch.autograd.gradcheck(loss, m)


def test_custom_op_rules():
    example = LossExample((3, 4, 3, 2), channels_last=True, reference=True)
    m, x, _, table, t, scale = example.step.arguments()
    m.requires_grad_()
    tensors = (m, example.reference, x, example.next_latents, example.old, example.advantages, table, t, None)
    torch.library.opcheck(torch.ops.ddpo_fast.ppo_loss, (*tensors, scale, CLIP, 5.0, 0.3))


def test_compiles_without_a_graph_break():
    example = LossExample((3, 4, 8, 8))
    compiled = torch.compile(lambda: tuple(example.fused()), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(), example.fused(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.5, -2.2, 0.0),
        (2.0, 0.5, -1.0, -2.0),
        (-2.0, 1.5, 3.0, 2.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_surrogate_clips_where_ppo_does(advantage, ratio, loss, slope):
    ratio = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(torch.tensor([advantage]), 0.1, ratio)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert ratio.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_latents": torch.zeros(5, 4, 9, 8)}, "next_latents have shape"),
        ({"old": torch.zeros(4)}, "old_log_probs have shape"),
        ({"advantages": torch.zeros(5, 1)}, "advantages have shape"),
        ({"reference": torch.zeros(5, 4, 9, 7)}, "reference_output has shape"),
    ],
)
def test_bad_input_is_refused(change, message):
    example = LossExample()
    for name, value in change.items():
        setattr(example, name, value)
    with pytest.raises(ValueError, match=message):
        example.fused()
