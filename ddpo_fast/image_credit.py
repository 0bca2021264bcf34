"""CoCA's credit of a denoising step (arXiv 2505.19196): how much nearer it brings the predicted image to the final one.

In step j the model predicts the final latent, x0_hat_j. From its cosine similarity s_j with the final latent x0, where
s_T = 1 stands for x0 itself, follow

    m_k = mean of s_{j+1} over the steps j of window k             (the similarity after those steps)
    g_k = m_k - m_{k-1}, and g_1 = m_1 - s_0                       (the gain of the window)
    R_j = sum over the steps i >= j of g_k(i) / (sum of all gains * length of window k(i))

so that R_0 = 1, and a step's advantage is the image's times R_j. The paper's 50 steps are in 10 windows of 5. Here
there are 10 windows whatever the number of steps, or one for each step if there are fewer than 10.

Shapes: B images, T denoising steps, C H W latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

WINDOWS = 10
# a cosine similarity in fp32 is right to about this
SMALLEST_GAIN = 1e-6


def similarities(predicted: Sequence[Tensor], final: Tensor) -> Tensor:
    """Cosine similarity of each of T `predicted` final latents with the `final` ones, all [B, C, H, W]: [B, T]."""
    return torch.stack([cosine_similarity(one.flatten(1), final.flatten(1), dim=1) for one in predicted], dim=1)


def step_credit(similarity: Tensor) -> Tensor:
    """R_j [B, T] from `similarity` s_0 to s_{T-1}, [B, T].

    Where an image's gains do not sum to something positive, there is nothing to share, and all its steps have 1.
    """
    steps = similarity.shape[1]
    windows = min(WINDOWS, steps)
    # after each step the prediction is the next step's, and after the last one the final latent
    after = torch.cat([similarity[:, 1:], torch.ones_like(similarity[:, :1])], dim=1)
    # window of each step; their lengths differ by at most one step
    window = torch.arange(steps, device=similarity.device) * windows // steps
    lengths = torch.zeros(windows, dtype=similarity.dtype, device=similarity.device)
    lengths.index_add_(0, window, torch.ones_like(lengths[:1]).expand(steps))
    means = torch.zeros(len(similarity), windows, dtype=similarity.dtype, device=similarity.device)
    means.index_add_(1, window, after)
    means /= lengths
    gains = torch.diff(means, dim=1, prepend=similarity[:, :1])
    total = gains.sum(dim=1, keepdim=True)
    weights = (gains / (total * lengths))[:, window]
    credit = weights.flip(1).cumsum(1).flip(1)
    return torch.where(total > SMALLEST_GAIN, credit, torch.ones_like(credit))
