"""Gives every process the main one's weights, because each initialises a new LoRA at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ddpo_fast.engine.optimizers import buckets


@torch.no_grad()
def copy_from_main(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Copies the main process's values into the tensors of every process, which are of one dtype and on any device.

    The tensors of a bucket go in one message, as most of them are small.
    """
    if accelerator.num_processes == 1:
        return
    for bucket in buckets(tensor.numel() for tensor in tensors):
        members = [tensors[i] for i in bucket]
        # NCCL, the backend on GPUs, cannot send from host memory
        message = torch.cat([member.flatten() for member in members]).to(accelerator.device)
        dist.broadcast(message, src=0)
        for member, part in zip(members, message.split([member.numel() for member in members]), strict=True):
            member.copy_(part.view(member.shape))
