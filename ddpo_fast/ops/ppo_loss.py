"""The clipped PPO objective (arXiv 1707.06347, eq. 7) as a loss."""

from __future__ import annotations

import torch


def clipped_surrogate(advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
    """`mean(max(-A r, -A clip(r, 1 - c, 1 + c)))`; advantages and ratio are [N], the loss is a scalar."""
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()
