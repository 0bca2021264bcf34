"""What rounding may do on any processor: asked of the network, in fp64, and not of the processor at hand.

On some processors the sums of a row do not depend on how many rows there are, and then two UNet calls with other rows
agree to the bit. On others (oneDNN with AMX or AVX-512, every GPU) they agree to the network's rounding.
"""

from __future__ import annotations

import copy

import torch

from ddpo_fast import ops

# What one fp64 rounding grows to, in a run: gradients agree to about 1e-13. Adam's first steps have the size of the
# learning rate whatever the gradient's, so elements whose gradient is as near to 0 as that may take the other sign: of
# N(0, 1) a share of 1e-13, each twice as far as a step apart, in all 2 sqrt(1e-13) = 6e-7 of the way.
RUNS_APART_IN_FP64 = 1e-5


def in_fp64(trainer):
    """The trainer with its chain, its networks, its losses and its steps in fp64, for what is not about rounding."""
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
    """Gets, as the trainer trains, the `ratio_drift` that an epoch's first update may have by rounding alone."""
    limits, train_on = [], trainer._train_on

    def train_on_measured(trajectory, *rest):
        limits.append(drift_limit(trainer, trajectory))
        return train_on(trajectory, *rest)

    trainer._train_on = train_on_measured
    return limits


@torch.no_grad()
def drift_limit(trainer, trajectory) -> float:
    """How far from 1 the ratio may be of a transition that sampling and training score with the same weights.

    Two evaluations of the network in its precision are apart by d, element by element, of at most twice the root mean
    square of one's error, which is measured against the same weights in fp64. Of a transition `next = mean + sigma z`
    the log-prob `mean_D(-z^2 / 2)` then changes by `a mean_D(z d) - a^2 mean_D(d^2) / 2` with `a = c_m / sigma`. The
    noise z was drawn without looking at the network, so the first term is normal with a standard deviation of
    `a rms(d) / sqrt(D)`: six of them are passed by one pair in 10^9. `exp` and the subtraction round a few times more.
    """
    guided = trainer.config.guides_training
    few = slice(0, 2)  # an error is a mean over D elements already
    noise = 0.0
    with trainer.policy.computing():
        # not by the trainer's own call, which may have another fault than rounding
        unet, exact = trainer.sd_pipeline.unet, copy.deepcopy(trainer.sd_pipeline.unet).double()
        for i in range(trajectory.timesteps.shape[1]):
            timesteps, embeds = trajectory.timesteps[few, i], trajectory.prompt_embeds[few]
            rows = trajectory.latents[few, i].to(unet.dtype)
            if guided:
                embeds = torch.cat([trajectory.negative_prompt_embeds[few], embeds])
                rows = torch.cat([rows, rows])
            operands = torch.cat([timesteps] * (len(rows) // len(timesteps))), embeds.to(unet.dtype)
            rounded = unet(rows, *operands).sample.double()
            error = rounded - exact(rows.double(), operands[0], operands[1].double()).sample
            error = ops.guided(error, trainer.config.sample_guidance_scale) if guided else error
            _, c_m, sigma = trainer.policy.noise_table[timesteps].double().unbind(1)
            rms = error.square().mean((1, 2, 3)).sqrt()
            noise = max(noise, float((2 * rms * c_m.abs() / sigma).max()))
    elements = trajectory.trail[0, 0].numel()
    return 6 * noise / elements**0.5 + noise**2 / 2 + 8 * torch.finfo(torch.float32).eps
