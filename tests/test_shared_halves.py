"""A UNet that computes what both rows of guidance have in common once computes the same as with all rows."""

from __future__ import annotations

import copy

import pytest
import torch
from example_unets import inputs_of, make_unet, trained_parameters
from torch import nn

from ddpo_fast.unet import UNetCache, fuse_unet, set_gradient_checkpointing, shares_halves, unfuse_unet
from ddpo_fast.unet.fused_layers import FUSIBLE, faster_layers

ON_CPU = faster_layers("cpu")


def guided(unet, images=2):
    """(N latents, N timesteps, embeddings of 2N rows)."""
    given = inputs_of(unet)
    latents, timesteps = given["sample"][:images], given["timestep"][:images]
    embeds = torch.cat([given["encoder_hidden_states"].flip(0)[:images], given["encoder_hidden_states"][:images]])
    return latents, timesteps, embeds


def output_and_gradients(unet, latents, timesteps, embeds):
    output = unet(latents, timesteps, embeds).sample
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    trained = trained_parameters(unet)
    gradients = torch.autograd.grad((weights * output).sum(), list(trained.values()), allow_unused=True)
    return output, dict(zip(trained, gradients, strict=True))


def doubled(latents, timesteps, embeds):
    return torch.cat([latents] * 2), torch.cat([timesteps] * 2), embeds


@pytest.mark.parametrize("layers", [FUSIBLE, ON_CPU], ids=["all", "cpu"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["bundled", "sd15"])
def test_the_same_output_and_gradients(kind, lora, layers):
    unet = make_unet(kind, lora, torch.float64)
    row = guided(unet)
    expected = output_and_gradients(unet, *doubled(*row))
    fuse_unet(unet, layers)
    assert shares_halves(unet)
    torch.testing.assert_close(output_and_gradients(unet, *row), expected, rtol=1e-7, atol=1e-10)
    # rows that have nothing in common may be given too
    torch.testing.assert_close(output_and_gradients(unet, *doubled(*row)), expected, rtol=1e-7, atol=1e-10)


def test_one_image_and_a_scalar_timestep():
    unet = make_unet("sd15", dtype=torch.float64)
    latents, timesteps, embeds = guided(unet, images=1)
    expected = unet(*doubled(latents, timesteps, embeds)).sample
    fused = fuse_unet(unet)(latents, timesteps[0], embeds).sample
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-10)


def test_a_unet_whose_first_block_has_no_attention():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = make_unet("sd15", dtype=torch.float64, **blocks)
    row = guided(unet)
    expected = output_and_gradients(unet, *doubled(*row))
    assert shares_halves(fuse_unet(unet, ON_CPU))
    torch.testing.assert_close(output_and_gradients(unet, *row), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", ["selective", "blocks"])
def test_gradient_checkpointing(mode):
    unet = fuse_unet(make_unet("sd15", lora=True, dtype=torch.float64), ON_CPU)
    row = guided(unet)
    expected = output_and_gradients(unet, *row)
    set_gradient_checkpointing(unet, mode)
    torch.testing.assert_close(output_and_gradients(unet, *row), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("images", [1, 2])
def test_cached_layers(images):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64), ON_CPU)
    latents, timesteps, embeds = guided(unet, images)
    with torch.no_grad():
        expected = unet(latents, timesteps[0], embeds).sample
        cache = UNetCache(unet)
        cache.fill(embeds, timesteps[:1])
        with cache.in_use():
            cache.at(0)
            found = unet(latents, timesteps[0], embeds).sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_shared_layers_see_half_of_the_rows():
    unet = fuse_unet(make_unet("sd15"))
    rows = {}
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(lambda _, inputs, out, name=name: rows.update({name: len(inputs[0])}))
    unet(*guided(unet))
    halved = {name for name, count in rows.items() if count == 2}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {"conv_in", "down_blocks.0.resnets.0.conv2", f"{block}.norm1"} <= halved
    assert {rows[f"{block}.norm2"], rows["down_blocks.0.downsamplers.0.conv"], rows["conv_out"]} == {4}


def test_unfusing_gives_the_classes_back():
    unet = make_unet("sd15")
    classes, names = [type(module) for module in unet.modules()], list(unet.state_dict())
    twin = copy.deepcopy(fuse_unet(unet, ON_CPU))
    assert shares_halves(twin)
    assert list(twin.state_dict()) == names
    assert [type(module) for module in unfuse_unet(twin).modules()] == classes
    assert not shares_halves(twin)


def test_a_time_embedding_with_the_prompt_is_not_shared():
    assert not shares_halves(fuse_unet(make_unet("sdxl")))
