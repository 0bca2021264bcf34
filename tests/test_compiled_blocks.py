"""Blocks compiled by torch.compile, traced and then run op by op: compiling kernels would take minutes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from example_unets import guided_gradients, make_unet
from op_checks import DEVICE
from test_modulated_blocks import make, output_and_gradients
from torch._dynamo.utils import counters

from ddpo_fast.unet import (
    UNetCache,
    compile_blocks,
    convolutions,
    fuse_unet,
    set_gradient_checkpointing,
    unfuse_unet,
)
from ddpo_fast.unet.compiled_blocks import REPEATED

# two kinds of transformer blocks, and more blocks than kinds
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def compiled(network):
    return compile_blocks(network, backend="eager", fullgraph=True)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def rows_of(unet, images):
    generator = torch.Generator().manual_seed(images)
    latents, embeds = (
        torch.randn(shape, generator=generator).to(DEVICE, unet.dtype)
        for shape in ((images, 4, 8, 8), (2 * images, 7, 24))
    )
    return latents, torch.full((images,), 7, device=DEVICE), embeds


@pytest.mark.parametrize(
    ("in_kernels", "lora"), [(False, False), (True, False), (True, True)], ids=["cpu", "gpu", "gpu-lora"]
)
def test_each_kind_is_compiled_once_for_all_rows_and_trains_alike(monkeypatch, in_kernels, lora):
    """'gpu' computes as on a GPU, where blocks hand sums and biases to each other, which compiled ones must not."""
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: in_kernels)
    unet = make_unet("sd15", lora, torch.float64, **SMALL)
    plain = fuse_unet(copy.deepcopy(unet))
    compiled(fuse_unet(unet))
    assert list(unet.state_dict()) == list(plain.state_dict())
    blocks = sum(isinstance(module, REPEATED) for module in unet.modules())
    found = []
    for images in (2, 3, 5, 2):
        row = rows_of(unet, images)
        expected = guided_gradients(plain, row)
        torch.testing.assert_close(guided_gradients(unet, row), expected, rtol=1e-7, atol=1e-10)
        found.append(graphs())
    assert 0 < found[0] < blocks
    assert found == found[:1] * 4
    assert not counters["graph_break"]


def test_the_sampler_keeps_its_cache():
    """Of one rollout's steps and of the next rollout, with other rows, nothing is compiled again."""
    unet = make_unet("sd15", dtype=torch.float64, **SMALL)
    plain = fuse_unet(copy.deepcopy(unet))
    compiled(fuse_unet(unet))
    caches, found = [UNetCache(network) for network in (plain, unet)], []
    with torch.no_grad():
        # with 2 images the embeddings of one timestep would have half as many rows
        for images in (3, 5, 3):
            latents, _, embeds = rows_of(unet, images)
            steps = torch.tensor([7, 90], device=DEVICE)
            for cache in caches:
                cache.fill(embeds, steps)
            for i, step in enumerate(steps):
                outputs = []
                for cache in caches:
                    cache.at(i)
                    with cache.in_use():
                        outputs.append(cache.unet(latents, step, embeds).sample)
                torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-10)
                found.append(graphs())
    assert found[0] > 0
    assert found == found[:1] * 6


def test_checkpointed_blocks_are_compiled():
    unet = make_unet("sd15", dtype=torch.float64, **SMALL)
    row = rows_of(unet, 2)
    expected = guided_gradients(fuse_unet(copy.deepcopy(unet)), row)
    compiled(set_gradient_checkpointing(fuse_unet(unet), "blocks"))
    torch.testing.assert_close(guided_gradients(unet, row), expected, rtol=1e-7, atol=1e-10)
    assert graphs() > 0


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_blocks_of_transformers(kind):
    network = fuse_unet(make(kind))
    plain = copy.deepcopy(network)
    compiled(network)
    torch.testing.assert_close(output_and_gradients(network), output_and_gradients(plain), rtol=1e-7, atol=1e-10)
    assert 0 < graphs() < sum(isinstance(module, REPEATED) for module in network.modules())
    assert not counters["graph_break"]


def test_copies_are_not_compiled_and_layers_can_be_unfused():
    unet = compiled(fuse_unet(make_unet("sd15", **SMALL)))
    assert all(module._compiled_call_impl is None for module in copy.deepcopy(unet).modules())
    kinds = {type(module) for module in unfuse_unet(unet).modules() if isinstance(module, REPEATED)}
    assert kinds == {ResnetBlock2D, BasicTransformerBlock}
