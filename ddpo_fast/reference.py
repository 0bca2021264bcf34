"""The model before training, to which `train_kl_weight` holds the policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo_fast.policy import Policy
from ddpo_fast.temporary_values import temporary_values


class Reference:
    """The UNet as it was when this object was made: a copy of the trained weights, in the compute precision.

    The copies stand in for the weights during a call of the same UNet, so that its fused layers, attention and
    checkpointing serve both, and frozen weights exist once. For an adapter the copy is small, and a new adapter adds
    nothing to the model yet: its copy is the model with the adapter off.

    To be made before a checkpoint is loaded: a resumed run keeps to the model that the run began with.

    Args:
        trained: the trained parameters.
    """

    def __init__(self, policy: Policy, trained: Sequence[torch.nn.Parameter]) -> None:
        self.policy = policy
        self.trained = list(trained)
        with policy.engine.computing():
            self.values = [parameter.detach().clone() for parameter in self.trained]

    @torch.no_grad()
    def output(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """What `Policy.output` was then, without a graph.

        To be called before the policy's own call: the weights that a backward pass reads must not be exchanged between
        its forward pass and it.
        """
        # entered first: inside, the policy's own `computing` leaves the weights as they are
        with self.policy.engine.computing(), temporary_values(self.trained, self.values):
            return self.policy.output(latents, timesteps, embeds)
