from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from ddpo_fast import ops


def example(dtype=torch.float64, shape=(3, 4, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    m, x, following = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    c_x, c_m, sigma = torch.rand(3, shape[0], generator=generator, dtype=torch.float64) + 0.1
    return [v.to(dtype) for v in (m, x, following, c_x, c_m, sigma)]


def test_log_prob_is_the_mean_log_density_of_a_gaussian():
    m, x, following, c_x, c_m, sigma = example()
    mean = c_x[:, None, None, None] * x + c_m[:, None, None, None] * m
    expected = Normal(mean, sigma[:, None, None, None]).log_prob(following).mean((1, 2, 3))
    torch.testing.assert_close(ops.score_step(m, x, following, c_x, c_m, sigma), expected)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 63, 1), (3, 4, 8, 8)])
def test_gradient(shape):
    m, x, following, c_x, c_m, sigma = example(shape=shape)
    m.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.score_step(m, x, following, c_x, c_m, sigma), m)


def test_the_log_prob_of_a_sampled_step_follows_from_its_noise():
    m, x, noise, c_x, c_m, sigma = example()
    following = ops.take_step(m, x, noise, c_x, c_m, sigma)
    expected = (-noise.square() / 2).mean((1, 2, 3)) - sigma.log() - ops_constant()
    torch.testing.assert_close(ops.score_step(m, x, following, c_x, c_m, sigma), expected)


def ops_constant() -> float:
    return 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)).item()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_everything_after_a_half_precision_output_is_fp32(half):
    m, x, following, c_x, c_m, sigma = example(torch.float32)
    rounded = m.to(half)
    log_prob = ops.score_step(rounded, x, following, c_x, c_m, sigma)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, ops.score_step(rounded.float(), x, following, c_x, c_m, sigma))
    both = torch.cat([rounded, rounded + 1])
    assert ops.guided(both, 5.0).dtype == torch.float32
    torch.testing.assert_close(ops.guided(both, 5.0), ops.guided(both.float(), 5.0))


def test_guidance():
    uncond, text = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.5]])
    torch.testing.assert_close(ops.guided(torch.cat([uncond, text]), 5.0), torch.tensor([[11.0], [4.5]]))
