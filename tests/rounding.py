"""Bounds for differences by rounding that hold on any processor: measured with the network in fp64.

On some processors the sums of a row do not depend on the number of rows, and then UNet calls with different numbers of
rows give equal bits. On others (oneDNN with AMX or AVX-512, every GPU) they differ by rounding.
"""

from __future__ import annotations

import copy

import torch

from ddpo_fast import ops

# How far two fp64 runs may be apart, as a share of how far training moves the weights. Rounding makes gradients differ
# by about 1e-13. Adam's first steps have the size of the learning rate for any size of the gradient, so an element
# whose gradient is that near to 0 may step in the other direction. Of gradients from N(0, 1) that is a share of 1e-13,
# each apart by two steps: in all 2 sqrt(1e-13) = 6e-7 of the way.
RUNS_APART_IN_FP64 = 1e-5


def in_fp64(trainer):
    """Makes the trainer sample, compute and update in fp64, for tests of what is not rounding."""
    trainer.sd_pipeline.unet.double()
    trainer.sd_pipeline.vae.double()
    draw = trainer.rollout.draw

    def drawn(*arguments):
        made = draw(*arguments)
        made.noise[:] = [noise.double() for noise in made.noise]
        return made

    trainer.rollout.draw = drawn
    return trainer


def drift_limits(trainer) -> list[float]:
    """A list that gets, with an epoch's samples, the `ratio_drift` that its first update may have by rounding alone."""
    limits, generate = [], trainer._generate_samples

    def generate_and_measure(*args, **kwargs):
        samples, batches = generate(*args, **kwargs)
        limits.append(drift_limit(trainer, samples[0]))
        return samples, batches

    trainer._generate_samples = generate_and_measure
    return limits


@torch.no_grad()
def drift_limit(trainer, trajectory) -> float:
    """How far from 1 rounding may move the ratio of a transition that is sampled and scored with the same weights.

    Two evaluations of the network in its precision differ by d, whose root mean square is at most twice that of one
    evaluation's error, which is measured against the same weights in fp64. The log-prob `mean_D(-z^2 / 2)` of a
    transition `next = mean + sigma z` then changes by `a mean_D(z d) - a^2 mean_D(d^2) / 2` with `a = c_m / sigma`. The
    noise z does not depend on the network, so the first term is normal with a standard deviation of
    `a rms(d) / sqrt(D)`; one pair in 10^9 exceeds six of them. `exp` and the subtraction add a few roundings.

    A loss of means over k x k pixels sees the mean of d over them, D / k^2 elements, and noise of sigma / k.
    """
    guided = trainer.policy.config.guides_training
    few = slice(0, 2)  # two images are enough, as the error is a mean over D elements
    noise = 0.0
    with trainer.policy.computing():
        # The network is called by its family: a fault in the trainer's call would be measured as if it were rounding.
        unet = trainer.sd_pipeline.unet
        exact = copy.deepcopy(unet).double()
        family = trainer.policy.family
        for i in trainer.policy.config.trainable_steps:
            timesteps, embeds = trajectory.timesteps[few, i], trajectory.prompt_embeds[few]
            rows = trajectory.latents[few, i].to(unet.dtype)
            if guided:
                embeds = torch.cat([trajectory.negative_prompt_embeds[few], embeds])
                rows = torch.cat([rows, rows])
            operands = torch.cat([timesteps] * (len(rows) // len(timesteps))), embeds.to(unet.dtype)
            rounded = output_of(family, unet, rows, *operands).double()
            error = rounded - output_of(family, exact, rows.double(), operands[0], operands[1].double())
            error = ops.guided(error, trainer.config.sample_guidance_scale) if guided else error
            side = trainer.config.train_pool_latents
            error = side * torch.nn.functional.avg_pool2d(error, side)
            rms = error.square().mean((1, 2, 3)).sqrt()
            noise = max(noise, float((2 * rms * mean_per_sigma(trainer, timesteps)).max()))
    elements = error[0].numel()
    return 6 * noise / elements**0.5 + noise**2 / 2 + 8 * torch.finfo(torch.float32).eps


def output_of(family, network, *inputs) -> torch.Tensor:
    """What the family's call gives for another copy of its network."""
    other = copy.copy(family)
    other.pipe = copy.copy(family.pipe)
    setattr(other.pipe, family.network, network)
    return other.call(*inputs)


def mean_per_sigma(trainer, timesteps: torch.Tensor) -> torch.Tensor:
    """|c_m| / sigma of the steps from `timesteps` [b]: how far the network's output moves the mean of a step.

    Of a step from 0 to 0 with an output of ones the mean is c_m, so the log-prob is `-(c_m / sigma)^2 / 2` less than
    with an output of zeros.
    """
    zeros = torch.zeros(len(timesteps), 1, 1, 1, dtype=torch.float64, device=timesteps.device)
    step, eta = trainer.sd_pipeline.scheduler_step, trainer.config.sample_eta
    at_zero, at_one = (
        step(output, timesteps, zeros, eta=eta, prev_sample=zeros).log_probs for output in (zeros, zeros + 1)
    )
    return (2 * (at_zero - at_one)).double().sqrt()
