"""Gradient checkpointing keeps less for the backward pass and gives the same gradients."""

from __future__ import annotations

import pytest
import torch
from compare_runs import same_bits, trained_weights
from example_unets import make_unet, output_and_gradients, predict

from ddpo_fast.batch_sizes import kept_bytes
from ddpo_fast.ops import force_backend
from ddpo_fast.unet import faster_layers, fuse_unet, set_gradient_checkpointing

KINDS = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def kept(unet) -> int:
    there = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    return kept_bytes(lambda: predict(unet), there)


@KINDS
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_each_mode_keeps_less_than_the_one_before(lora, fused):
    unet = make_unet("bundled", lora)
    if fused:
        # with their C++ the layers of `selective` are fused already
        with force_backend("reference"):
            fuse_unet(unet, faster_layers("cpu"))
    none, selective, blocks = (kept(set_gradient_checkpointing(unet, mode)) for mode in ("none", "selective", "blocks"))
    assert blocks < 0.6 * selective < 0.6 * 0.95 * none
    # fused layers stay fused, and blocks are not checkpointed
    assert kept(set_gradient_checkpointing(unet, "none")) == selective


@KINDS
@pytest.mark.parametrize("kind", ["bundled", "sdxl"])
def test_blocks_give_the_same_bits(kind, lora):
    unet = make_unet(kind, lora)
    plain = output_and_gradients(unet)
    torch.testing.assert_close(output_and_gradients(set_gradient_checkpointing(unet, "blocks")), plain, rtol=0, atol=0)


@KINDS
def test_selective_gives_the_same_gradients_up_to_rounding(lora):
    unet = make_unet("bundled", lora, torch.float64)
    plain = output_and_gradients(unet)
    torch.testing.assert_close(
        output_and_gradients(set_gradient_checkpointing(unet, "selective")), plain, rtol=1e-7, atol=1e-10
    )


@KINDS
def test_fusing_and_both_modes_together(lora):
    """The order in which a UNet is fused and its mode is set does not matter."""
    unet = make_unet("bundled", lora, torch.float64)
    plain = output_and_gradients(unet)
    fuse_unet(set_gradient_checkpointing(set_gradient_checkpointing(unet, "selective"), "blocks"))
    torch.testing.assert_close(output_and_gradients(unet), plain, rtol=1e-7, atol=1e-10)


def test_sampling_does_not_checkpoint(monkeypatch):
    unet = set_gradient_checkpointing(make_unet("bundled"), "blocks").eval()
    monkeypatch.setattr(
        "ddpo_fast.unet.gradient_checkpointing.checkpoint", lambda *args, **kwargs: pytest.fail("checkpointed")
    )
    with torch.no_grad():
        predict(unet)
        predict(unet.train())


def test_dropout_has_the_same_mask_when_a_block_runs_again():
    unet = make_unet("bundled", dropout=0.0)
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    torch.manual_seed(3)
    plain = output_and_gradients(unet)
    torch.manual_seed(3)
    torch.testing.assert_close(output_and_gradients(set_gradient_checkpointing(unet, "blocks")), plain, rtol=0, atol=0)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing is 'some' but must be 'none', 'selective', 'blocks'"):
        set_gradient_checkpointing(make_unet("bundled"), "some")


@KINDS
def test_a_run_trains_the_same(lora, make_trainer, tmp_path):
    ends = []
    for mode in ("none", "blocks"):
        trainer = make_trainer(use_lora=lora, output_dir=str(tmp_path / mode), num_epochs=1, save_freq=9)
        set_gradient_checkpointing(trainer.sd_pipeline.unet, mode)
        trainer.step(0, 0)
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)
