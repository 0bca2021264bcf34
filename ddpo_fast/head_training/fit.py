"""The weights of a head from embeddings and what was given for them.

Shapes: N ratings or pairs, D the width of an embedding. Embeddings are [N, D] of rated images, or [N, 2, D] of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ddpo_fast.head_training.split import validation_rows
from ddpo_fast.rewards.head import MLP_WIDTHS, head_layers, scores

# Penalties on a linear head's squared weights that are tried, in units of the embeddings' mean variance. The lowest
# loss on a fifth of the training rows chooses one.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# LAION's dropout behind the layers of its MLP but the last two
DROPOUT = (0.2, 0.2, 0.1)
# the numbers of the linear layers in LAION's file of an MLP with ReLUs; the others are dropout and ReLU
MLP_NUMBERS = (0, 3, 6, 9, 11)
CHUNK = 8192


def predicted(head: nn.Sequential, embeds: torch.Tensor) -> torch.Tensor:
    """A score for each rated image, or the first image's score minus the second's for each pair: [N]."""
    flat = scores(head, embeds.flatten(0, -2)).view(embeds.shape[:-1])
    return flat if flat.ndim == 1 else flat[:, 0] - flat[:, 1]


def loss(outputs: torch.Tensor, targets: torch.Tensor, are_pairs: bool) -> torch.Tensor:
    """Mean squared error of scores, or Bradley-Terry's cross-entropy with the share of preference, a half for ties."""
    return F.binary_cross_entropy_with_logits(outputs, targets) if are_pairs else F.mse_loss(outputs, targets)


# a linear head


def fit_linear(
    embeds: torch.Tensor, targets: torch.Tensor, groups: np.ndarray, seed: int
) -> tuple[nn.Sequential, float]:
    """A linear head and the penalty that was chosen for it.

    Args:
        groups: [N]; the rows that choose the penalty share no group with those that it is chosen for.
    """
    are_pairs = embeds.ndim == 3
    penalty = PENALTIES[2]
    if len(np.unique(groups)) > 1:
        aside = torch.from_numpy(validation_rows(groups, [[str(group)] for group in groups.tolist()], 0.2, seed))
        losses = []
        for candidate in PENALTIES:
            head = _linear(embeds[~aside], targets[~aside], candidate)
            losses.append(loss(predicted(head, embeds[aside]), targets[aside], are_pairs).item())
        penalty = PENALTIES[int(np.argmin(losses))]
    return _linear(embeds, targets, penalty), penalty


def _linear(embeds: torch.Tensor, targets: torch.Tensor, penalty: float) -> nn.Sequential:
    head = head_layers([embeds.shape[-1], 1]).requires_grad_(False)
    mean = embeds.flatten(0, -2).mean(0)
    if embeds.ndim == 3:
        weight = _newton(embeds[:, 0] - embeds[:, 1], targets, penalty).float()
        # comparisons say nothing about the scores' mean, which is set to 0
        bias = -(weight @ mean)
    else:
        weight = _ridge(embeds - mean, targets - targets.mean(), penalty).float()
        bias = targets.mean() - weight @ mean
    layer = next(_linear_layers(head))
    layer.weight.copy_(weight[None])
    layer.bias.fill_(bias)
    return head


def _ridge(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights w [D] in fp64 that minimise |inputs w - targets|^2 / N + penalty * v |w|^2, v the mean variance."""
    ones = torch.ones(len(inputs), dtype=torch.float64)
    gram, ahead = _moments(inputs, ones, targets.double())
    return torch.linalg.solve(gram + penalty * gram.trace() / len(gram) * torch.eye(len(gram)), ahead)


def _newton(differences: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights w [D] in fp64 of the least Bradley-Terry loss plus penalty * v |w|^2 / 2, by Newton's method."""
    targets = targets.double()
    weight = torch.zeros(differences.shape[1], dtype=torch.float64)
    ridge = penalty * differences.double().square().mean().item()

    def objective(w: torch.Tensor) -> float:
        outputs = torch.cat([part.double() @ w for part in differences.split(CHUNK)])
        return (F.binary_cross_entropy_with_logits(outputs, targets) + ridge / 2 * w @ w).item()

    best = objective(weight)
    for _ in range(50):
        chances = torch.cat([part.double() @ weight for part in differences.split(CHUNK)]).sigmoid()
        curvature, ahead = _moments(differences, chances * (1 - chances), targets - chances)
        curvature += ridge * torch.eye(len(weight))
        step = torch.linalg.solve(curvature, ahead - ridge * weight)
        # far from the minimum a whole step can go too far
        scale = next((s for s in (1.0, 0.5, 0.25, 0.1, 0.01) if objective(weight + s * step) < best - 1e-12), None)
        if scale is None:
            return weight
        weight += scale * step
        best = objective(weight)
    return weight


def _moments(inputs: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means over N of w x x^T, [D, D], and of x t, [D], in fp64, from a part of the rows at a time."""
    width = inputs.shape[1]
    second, first = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for x, w, t in zip(inputs.split(CHUNK), weights.split(CHUNK), targets.split(CHUNK), strict=True):
        x = x.double()
        second += x.T @ (w[:, None] * x)
        first += x.T @ t
    return second / len(inputs), first / len(inputs)


# LAION's MLP


def fit_mlp(
    embeds: torch.Tensor,
    targets: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> nn.Sequential:
    """LAION's MLP with ReLUs and dropout, by Adam; the weights after the last epoch."""
    generator = torch.Generator().manual_seed(seed)
    are_pairs = embeds.ndim == 3
    # scores are fitted with mean 0 and deviation 1, which the last layer then undoes
    mean, std = (0.0, 1.0) if are_pairs else (targets.mean().item(), targets.std().item())
    head = _initialised(head_layers([embeds.shape[-1], *MLP_WIDTHS], relu=True), generator)
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    bar = tqdm(range(epochs), desc="training the head", unit="epoch")
    for _ in bar:
        losses = []
        for rows in torch.randperm(len(embeds), generator=generator).split(batch_size):
            part = embeds[rows]
            outputs = _with_dropout(head, part.flatten(0, -2), generator).view(part.shape[:-1])
            outputs = outputs[:, 0] - outputs[:, 1] if are_pairs else outputs
            value = loss(outputs, (targets[rows] - mean) / std, are_pairs)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        bar.set_postfix(loss=f"{torch.stack(losses).mean():.4f}")
    head.requires_grad_(False)
    *_, last = _linear_layers(head)
    last.weight.mul_(std)
    last.bias.mul_(std).add_(mean)
    if are_pairs:
        # comparisons say nothing about the scores' mean, which is set to 0
        last.bias.sub_(torch.cat([scores(head, part) for part in embeds.flatten(0, 1).split(CHUNK)]).mean())
    return head


def _initialised(head: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """torch's own initial weights of linear layers, drawn from `generator`."""
    for layer in _linear_layers(head):
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return head


def _with_dropout(head: nn.Sequential, embeds: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The head's outputs [N], with LAION's dropout behind the ReLUs of its first layers."""
    hidden, behind = embeds, iter(DROPOUT)
    for layer in head:
        hidden = layer(hidden)
        if isinstance(layer, nn.ReLU) and (share := next(behind, 0.0)):
            hidden = hidden * (torch.rand(hidden.shape, generator=generator) >= share) / (1 - share)
    return hidden.squeeze(-1)


def _linear_layers(head: nn.Sequential) -> Iterator[nn.Linear]:
    return (layer for layer in head if isinstance(layer, nn.Linear))


def head_tensors(head: nn.Sequential) -> dict[str, torch.Tensor]:
    """The tensors of a head's file: LAION's first layout of a linear head, else that of its MLP with ReLUs."""
    layers = list(_linear_layers(head))
    names = [""] if len(layers) == 1 else [f"layers.{number}." for number in MLP_NUMBERS]
    return {
        f"{name}{kind}": getattr(layer, kind).detach().contiguous()
        for name, layer in zip(names, layers, strict=True)
        for kind in ("weight", "bias")
    }
