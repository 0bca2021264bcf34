"""Finds a process's parts of the fp32 parameters under DeepSpeed's ZeRO; converts whole parameters to parts and back.

DeepSpeed copies the trained parameters, flattened and in fp32, into a few flat tensors, which its optimizer trains.
Each process has a part of every flat tensor. This module reads attributes that DeepSpeed does not document:
    ds_id, ds_shape, ds_numel   on a parameter that stage 3 has split: its id, whole shape and number of elements
    ds_tensor                   this process's part of such a parameter, in the compute precision
    _hp_mapping                 on a parameter of stages 1 and 2: which part of it this process has ("hp" and "lp" are
                                high and low precision)
    fp32_partitioned_groups_flat, single_partition_of_fp32_groups    this process's parts of the flat tensors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ddpo_fast.engine import moments
from ddpo_fast.engine.optimizers import buckets


class Fragment(NamedTuple):
    """This process's part of a parameter: `flat[start : start + size]` are the values of
    `parameter.flatten()[offset : offset + size]`."""

    flat: Tensor
    start: int
    offset: int
    size: int


class ZeroFragments:
    """The parts that this process has of some parameters.

    Args:
        zero_optimizer: DeepSpeed's, after it has taken the parameters.
        parameters: the trained ones.
    """

    def __init__(self, zero_optimizer: Any, parameters: Sequence[Any], accelerator: Accelerator) -> None:
        self.parameters = list(parameters)
        self.accelerator = accelerator
        self.shapes: list[torch.Size] = [getattr(p, "ds_shape", p.shape) for p in self.parameters]
        self._fragments = [_fragment(zero_optimizer, p, accelerator.process_index) for p in self.parameters]
        # this process's flat tensors, each once
        self.flats = list({id(f.flat): f.flat for f in self._fragments if f is not None}.values())

    def gather_all(self, values: dict[int, Tensor], keep: bool) -> list[Tensor]:
        """Assembles a whole tensor for each parameter from all processes: fp32, in host memory.

        Every process must call it. The tensors of a bucket go in one message, as most of them are small.

        Args:
            values: for each flat tensor of this process, by its `id`, the tensor of the same size to gather: the
                weights, a moment or the moving average.
            keep: False if this process only takes part: its tensors are then empty.
        """
        gathered: list[Tensor] = []
        for bucket in buckets(shape.numel() for shape in self.shapes):
            sizes = [self.shapes[i].numel() for i in bucket]
            # each process fills in its parts, and the sum over processes is the whole
            joined = torch.zeros(sum(sizes), device=self.accelerator.device)
            wholes = joined.split(sizes)
            for i, whole in zip(bucket, wholes, strict=True):
                if (fragment := self._fragments[i]) is not None:
                    flat, start, offset, size = fragment
                    whole[offset : offset + size].copy_(values[id(flat)].detach()[start : start + size])
            if self.accelerator.num_processes > 1:
                dist.all_reduce(joined)
            for i, whole in zip(bucket, wholes, strict=True):
                # copied on a CPU too, where a view would keep the whole bucket in memory
                gathered.append(whole.view(self.shapes[i]).to("cpu", copy=True) if keep else torch.empty(0))
        return gathered

    @torch.no_grad()
    def set_weights(self, values: Sequence[Tensor]) -> None:
        """Sets the parameters in both precisions, from whole values that are the same on every process."""
        for parameter, fragment, value in zip(self.parameters, self._fragments, values, strict=True):
            if fragment is not None:
                flat, start, offset, size = fragment
                part = value.flatten()[offset : offset + size]
                flat[start : start + size].copy_(part)
                if hasattr(parameter, "ds_tensor"):
                    parameter.ds_tensor.data.view(-1)[:size].copy_(part)
            # at stage 3 a parameter is empty unless a layer has gathered it, and the copy is then not needed
            if parameter.numel() == value.numel():
                parameter.data.copy_(value)

    def from_checkpoint(self, saved: Sequence[moments.SavedMoment], moment: str) -> dict[int, Tensor]:
        """A moment of each parameter from a checkpoint, as values of this process's flat tensors, by their `id`."""
        parts = {id(flat): torch.zeros(flat.numel()) for flat in self.flats}
        for value, fragment, shape in zip(saved, self._fragments, self.shapes, strict=True):
            if fragment is not None:
                flat, start, offset, size = fragment
                # DeepSpeed's parameters are contiguous, so a contiguous tensor on `meta` gives the order of the values.
                whole = moments.from_checkpoint(value, torch.empty(shape, device="meta"), moment)
                parts[id(flat)][start : start + size] = whole[offset : offset + size]
        return parts


def _fragment(zero_optimizer: Any, parameter: Any, rank: int) -> Fragment | None:
    """The part of a parameter that the process `rank` has, or None if others have all of it."""
    if hasattr(parameter, "ds_id"):
        # Stage 3 cuts each parameter separately, into parts of equal size. The last parts may reach beyond the
        # parameter's end, and the rest of them is padding; a part may consist of padding only.
        group, start, _ = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
        part = parameter.ds_tensor.ds_numel
        size = min(part, parameter.ds_numel - rank * part)
        if size <= 0:
            return None
        return Fragment(zero_optimizer.fp32_partitioned_groups_flat[group], start, rank * part, size)
    # Stages 1 and 2 put all parameters one after the other and cut the whole into parts, even within a parameter.
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = zero_optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, in_flat.start, in_parameter.start, in_flat.numel)
