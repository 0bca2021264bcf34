"""Advantages of denoising steps from a learned value: the reward that the latents before a step let expect.

DDPO gives each denoising step the advantage of its whole image, although most of it was decided by the noise of other
steps: in the gradient of this one, that is noise. Let V_t be the reward that is to be expected before step t of the T
steps. The reward R is the sum of what each step changed in it and of what V does not know at the end:

    R - V_0 = (V_1 - V_0) + ... + (V_{T-1} - V_{T-2}) + (R - V_{T-1})

A step's advantage is its own term, and an equal part of the last one:

    A_t = V_{t+1} - V_t + (R - V_{T-1}) / T,   with V_T = V_{T-1}

The first part is generalised advantage estimation's delta (arXiv 1506.02438) of a reward that comes at the end. The
second one is what all steps are given without values. Where nothing is learned, all V are 0 and A_t is R / T: DDPO's
advantage, but for a constant. The variance of what a step is given falls from that of R to about that of its own
change. The expected gradient is the same if V is right: E[V_{t+1} | latents before step t] = V_t.

**The regression.** V_t is a kernel ridge regression of rewards on features of the image that the model predicts in step
t (`predicted_features`), with this epoch's images and remembered ones. Rewards and features are distances from the mean
of the set of images that are compared, such as a group, so that V is 0 on average in each. The kernel of two images is
the inner product of their features, doubled if they have the same prompt: what prompts share is learned from all
images, and what one has of its own from its own. When V of an image is predicted, its whole set is left out. For a
linear smoother, `prediction = H rewards`, this needs no further regression: the errors of the set s that is left out
are (1 - H_ss)^-1 (rewards - H rewards)_s. The ridge is the one with the smallest of these errors; if none predicts
better than 0, V_t is 0.

Shapes: B images of an epoch, M images of a regression, T denoising steps, C H W latent, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from ddpo_fast.by_size import BySize

# Images that are remembered at most, and images of a regression: its time grows with the cube of their number, and is a
# second for 20 steps of 512.
REMEMBERED, TOGETHER = 256, 512
# The layout's features are means of so many parts of a side, those of detail are taken at so many scales.
PARTS, SCALES = 4, 4
# Ridges that are tried, in units of the kernel's mean eigenvalue.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
# Of latents, whose variance is about 1, and of features.
SMALLEST = 1e-6


def predicted_features(predicted: Tensor) -> Tensor:
    """Features [B, F] fp32 of predicted final latents [B, C, H, W]: their layout, and their detail at several scales.

    Of each channel: the means of the whole and of 4 x 4 parts; the mean absolute differences of neighbours across and
    down; and the logarithms of the mean squared difference and of the variance after averaging over 1, 2, 4 and 8
    pixels a side. Logarithms, as detail counts by its ratio: JPEG's bits do, for instance.
    """
    x = predicted.float()
    across, down = x.diff(dim=3), x.diff(dim=2)
    found = [x.mean((2, 3)), adaptive_avg_pool2d(x, PARTS).flatten(1)]
    found += [_mean(across.abs()), _mean(down.abs())]
    found.append(torch.log(_mean(across.square()) + _mean(down.square()) + SMALLEST))
    for scale in range(SCALES):
        if scale:
            if min(x.shape[2:]) < 4:
                break
            x = avg_pool2d(x, 2)
        found.append(torch.log(x.var((2, 3), correction=0) + SMALLEST))
    return torch.cat(found, dim=1)


def _mean(x: Tensor) -> Tensor:
    """The mean over pixels [B, C] of x [B, C, H, W]; 0 without any, as one pixel has no neighbours."""
    return x.sum((2, 3)) / max(x.shape[2] * x.shape[3], 1)


class ComparedSet(NamedTuple):
    """Images whose rewards are compared with each other; on the CPU."""

    features: Tensor  # [m, T, F] fp32
    rewards: Tensor  # [m] fp32
    prompts: list[str]  # m


class StepValues:
    """Turns rewards into advantages of denoising steps, by the values that it learns from an epoch to the next."""

    def __init__(self) -> None:
        self._by_size: BySize[list[ComparedSet]] = BySize(list)
        # the share of the rewards' variance that V explains, the mean over an epoch's steps
        self.explained = 0.0

    def use_size(self, size: str) -> None:
        """Learns from images of this size from here on; see `BySize`."""
        self._by_size.use(size)

    def advantages(
        self, features: Tensor, rewards: np.ndarray, prompts: Sequence[str], sets: Sequence[np.ndarray], trained: range
    ) -> np.ndarray:
        """Advantages [B, T] fp32, whose root mean square over the images with any and the trained steps is 1.

        Images of a set whose rewards are all equal have advantages of 0.

        Args:
            features: of the prediction in each step, [B, T, F], on the CPU.
            rewards: [B].
            sets: which images belong to each set that is compared, [B] bool each.
            trained: the steps of the T that are trained.
        """
        numbers = [np.flatnonzero(mine) for mine in sets if np.ptp(rewards[mine]) > 0]
        found = np.zeros(features.shape[:2], dtype=np.float32)
        self.explained = 0.0
        if not numbers:
            return found
        features, given = features.float(), torch.as_tensor(np.asarray(rewards, dtype=np.float32))
        remembered = self._by_size.now
        known = remembered + [ComparedSet(features[n], given[n], [prompts[int(i)] for i in n]) for n in numbers]
        parts = [(_terms(part), sum(len(one.prompts) for one in part)) for part in _parts(known, TOGETHER)]
        mine = torch.cat([terms for (terms, _), _ in parts])[-sum(map(len, numbers)) :]
        used = slice(trained.start, trained.stop)
        scale = mine[:, used].square().mean().sqrt()
        found[np.concatenate(numbers)] = (mine / scale).float().numpy()
        images = sum(count for _, count in parts)
        self.explained = sum(float(explained[used].mean()) * count / images for (_, explained), count in parts)
        remembered[:] = _latest(known, REMEMBERED)
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._by_size.packed(lambda sets: {"sets": [tuple(one) for one in sets]})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._by_size.unpack(state, lambda packed: [ComparedSet(*one) for one in packed["sets"]])


def _parts(sets: list[ComparedSet], images: int) -> list[list[ComparedSet]]:
    """`sets` in order, in parts of equal numbers of sets, with at most so many images where sets are no larger."""
    total = sum(len(one.prompts) for one in sets)
    size = -(-len(sets) // -(-total // images))
    return [sets[start : start + size] for start in range(0, len(sets), size)]


def _latest(sets: list[ComparedSet], images: int) -> list[ComparedSet]:
    """The last of `sets`, with at most so many images together."""
    first, left = len(sets), images
    while first and len(sets[first - 1].prompts) <= left:
        first -= 1
        left -= len(sets[first].prompts)
    return sets[first:]


def _terms(sets: Sequence[ComparedSet]) -> tuple[Tensor, Tensor]:
    """A_t of the images of all sets, in their order, [M, T] fp64, and the share of the variance that V_t explains, [T].

    In units of the rewards, with the whole of each set left out of the regression of its own V.
    """
    rewards = torch.cat([one.rewards.double() - one.rewards.double().mean() for one in sets])
    features = torch.cat([one.features.double() - one.features.double().mean(0) for one in sets])
    prompts = np.array([prompt for one in sets for prompt in one.prompts], dtype=object)
    shared = torch.from_numpy(1.0 + (prompts[:, None] == prompts[None]))
    sizes = [len(one.prompts) for one in sets]
    predicted = [_predicted_when_left_out(step, rewards, shared, sizes) for step in features.unbind(1)]
    values = torch.stack([value for value, _ in predicted], dim=1)
    unknown = (rewards - values[:, -1]) / len(predicted)
    changes = torch.diff(values, dim=1, append=values[:, -1:])
    return changes + unknown[:, None], torch.stack([share for _, share in predicted])


def _predicted_when_left_out(
    features: Tensor, rewards: Tensor, shared: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rewards [M] as predicted from features [M, F] by the images of other sets, and the share that this explains, [].

    Args:
        shared: [M, M], by which the inner products of features are multiplied.
        sizes: of the sets, which are consecutive images.
    """
    if len(sizes) == 1:
        return torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    scaled = features / (features.square().mean(0).sqrt() + SMALLEST)
    eigenvalues, vectors = torch.linalg.eigh(scaled @ scaled.T / scaled.shape[1] * shared)
    # the kernel has no negative ones but for rounding
    eigenvalues = eigenvalues.clamp(min=0)
    projected, rows = vectors.T @ rewards, vectors.split(sizes)
    total = rewards.square().mean()
    best, smallest = torch.zeros_like(rewards), total
    for ridge in RIDGES:
        shrunk = eigenvalues / (eigenvalues + ridge * eigenvalues.mean() + SMALLEST**2)
        residuals = (rewards - vectors @ (shrunk * projected)).split(sizes)
        errors = torch.cat(
            [
                torch.linalg.solve(torch.eye(len(mine), dtype=mine.dtype) - (mine * shrunk) @ mine.T, residual)
                for mine, residual in zip(rows, residuals, strict=True)
            ]
        )
        if (error := errors.square().mean()) < smallest:
            best, smallest = rewards - errors, error
    return best, 1 - smallest / total
