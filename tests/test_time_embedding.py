"""One projection of the time embedding for all residual blocks, as on a GPU, against one for each block."""

from __future__ import annotations

import copy

import pytest
import torch
from example_unets import assert_gradients_add_up, guided, guided_gradients, make_unet
from op_checks import DEVICE, assert_as_exact_as_plain
from peft import LoraConfig

from ddpo_fast.unet import UNetCache, convolutions, fuse_unet, set_gradient_checkpointing, unfuse_unet
from ddpo_fast.unet.time_addends import TimeAddends


@pytest.fixture(autouse=True)
def kernels_add(monkeypatch):
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)


def projects_together(unet):
    linear = unet.time_embedding.linear_1
    embedded = unet.time_embedding(torch.zeros(2, linear.in_features, dtype=unet.dtype, device=DEVICE))
    return isinstance(embedded, TimeAddends)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["bundled", "sd15"])
def test_the_same_output_and_gradients(kind, lora, images):
    unet = make_unet(kind, lora, torch.float64)
    row, doubled = guided(unet, images)
    expected = guided_gradients(unet, doubled)
    assert projects_together(fuse_unet(unet))
    for given in (row, doubled):
        torch.testing.assert_close(guided_gradients(unet, given), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_one_projection_for_each_block(dtype):
    unet = make_unet("sd15", dtype=dtype)
    row, _ = guided(unet)
    apart = fuse_unet(copy.deepcopy(unet))
    apart.time_embedding.register_forward_hook(lambda *_: None)
    assert not projects_together(apart)
    exact = fuse_unet(copy.deepcopy(unet).double())
    found = []
    for model in (fuse_unet(unet), apart, exact):
        given = [tensor.to(model.dtype) if tensor.is_floating_point() else tensor for tensor in row]
        output, gradients = guided_gradients(model, given)
        of_embedding = [g.flatten() for name, g in gradients.items() if "time_emb" in name or "conv1.bias" in name]
        found.append((output, torch.cat(of_embedding)))
    assert_as_exact_as_plain(*found)


def test_gradients_of_several_calls_add_up():
    """The two biases of a block have the same gradient, which must not be the same memory."""
    assert_gradients_add_up(fuse_unet(make_unet("sd15", dtype=torch.float64)))


@pytest.mark.parametrize("layer", ["time_emb_proj", "conv1"])
def test_a_hook_of_a_block_runs(layer):
    unet = make_unet("sd15", dtype=torch.float64)
    row, doubled = guided(unet)
    for block in unet.mid_block.resnets:
        getattr(block, layer).register_forward_hook(lambda module, inputs, output: 1.1 * output)
    fuse_unet(unet)
    assert not projects_together(unet)
    found = unet(*row).sample
    torch.testing.assert_close(found, unfuse_unet(unet)(*doubled).sample, rtol=1e-9, atol=1e-10)


def test_an_adapter_on_the_projections():
    unet = make_unet("sd15", dtype=torch.float64)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["time_emb_proj", "to_q"], init_lora_weights=False))
    unet.double()
    row, doubled = guided(unet)
    expected = guided_gradients(unet, doubled)
    assert not projects_together(fuse_unet(unet))
    torch.testing.assert_close(guided_gradients(unet, row), expected, rtol=1e-7, atol=1e-10)


def test_autocast_is_left_to_the_layers():
    unet = fuse_unet(make_unet("sd15"))
    row, _ = guided(unet)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not projects_together(unet)
        assert unet(*row).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["selective", "blocks"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing(mode, lora):
    unet = fuse_unet(make_unet("sd15", lora, torch.float64))
    row, _ = guided(unet)
    expected = guided_gradients(unet, row)
    set_gradient_checkpointing(unet, mode)
    assert projects_together(unet)
    torch.testing.assert_close(guided_gradients(unet, row), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("images", [1, 2])
def test_cached_layers(images):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64))
    (latents, _, embeds), _ = guided(unet, images)
    timesteps = torch.tensor([801, 3], device=DEVICE)
    with torch.no_grad():
        expected = [unet(latents, t, embeds).sample for t in timesteps]
        cache = UNetCache(unet)
        cache.fill(embeds, timesteps)
        unet.time_embedding.linear_1.weight.zero_()
        unet.mid_block.resnets[0].time_emb_proj.weight.zero_()
        with cache.in_use():
            for step in (1, 0):
                cache.at(step)
                found = unet(latents, timesteps[step], embeds).sample
                torch.testing.assert_close(found, expected[step], rtol=1e-9, atol=1e-10)


def test_undoing_leaves_nothing_behind():
    unet = make_unet("bundled")
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    names = list(unet.state_dict())
    twin = copy.deepcopy(fuse_unet(unet))
    assert list(twin.state_dict()) == names
    own = set(twin.modules())
    assert all(block in own for block in twin.time_embedding.readers)
    assert {name: set(vars(module)) for name, module in unfuse_unet(unet).named_modules()} == before


def test_others_keep_one_projection_for_each_block():
    """Where more than the time is in the embedding, and where an activation is not SiLU."""
    assert type(fuse_unet(make_unet("sdxl")).time_embedding).__name__ == "TimestepEmbedding"
    assert type(fuse_unet(make_unet("sd15", act_fn="gelu")).time_embedding).__name__ == "TimestepEmbedding"
