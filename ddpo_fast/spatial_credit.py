"""The credit of each spatial frequency of the latents: what the gradient by the model's output is multiplied by there.

A step's noise is independent in every spatial frequency, so its log-prob is a sum over the frequencies, and each has a
gradient of its own. A UNet turns gradients into changes of its output that are far larger in low frequencies, because
its convolutions and its attention share their weights over all pixels. An update of the bundled model that changes
every latent pixel by 0.1 standard deviations of its step (root mean square) shifts the mean over the image by 0.5 to
0.9 of that mean's own standard deviation, in the same direction in all steps, and with random rewards too: over 20
steps the colour of the image moves by three times what it varies by. Most of that is noise of the gradient, and it
limits how far updates may go. With a credit of

    (f / f_max)^p,    f the frequency in periods a pixel, f_max = 1/2, and the mean as if f were 1 / (2 side)

the same change of the pixels, with p = 0.75, shifts the mean by half as much.

The credit multiplies the gradient alone. Ratios, the clip and log-probs are those of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpo_fast.ops.operands import laid_out_as

HIGHEST = 0.5


def spatially_credited(gradient: Tensor, power: float) -> Tensor:
    """The gradient [R, C, H, W] by an output, with each spatial frequency times its credit, in the same layout.

    Args:
        power: p above, at least 0; 0 returns the gradient itself.
    """
    if power == 0:
        return gradient
    height, width = gradient.shape[-2:]
    # complex numbers in half precision exist only on some devices, and for some sizes
    exact = gradient if gradient.dtype == torch.float64 else gradient.float()
    spectrum = torch.fft.rfft2(exact) * spatial_credits(height, width, power, exact)
    return laid_out_as(gradient, torch.fft.irfft2(spectrum, s=(height, width)))


def spatial_credits(height: int, width: int, power: float, like: Tensor) -> Tensor:
    """The credits of the frequencies in the order of `torch.fft.rfft2`, [H, W // 2 + 1]; `like` has dtype and device.

    They are computed on the device, as a CUDA graph records no copy from the host.
    """
    options = {"dtype": like.dtype, "device": like.device}
    vertical, horizontal = torch.fft.fftfreq(height, **options), torch.fft.rfftfreq(width, **options)
    frequency = (vertical[:, None].square() + horizontal.square()).sqrt()
    least = HIGHEST / max(height, width)
    return (frequency.clamp(min=least, max=HIGHEST) / HIGHEST).pow(power)
