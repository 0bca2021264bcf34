"""One projection of the text for all cross-attentions, as on a GPU, against two for each of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention
from example_unets import assert_gradients_add_up, guided, guided_gradients, make_unet
from op_checks import DEVICE, assert_as_exact_as_plain

from ddpo_fast.unet import UNetCache, convolutions, fuse_unet, set_gradient_checkpointing, text_projections, unfuse_unet


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """As on a GPU; the shapes of the text's projections for all attentions."""
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)
    shapes = []
    project = text_projections.TextProjections._project

    def recorded(self, context):
        shapes.append(tuple(context.shape))
        return project(self, context)

    monkeypatch.setattr(text_projections.TextProjections, "_project", recorded)
    return shapes


def cross_attentions(unet):
    return [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]


@pytest.mark.parametrize("kind", ["bundled", "sd15"])
def test_the_same_output_and_gradients(kind, products):
    unet = make_unet(kind, dtype=torch.float64)
    row, doubled = guided(unet)
    expected = guided_gradients(unet, doubled)
    fuse_unet(unet)
    for given in (row, doubled):
        torch.testing.assert_close(guided_gradients(unet, given), expected, rtol=1e-7, atol=1e-10)
    assert products == [tuple(row[2].shape)] * 2, "one for each call"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_two_projections_for_each_attention(dtype, products):
    unet = make_unet("sd15", dtype=dtype)
    row, _ = guided(unet)
    apart, exact = fuse_unet(copy.deepcopy(unet)), fuse_unet(copy.deepcopy(unet).double())
    cross_attentions(apart)[-1].to_v.register_forward_hook(lambda *_: None)
    found = []
    for model in (fuse_unet(unet), apart, exact):
        given = [tensor.to(model.dtype) if tensor.is_floating_point() else tensor for tensor in row]
        output, gradients = guided_gradients(model, given)
        of_text = [gradient.flatten() for name, gradient in gradients.items() if "attn2.to_" in name]
        found.append((output, torch.cat(of_text)))
    assert len(products) == 2
    assert_as_exact_as_plain(*found)


def test_weights_may_change_between_calls_with_the_same_text(products):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64))
    row, _ = guided(unet)
    with torch.no_grad():
        before = unet(*row).sample
        cross_attentions(unet)[1].to_k.weight.mul_(2)
        after = unet(*row).sample
    assert len(products) == 2
    assert not torch.allclose(after, before)
    torch.testing.assert_close(unfuse_unet(unet)(*guided(unet)[1]).sample, after, rtol=1e-9, atol=1e-10)


def test_a_call_that_was_interrupted_leaves_nothing_for_the_next(products):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64))
    row, _ = guided(unet)
    with torch.no_grad():
        expected = unet(*row).sample

        def interrupt(*_):
            raise InterruptedError

        handle = unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(InterruptedError):
            unet(row[0], row[1], row[2] + 1)
        handle.remove()
        assert torch.equal(unet(*row).sample, expected)
    text = unet.time_embedding.text
    assert (text._context, text._left) == (None, {})


def test_gradients_of_several_calls_add_up():
    assert_gradients_add_up(fuse_unet(make_unet("sd15", dtype=torch.float64)))


@pytest.mark.parametrize("layer", ["attn2", "to_k", "to_v"])
def test_a_hook_runs(layer, products):
    unet = make_unet("sd15", dtype=torch.float64)
    row, doubled = guided(unet)
    plain = unet(*doubled).sample
    attention = cross_attentions(unet)[-1]
    hooked = attention if layer == "attn2" else getattr(attention, layer)
    hooked.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    fuse_unet(unet)
    found = unet(*row).sample
    assert not products
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(found, unfuse_unet(unet)(*doubled).sample, rtol=1e-9, atol=1e-10)


def test_adapters_and_autocast_are_left_to_the_layers(products):
    unet = make_unet("sd15", lora=True, dtype=torch.float64)
    row, doubled = guided(unet)
    expected = guided_gradients(unet, doubled)
    torch.testing.assert_close(guided_gradients(fuse_unet(unet), row), expected, rtol=1e-7, atol=1e-10)
    unet = fuse_unet(make_unet("sd15"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert unet(*guided(unet)[0]).sample.dtype == torch.bfloat16
    assert not products


def test_checkpointed_blocks_project_their_own(products):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64))
    row, _ = guided(unet)
    expected = guided_gradients(unet, row)
    set_gradient_checkpointing(unet, "blocks")
    torch.testing.assert_close(guided_gradients(unet, row), expected, rtol=1e-7, atol=1e-10)
    assert len(products) == 1
    with torch.no_grad():
        unet(*row)
    assert len(products) == 2


def test_cached_projections(products):
    unet = fuse_unet(make_unet("sd15", dtype=torch.float64))
    (latents, timesteps, embeds), _ = guided(unet)
    with torch.no_grad():
        expected = unet(latents, timesteps[0], embeds).sample
        cache = UNetCache(unet)
        cache.fill(embeds, timesteps[:1])
        with cache.in_use():
            cache.at(0)
            found = unet(latents, timesteps[0], embeds).sample
    assert len(products) == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_are_independent(copied, products):
    unet = fuse_unet(make_unet("bundled"))
    row, _ = guided(unet)
    unet(*row)
    twin = copied(unet)
    assert list(twin.time_embedding.text.attentions) == cross_attentions(twin)
    assert torch.equal(twin(*row).sample, unet(*row).sample)
    assert len(products) == 3
