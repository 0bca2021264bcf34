from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from op_checks import DEVICE
from test_fuse_unet import KINDS, make_unet, output_and_gradients, predict

from ddpo_fast import attention
from ddpo_fast.attention import SDPAProcessor, XFormersProcessor, attention_problem, is_plain, set_attention
from ddpo_fast.fuse_unet import fuse_unet, unfuse_unet


@pytest.fixture
def fake_xformers(monkeypatch):
    """xformers with an attention that runs anywhere, in place of the real one; its calls' shapes."""
    calls = []

    def memory_efficient_attention(query, key, value):
        calls.append((query.shape, key.shape, value.shape))
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, module.memory_efficient_attention = module, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return calls


@pytest.fixture
def can_run(monkeypatch, fake_xformers):
    monkeypatch.setattr(attention, "attention_problem", lambda *_: "")
    return fake_xformers


def processors(unet) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sdpa", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_output_and_gradients(can_run, kind, name, lora):
    unet = make_unet(kind, lora, torch.float64)
    expected = output_and_gradients(unet)
    assert set_attention(unet, name) == ("sdpa" if name == "sdpa" else "xformers", "")
    torch.testing.assert_close(output_and_gradients(unet), expected, rtol=1e-7, atol=1e-10)
    modules = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(can_run) == (0 if name == "sdpa" else len(modules))
    if name != "sdpa":
        # the heads stay where the projections put them
        shapes = {(rows, shape[2] * shape[3]) for queries in can_run for shape in queries[:1] for rows in shape[:1]}
        assert shapes == {(2, module.inner_dim) for module in modules}


def test_masks_go_to_pytorch(can_run):
    unet = make_unet("sd15", dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7], device=DEVICE)
    expected = predict(unet, encoder_attention_mask=mask)
    set_attention(unet, "xformers")
    torch.testing.assert_close(predict(unet, encoder_attention_mask=mask), expected, rtol=1e-9, atol=1e-10)
    # self-attention has no mask
    assert can_run
    assert all(query == key for query, key, _ in can_run)


def test_fusing_keeps_the_chosen_attention(can_run):
    unet = make_unet("bundled")
    set_attention(unet, "xformers")
    assert processors(fuse_unet(unet)) == {XFormersProcessor}
    assert processors(unfuse_unet(unet)) == {XFormersProcessor}
    set_attention(fuse_unet(unet), "sdpa")
    assert processors(unet) == {SDPAProcessor}
    assert processors(unfuse_unet(unet)) == {AttnProcessor2_0}


def test_copies(can_run):
    unet = make_unet("bundled")
    set_attention(unet, "xformers")
    assert torch.equal(predict(copy.deepcopy(unet)), predict(unet))


def test_auto_takes_pytorch_and_says_why(caplog, monkeypatch):
    unet = make_unet("bundled").cpu()
    caplog.clear()
    caplog.set_level("INFO", logger="ddpo_fast.attention")
    reason = "xformers' attention runs on CUDA only, not on cpu"
    assert set_attention(unet, "auto") == ("sdpa", reason)
    assert caplog.messages == [f"attention: sdpa ({reason})"]
    assert processors(unet) == {SDPAProcessor}
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert set_attention(unet, "auto", device="cuda")[0] == "sdpa"
    assert set_attention(unet, "auto", device="cuda")[1].startswith("xformers cannot be imported")


def test_xformers_says_why_not():
    unet = make_unet("bundled").cpu()
    with pytest.raises(ValueError, match="'xformers' was asked for but cannot run: xformers' attention runs on CUDA"):
        set_attention(unet, "xformers")
    assert processors(unet) == {AttnProcessor2_0}


def test_unknown_names():
    with pytest.raises(ValueError, match="'flash' but must be 'auto', 'sdpa', 'xformers'"):
        set_attention(make_unet("bundled"), "flash")


def test_pytorch_always_can():
    assert attention_problem("sdpa", [40, 80, 160], "cpu", torch.float64) == ""


def test_every_head_dim_is_tried(fake_xformers, monkeypatch):
    monkeypatch.setattr(attention, "_refusal", lambda head_dim, *_: f"not {head_dim}" if head_dim > 100 else "")
    assert attention_problem("xformers", [40, 80], "cuda") == ""
    assert attention_problem("xformers", [160, 40, 320], "cuda") == "not 160"


def test_the_trial_trains(fake_xformers, monkeypatch):
    """Kernels may exist for the forward pass alone."""
    assert attention._refusal(40, "cpu", torch.float32) == ""

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            return query.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("No operator found for `backward` with inputs:\n  query: ...")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", ForwardOnly.apply)
    with torch.no_grad():
        reason = attention._refusal(40, "cpu", torch.float32)
    assert reason == "xformers refuses head dim 40 in float32 on cpu: No operator found for `backward`"


def test_the_real_xformers_is_asked():
    pytest.importorskip("xformers.ops")
    reason = attention._refusal(40, "cpu", torch.float32)
    assert reason.startswith("xformers refuses head dim 40 in float32 on cpu: No operator found")
    assert "\n" not in reason


@pytest.mark.parametrize(
    "settings",
    [{"qk_norm": "layer_norm"}, {"norm_num_groups": 8}, {"rescale_output_factor": 2.0}, {"residual_connection": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_attention_is_left_alone(settings):
    module = Attention(query_dim=32, heads=4, dim_head=8, **settings)
    assert not is_plain(module)
    set_attention(torch.nn.Sequential(module), "sdpa")
    assert type(module.processor) is AttnProcessor2_0


def test_other_processors_are_left_alone():
    module = Attention(query_dim=32, heads=4, dim_head=8, processor=AttnProcessor())
    set_attention(torch.nn.Sequential(module), "sdpa")
    assert type(module.processor) is AttnProcessor
