"""The counts of bench/traffic.py against counts made by hand, in half precision; M rows, I inputs, O outputs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import traffic
from lib import traffic_networks
from lib.traffic_compiled import a_gpu, compile_for_counting
from lib.traffic_count import count
from lib.traffic_rules import Launch

from ddpo_fast.unet import fuse_unet
from ddpo_fast.unet.residual_sums import ImageConcatenation

HALF = 2
empty = partial(torch.empty, dtype=torch.float16, device="meta")


def on_meta(module: nn.Module) -> nn.Module:
    return module.to("meta", torch.float16).to(memory_format=torch.channels_last)


def images(*shape: int) -> torch.Tensor:
    return empty(shape).to(memory_format=torch.channels_last).requires_grad_()


def test_a_linear_layer():
    m, i, o = 6, 8, 4
    layer = on_meta(nn.Linear(i, o))
    found = count(layer, lambda: layer(empty(m, i, requires_grad=True)))
    x, w, y, b = (HALF * size for size in (m * i, i * o, m * o, o))
    assert found.forward == [Launch("matmul", x + w + b, y, 2 * m * i * o)]
    # dx = dy w, dw = dy^T x, and db the sum of dy
    expected = [
        Launch("matmul", y + w, x, 2 * m * i * o),
        Launch("matmul", y + x, w, 2 * m * i * o),
        Launch("bias", y, b),
    ]
    assert sorted(found.backward) == sorted(expected)
    assert found.saved == x


def test_a_convolution_copies_what_is_in_another_layout():
    """Of 3x3 on 2 images of 4x4 pixels: 16 pixels x 9 taps x I x O multiply-adds an image."""
    i, o = 8, 16
    layer = on_meta(nn.Conv2d(i, o, 3, padding=1))
    x, w, y, b = (HALF * size for size in (2 * i * 16, 9 * i * o, 2 * o * 16, o))
    flops = 2.0 * 2 * 16 * 9 * i * o
    convolved = [Launch("conv", x + w, y, flops), Launch("bias", y + b, y)]
    last, first = images(2, i, 4, 4), empty(2, i, 4, 4, requires_grad=True)
    assert count(layer, lambda: layer(last)).forward == convolved
    found = count(layer, lambda: layer(first))
    assert found.forward == [Launch("copy", x, x), *convolved]
    products = [launch for launch in found.backward if launch.kind == "conv"]
    assert products == [Launch("conv", y + w, x, flops), Launch("conv", y + x, w, flops)]
    assert Launch("bias", y, b) in found.backward


def test_attention_is_one_kernel_and_its_gradient_three():
    rows, heads, tokens, width = 2, 3, 64, 8
    q = empty(rows, heads, tokens, width, requires_grad=True)
    k, v = q.detach().clone().requires_grad_(), q.detach().clone().requires_grad_()
    layer = nn.Module()
    found = count(layer, lambda: nn.functional.scaled_dot_product_attention(q, k, v))
    one, sums = HALF * q.numel(), 4 * rows * heads * tokens
    product = 2.0 * rows * heads * tokens * tokens * width
    assert found.forward == [Launch("attention", 3 * one, one + sums, 2 * product)]
    assert [launch.kind for launch in found.backward] == ["attention"] * 3
    assert sum(launch.flops for launch in found.backward) == 5 * product
    # and the state of the random generator, which it has without dropout too
    assert found.saved == pytest.approx(4 * one + sums, abs=24)


def residual_block() -> nn.Module:
    return on_meta(ResnetBlock2D(in_channels=32, temb_channels=16, eps=1e-5))


def test_a_residual_block_plain_and_fused():
    """What is saved follows too: of the fused block its input, both norms' inputs and outputs, and statistics."""
    x, temb = images(2, 32, 4, 4), empty(2, 16, requires_grad=True)
    activations, statistics = HALF * x.numel(), 4 * 2 * 32
    plain, fused = residual_block(), fuse_unet(residual_block())
    kinds = [[launch.kind for launch in count(block, lambda b=block: b(x, temb)).forward] for block in (plain, fused)]
    embedding = ["activation", "matmul"]
    norm = ["norm"] * 3
    # the last kernel of `plain` divides by an output factor of 1
    without_copies = [kind for kind in kinds[0] if kind != "copy"]
    assert without_copies == [
        *(*norm, "activation", "conv", "bias", *embedding, "bias"),
        *(*norm, "activation", "conv", "bias", "add", "activation"),
    ]
    # the first convolution's bias is added to the embedding [2, 32], and that to the images by the norm
    assert kinds[1] == ["norm", *embedding, "conv", "bias", "norm", "conv", "bias", "add"]
    # gradients that are there already would be added to
    for leaf in (x, temb, *fused.parameters()):
        leaf.grad = None
    found = count(fused, lambda: fused(x, temb))
    added = HALF * 2 * 32
    assert found.forward[4].written == added
    silu_of_temb = HALF * 2 * 16
    assert found.saved == 4 * activations + 2 * 2 * statistics + 2 * silu_of_temb + added
    norms = [launch for launch in found.forward if launch.kind == "norm"]
    weights = HALF * 2 * 32
    first = Launch("norm", activations + weights, activations + 2 * statistics)
    assert norms == [first, first._replace(read=first.read + added)]
    # of three additions autograd has none left: both norms and the residual hand their gradients to kernels
    assert not any(launch.kind == "add" for launch in found.backward)


def test_the_first_norm_of_an_up_block_makes_the_concatenation():
    """It reads both parts and writes the concatenation, which the shortcut reads, and its own result."""
    block = fuse_unet(on_meta(ResnetBlock2D(in_channels=64, out_channels=32, temb_channels=16)))
    x, beside, temb = images(2, 32, 4, 4), images(2, 32, 4, 4), empty(2, 16, requires_grad=True)
    found = count(block, lambda: block(ImageConcatenation(x, beside), temb))
    both, statistics, weights = HALF * 2 * x.numel(), 2 * 4 * 2 * 32, HALF * 2 * 64
    assert found.forward[0] == Launch("norm", both + weights, 2 * both + statistics)
    # of the sum of two biases, both of which need a gradient of their own
    assert [launch for launch in (*found.forward, *found.backward) if launch.kind == "copy"] == [
        Launch("copy", HALF * 32, HALF * 32)
    ]
    # the backward kernel reads the concatenation and two gradients; each image's sums become those of two vectors
    parts = 4 * 2 * 2 * 64
    expected = Launch("norm", 3 * both + weights + statistics + parts, both + weights + parts)
    assert [launch for launch in found.backward if launch.kind == "norm"][-1] == expected


def test_an_op_without_a_rule_is_refused():
    with pytest.raises(NotImplementedError, match=r"no rule for aten\.cumsum"):
        count(nn.Module(), lambda: empty(3, requires_grad=True).cumsum(0))


def test_the_least_time_is_the_longer_of_flops_and_bytes():
    launches = [Launch("matmul", 6, 4, 1000.0), Launch("add", 60, 40)]
    assert traffic.least_seconds(launches, flops_per_s=100.0, bytes_per_s=10.0) == 10 + 10


def test_sd15_with_a_lora(tmp_path, capsys):
    """803 GFLOP are the UNet's own (bench/lib/scaling_model.py), and the adapters add less than a hundredth.

    Of 2 rows one computes what they share: conv_in, two convolutions of 320 channels at 64 x 64, and a transformer's
    first projection and self-attention (4 projections, and products of 4096 x 4096 scores in 320 channels).
    """
    chosen = "--network sd1.5 --variant fused --trained lora --rows 2".split()
    traffic.main([*chosen, "--output", str(tmp_path / "t")])
    sampling, forward, backward = traffic.records.read([tmp_path / "t"])
    shared = 2.0 * 4096 * 320 * (9 * 4 + 2 * 9 * 320 + 5 * 320 + 2 * 4096)
    assert traffic.total(forward, "flops") == pytest.approx(803e9 - shared / 2, rel=0.003)
    # 61 group norms and 48 layer norms; 52 convolutions of 3x3, the others are matrix products; and copies of the time
    # embedding, of the parameters of its projection (a weight, and the biases of two layers), of three upsamplings and
    # of what is shared: the residuals of a transformer and of its block and the norm, and the output of conv_in, only;
    # and of the first factors of each self-attention's adapters, with the weights for all but those with 1280
    # channels, which are six
    launches = {kind: of["launches"] for kind, of in forward["kinds"].items()}
    copies = 3 + 3 + 3 + 4 + 6 + 10
    assert [launches[kind] for kind in ("norm", "conv", "attention", "copy")] == [61 + 48, 52, 32, copies]
    assert [row["phase"] for row in (sampling, forward, backward)] == ["sampling", "forward", "backward"]
    # without gradients, sums before the last layer norms and the group norms of transformers are not stored beside
    # their copies; the first transformer has one row for the two
    tokens = [320 * 4096] * 5 + [640 * 1024] * 5 + [1280 * 256] * 5 + [1280 * 64]
    shared = 320 * 4096 / 2
    stored = [traffic.total(row, "written", kinds=["norm"]) for row in (forward, sampling)]
    assert stored[0] - stored[1] == HALF * (2 * sum(tokens) - shared)
    assert "of 798 TFLOP/s" in capsys.readouterr().out


def test_networks_are_known_by_name():
    assert list(traffic_networks.PIPELINES) == ["sd1.5", "sdxl", "sd3.5-medium"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_residual_block(fused):
    """By hand, of 2 images with 32 channels: Inductor has one kernel for statistics of a norm, one for its use."""
    network = nn.Sequential(residual_block())
    compile_for_counting(fuse_unet(network) if fused else network)
    x, temb = images(2, 32, 4, 4), empty(2, 16)
    with a_gpu():
        # the first one compiles
        for _ in range(2):
            network.zero_grad()
            found = count(network, lambda: network[0](x, temb))
    y, channels, affine = HALF * x.numel(), HALF * 32, 2 * HALF * 32  # bytes of images, of a vector and of a norm's two
    conv = Launch("conv", y + HALF * 32 * 32 * 9, y, 2.0 * 2 * 16 * 32 * 32 * 9)
    assert [launch for launch in found.forward if launch.kind == "conv"] == [conv, conv]
    # the second convolution's bias and the residual in one kernel, where plain PyTorch has two
    assert found.forward[-1] == Launch("activation", 2 * y + channels, y)
    if fused:
        statistics = 2 * 4 * 2 * 32
        # the project's own op, and with the embedding and the first convolution's bias as an operand
        assert found.forward[0] == Launch("norm", y + affine, y + statistics)
        assert found.forward[5] == Launch("norm", y + affine + HALF * 2 * 32, y + statistics)
        assert len(found.forward) == 8
    else:
        groups = 2 * 32
        # a mean and a sum of squares of each group, in fp32
        assert found.forward[0] == Launch("norm", y, 2 * 4 * groups)
        assert len(found.forward) == 10
    gradients = [launch for launch in found.backward if launch.kind == "conv"]
    assert len(gradients) == 4
