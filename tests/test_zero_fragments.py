"""A process's parts of flat tensors, and the whole tensors that are made of all processes' parts.

What DeepSpeed itself tells of its parts, and real messages, are in test_two_processes.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ddpo_fast.engine import optimizers
from ddpo_fast.engine.zero_fragments import ZeroFragments

SHAPES = [(3, 4), (7,), (2, 3, 5), (), (6,), (11, 2)]


def fragments_of(rank: int, whole: torch.Tensor) -> tuple[ZeroFragments, torch.Tensor]:
    """Of the first or second half of all values, as stages 1 and 2 cut them; with that half."""
    half = -(-len(whole) // 2)
    begin, end = rank * half, min((rank + 1) * half, len(whole))
    flat, parameters, position = torch.zeros(half), [], 0
    flat[: end - begin] = whole[begin:end]
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        first, last = max(position, begin), min(position + numel, end)
        mapping = SimpleNamespace(
            param_group_index=0,
            hp_fragment_address=SimpleNamespace(start=first - begin, numel=last - first),
            lp_fragment_address=SimpleNamespace(start=first - position),
        )
        parameters.append(SimpleNamespace(shape=torch.Size(shape), _hp_mapping=mapping if first < last else None))
        position += numel
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=rank)
    return ZeroFragments(SimpleNamespace(single_partition_of_fp32_groups=[flat]), parameters, accelerator), flat


@pytest.mark.parametrize("largest", [1, 20, 10**6], ids=["each-alone", "several-buckets", "one-bucket"])
def test_parts_add_up_to_whole_tensors(monkeypatch, largest):
    monkeypatch.setattr(optimizers, "BUCKET", largest)
    numel = [torch.Size(shape).numel() for shape in SHAPES]
    whole = torch.randn(sum(numel), generator=torch.Generator().manual_seed(0))
    found = []
    for rank in range(2):
        fragments, flat = fragments_of(rank, whole)
        # a moment, say, rather than the weights: other values of the same size
        found.append(fragments.gather_all({id(flat): 2 * flat}, keep=True))
        assert [tensor.numel() for tensor in fragments.gather_all({id(flat): flat}, keep=False)] == [0] * len(SHAPES)
    for first, second, shape, expected in zip(*found, SHAPES, whole.split(numel), strict=True):
        assert torch.equal(first + second, 2 * expected.view(shape))
        # a view would keep the memory of its whole bucket
        assert first.untyped_storage().nbytes() == first.nbytes
