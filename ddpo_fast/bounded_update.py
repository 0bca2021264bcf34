"""Bounded updates: how far an update moved the policy is measured, and the learning rate follows.

Adam makes steps of about the learning rate whatever the gradient is worth. How far such a step moves a policy depends
on the model, the batch and the time since the start: the first step, which is +- the learning rate in every weight,
moves it several times further than later ones. PPO's clip does not bound an update either: the first one of an epoch
begins at ratios of 1, where nothing is clipped. So the distance is measured after each update, on a few pairs, and an
update that went too far is shortened, or lengthened if it hardly moved the policy: Adam's step is proportional to its
learning rate, so this is the step with the right one.

The distance of an update is the root mean square, over the measured pairs and the elements of a latent, of

    credit * c_m (m_after - m_before) / sigma,

the distance that the step's mean has moved in standard deviations of the step (see ddim.py), times the step's credit.
For one step this is sqrt(2 KL / D) times the credit. Where the loss looks at pooled latents (`train_pool_latents`), it
is the distance of the pooled step, in standard deviations of that. It depends neither on the reward nor on the number D
of a latent's elements, so one target serves models of all sizes.

Shapes: N (image, timestep) pairs, C H W latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo_fast import ops
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import Engine
from ddpo_fast.policy import Policy
from ddpo_fast.trajectory import Pairs

# Pairs of each process to measure an update by: two forward passes of 8 pairs cost a thirtieth of an update of 160
# pairs. A pair's mean square varies by about a half, so that the distance is known within a tenth.
MEASURED_PAIRS = 8
# An update is left as it is if its distance is the target within this factor.
TOLERANCE = 1.25
# Longer than the optimizer made it an update becomes at most by this factor, and so does the learning rate from update
# to update: an update may be short because its gradient has little to say.
FASTEST_RISE = 2.0
# How often an update is changed at most. The first time assumes that the distance is linear in the step, which is not
# so for long steps: the changed one is measured, and changed again.
CHANGES = 3


class BoundedUpdate:
    """Measures one update after the other: `begin` before the gradients, then `settle` after the step."""

    def __init__(self, config: DDPOConfig, policy: Policy, engine: Engine, accelerator: Accelerator) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.accelerator = accelerator
        self._calls: list[Pairs] = []
        self._before: list[Tensor] = []
        # what the update was multiplied by so far
        self._changes: list[float] = []
        self.metrics: dict[str, Tensor] = {}

    def begin(self, calls: Sequence[Pairs]) -> None:
        """Keeps the model's output for some pairs of the update, given in UNet calls, under the present weights."""
        self._calls = list(calls)
        self._before = self._outputs()
        self._changes = []

    def settle(self) -> float:
        """Measures the update and returns what to multiply it by, to be called again until that is 1.

        The last call sets the factor of the next learning rate.
        """
        distance = self._distance()
        target = self._target(self.engine.updates - 1)
        # Nothing moved where fp16 overflowed and the step was skipped, or where no pair had a gradient. The comparisons
        # are false for a NaN too, which health.py reports.
        wanted = target / distance if distance > 0 else 1.0
        # 1.0, so that it is a float without changes, too: an integer tensor cannot be averaged over processes
        share = math.prod(self._changes, start=1.0)
        change = min(wanted, FASTEST_RISE / share)
        is_far = not 1 / TOLERANCE <= wanted <= TOLERANCE and change != 1
        # without a copy of the weights before it, an update cannot be changed
        if is_far and len(self._changes) < CHANGES and not self.config.optimizer_in_backward:
            self._changes.append(change)
            return change
        self._log(update_distance=distance, update_share=share, rate_factor=self.engine.rate.factor)
        self.engine.rate.factor *= min(FASTEST_RISE, share * wanted)
        self._calls, self._before = [], []
        return 1.0

    def _target(self, updates: int) -> float:
        """The distance that the update after `updates` updates should have.

        A gradient of few images is mostly noise, so the random parts of updates add up as a random walk, whose squared
        distance from the start is the sum of the squared targets: with `train_target_decay` it grows with the logarithm
        of the number of updates, and the parts that agree still add up to its square root.
        """
        decay = self.config.train_target_decay
        fallen = 1 / math.sqrt(1 + updates / decay) if decay else 1.0
        return self.config.train_target_update * fallen * self.engine.rate.share(updates)

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """The model's output for the pairs, guided where training is and pooled as in the loss, in fp32, by call."""
        guidance = self.config.sample_guidance_scale
        outputs = [self.policy.output(pairs.latents, pairs.timesteps, pairs.embeds) for pairs in self._calls]
        combined = [ops.guided(out, guidance) if self.config.guides_training else out.float() for out in outputs]
        return [self.policy.pooled(output) for output in combined]

    def _distance(self) -> float:
        """The distance of the update, over the pairs of all processes."""
        squares = []
        for pairs, before, after in zip(self._calls, self._before, self._outputs(), strict=True):
            weights = self.policy.step_weights(pairs.timesteps)
            squares.append(weights.square() * (after - before).square().flatten(1).mean(1))
        mean: Tensor = self.accelerator.reduce(torch.cat(squares).mean(), reduction="mean")
        # the host waits for the device here, once an update
        return mean.sqrt().item()

    def _log(self, **values: float) -> None:
        self.metrics = {name: torch.tensor(value, device=self.policy.device) for name, value in values.items()}
