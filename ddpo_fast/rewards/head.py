"""The last layers of a reward: from a CLIP's unit-length image embedding to a score.

Layouts of files that are read, all with fp32 tensors:

    weight [1, D], bias [1]                    LAION's first version: one linear layer
    layers.{0,2,4,6,7}.{weight,bias}           LAION's second version and TRL's aesthetic-model.pth: five linear layers
    layers.{0,3,6,9,11}.{weight,bias}          the same with a ReLU between two layers

The gaps in the numbers are layers without weights in training: dropout and ReLU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ddpo_fast.rewards.weight_files import read_weights

# the numbers of linear layers with other layers between them, and whether there are ReLUs among these
_NUMBERS: dict[tuple[int, ...], bool] = {(0, 2, 4, 6, 7): False, (0, 3, 6, 9, 11): True}
# the widths of LAION's layers behind the embedding
MLP_WIDTHS = (1024, 128, 64, 16, 1)


def head_layers(widths: Sequence[int], relu: bool = False) -> nn.Sequential:
    """Linear layers between `widths`, the first of which is the embedding's and the last 1; a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        if layers and relu:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def read_head(path: Path) -> nn.Sequential:
    """The head in a file of any of the layouts above, in fp32. Raises `ValueError` for another file."""
    tensors = read_weights(path)
    if set(tensors) == {"weight", "bias"}:
        names, relu = [""], False
    else:
        numbers = sorted({int(found[1]) for key in tensors if (found := re.fullmatch(r"layers\.(\d+)\.\w+", key))})
        names, relu = [f"layers.{number}." for number in numbers], _NUMBERS.get(tuple(numbers), False)
        keys = {name + kind for name in names for kind in ("weight", "bias")}
        if tuple(numbers) not in _NUMBERS or set(tensors) != keys:
            raise ValueError(
                f"{str(path)!r} is no aesthetic head: it has {', '.join(sorted(tensors)[:4])} where a head has weight "
                "and bias, or layers.0.weight and so on of LAION's five layers"
            )
    weights = [tensors[f"{name}weight"] for name in names]
    head = head_layers([weights[0].shape[-1], *(len(weight) for weight in weights)], relu)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    try:
        for name, layer in zip(names, linear, strict=True):
            layer.load_state_dict({kind: tensors[f"{name}{kind}"].float() for kind in ("weight", "bias")})
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is no aesthetic head: the sizes of its layers do not fit") from error
    if linear[-1].out_features != 1:
        raise ValueError(f"{str(path)!r} is no aesthetic head: it gives {linear[-1].out_features} numbers, and not 1")
    return head.requires_grad_(False)


def head_width(head: nn.Sequential) -> int:
    """The width of the embeddings that the head takes."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    return first.in_features


def scores(head: nn.Sequential, embeds: torch.Tensor) -> torch.Tensor:
    """The scores [B] of unit-length embeddings [B, D] in fp32."""
    return head(embeds).squeeze(-1)
