from __future__ import annotations

import pytest
import torch

from ddpo_fast.ops import clipped_surrogate


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.0, -2.0, -2.0),  # unclipped
        (2.0, 1.5, -2.2, 0.0),  # a good action is not pushed past the range
        (2.0, 0.5, -1.0, -2.0),  # but is pulled back
        (-2.0, 1.5, 3.0, 2.0),
        (-2.0, 0.5, 1.8, 0.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clips_where_ppo_does(advantage, ratio, loss, slope):
    ratio = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(torch.tensor([advantage]), 0.1, ratio)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert ratio.grad.item() == pytest.approx(slope)


def test_is_a_mean():
    advantages, ratio = torch.tensor([1.0, -1.0, 3.0]), torch.ones(3)
    assert clipped_surrogate(advantages, 1e-4, ratio).item() == pytest.approx(-1.0)
