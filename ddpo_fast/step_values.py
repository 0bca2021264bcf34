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

**The regression.** A linear model of rewards is learned from the features of the images that the last step predicts
(`predicted_features`), those of this epoch and remembered ones, by ridge regression. It is applied to what each earlier
step predicts. Its errors are then much the same before a step and after it, and cancel in V_{t+1} - V_t; regressions of
the steps' own would have errors of their own. The features of each step are in units of their deviation there, and V_t
is the model's value times the slope of the rewards by it: an early prediction says less.

Rewards and features are distances from the mean of the set of images that are compared, such as a group. The kernel of
two images is the inner product of their features, multiplied by 1 + c if they have the same prompt: what prompts share
is learned from all images, and what one has of its own from its own. The ridge and c are those with the smallest error
when each image is left out. If none predicts better than 0, all V are 0.

**An image is left out** of the regression that foretells its own reward, and of the mean of its set, which is the mean
of the n - 1 others there: its reward is y' = y n / (n - 1), where y is the distance from the mean of all, and theirs
are y_j + y / (n - 1). No further regression is needed. A linear smoother H predicts y'_i without i as

    ((H y')_i - H_ii y'_i) / (1 - H_ii)

and the weights of this regression are those that the whole one has if y'_i is replaced by its prediction.

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

# Images that are remembered at most, and an epoch's images of a regression: its time grows with the cube of their sum,
# and is a second for 512.
REMEMBERED, TOGETHER = 256, 256
# The layout's features are means of so many parts of a side, those of detail are taken at so many scales.
PARTS, SCALES = 4, 4
# How much more two images of one prompt have in common that are tried, and ridges, in units of the kernel's mean
# eigenvalue.
OWN = (0.0, 1.0, 4.0)
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
        # the share of the rewards' variance that V explains, the mean over an epoch's trained steps
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
        new = [ComparedSet(features[n], given[n], [prompts[int(i)] for i in n]) for n in numbers]
        remembered = self._by_size.now
        parts = [_values(remembered, part) for part in _parts(new, TOGETHER)]
        targets, values = (torch.cat(both) for both in zip(*parts, strict=True))
        terms = _terms(targets, values)
        scale = terms[:, trained.start : trained.stop].square().mean().sqrt()
        found[np.concatenate(numbers)] = (terms / scale).float().numpy()
        unknown = (targets[:, None] - values[:, trained.start : trained.stop]).square().mean()
        self.explained = max(0.0, 1 - float(unknown / targets.square().mean()))
        remembered[:] = _latest(remembered + new, REMEMBERED)
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


def _terms(targets: Tensor, values: Tensor) -> Tensor:
    """A_t [n, T] of images with the rewards `targets` [n] and the values V_t [n, T]."""
    changes = torch.diff(values, dim=1, append=values[:, -1:])
    return changes + (targets - values[:, -1])[:, None] / values.shape[1]


def _values(remembered: Sequence[ComparedSet], new: Sequence[ComparedSet]) -> tuple[Tensor, Tensor]:
    """The n new images' rewards [n], as distances from the mean of the others of their set, and V_t [n, T], in fp64.

    No image takes part in the regression that foretells its own reward.
    """
    sets = [*remembered, *new]
    prompts = np.array([prompt for one in sets for prompt in one.prompts], dtype=object)
    sizes = torch.tensor([len(one.prompts) for one in sets])
    features = _scaled(torch.cat([_centred(one.features) for one in sets]))
    targets, weights = _fitted(
        features[:, -1],
        torch.cat([_centred(one.rewards) for one in sets]),
        torch.from_numpy((prompts[:, None] == prompts[None]).astype(np.float64)),
        torch.arange(len(sizes)).repeat_interleave(sizes),
    )
    # each image's own model, applied to all of its steps
    values = torch.einsum("mtf,mf->mt", features, weights)
    slopes = (values * targets[:, None]).sum(0) / values.square().sum(0).clamp(min=torch.finfo(values.dtype).tiny)
    are_new = slice(len(values) - sum(len(one.prompts) for one in new), None)
    return targets[are_new], (values * slopes.clamp(min=0))[are_new]


def _centred(x: Tensor) -> Tensor:
    """The distances in fp64 from the mean over the first dimension."""
    return x.double() - x.double().mean(0)


def _scaled(x: Tensor) -> Tensor:
    """`x` over its deviation from 0 over the first dimension."""
    return x / (x.square().mean(0).sqrt() + SMALLEST)


def _fitted(features: Tensor, rewards: Tensor, same_prompt: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """The regression of rewards [M] on features [M, F] of the last step, both centred in each set.

    Returns the rewards as distances from the mean of the others of their set, [M], and for each image the weights of
    features in the model that foretells its reward, [M, F].

    Args:
        same_prompt: whether two images have the same prompt, 1 or 0, [M, M].
        sets: the number of each image's set, [M].
    """
    same_set = (sets[:, None] == sets[None]).to(rewards.dtype)
    # what an image's reward adds to the distances of the others of its set, if it is left out of their mean
    shift = rewards / (same_set.sum(1) - 1)
    targets = rewards + shift
    smallest, weights = targets.square().mean(), torch.zeros_like(features)
    inner = features @ features.T / features.shape[1]
    for own in OWN:
        shared = 1 + own * same_prompt
        eigenvalues, vectors = torch.linalg.eigh(inner * shared)
        # the kernel has no negative ones but for rounding
        eigenvalues = eigenvalues.clamp(min=0)
        for ridge in RIDGES:
            inverse = 1 / (eigenvalues + ridge * eigenvalues.mean() + SMALLEST**2)
            smoother = (vectors * (eigenvalues * inverse)) @ vectors.T
            alone = smoother.diagonal()
            of_others = smoother @ rewards + (smoother * same_set).sum(1) * shift - alone * targets
            predicted = of_others / (1 - alone)
            if (error := (targets - predicted).square().mean()) < smallest:
                # each column: the rewards as an image sees them, its own being what is foretold
                seen = rewards[:, None] + same_set * shift
                seen.fill_diagonal_(0).add_(torch.diag(predicted))
                duals = (vectors * inverse) @ (vectors.T @ seen)
                smallest, weights = error, (shared * duals.T) @ features / features.shape[1]
    return targets, weights
