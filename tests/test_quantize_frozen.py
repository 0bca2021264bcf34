"""Frozen linear layers in 8 and 4 bits: their error, their gradient, and LoRA runs over them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from one_sentence import error_of_command
from safetensors.torch import load_file
from tiny_run import build_trainer
from torch import nn
from transformers import T5Config, T5EncoderModel

from ddpo_fast.lora import LORA_WEIGHTS
from ddpo_fast.prompts import ListPrompts
from ddpo_fast.quantize_frozen import BLOCKS, QuantizedLinear, quantize_linears

pytest.importorskip("bitsandbytes")

KINDS = ("8bit", "4bit")
# Half the widest gap between neighbouring levels, in units of a block's largest magnitude: 1/127 apart, and for NF4
# between -1 and -0.6962 (QLoRA, arXiv 2305.14314, appendix E).
FURTHEST = {"8bit": 1 / 254, "4bit": (1 - 0.6961928) / 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def frozen_linear(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 128).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_as_near_as_its_levels_are(kind, dtype):
    linear = frozen_linear(dtype)
    layer = QuantizedLinear(linear, kind, "cpu", dtype)
    blocks = linear.weight.double().view(-1, BLOCKS[kind])
    largest = blocks.abs().amax(1, keepdim=True)
    error = (layer.weight.double().view_as(blocks) - blocks).abs()
    # Kernels may take either neighbour within a hundredth of a gap of the middle; the product of level and scale is
    # rounded to the precision of the weight.
    assert (error <= (1.02 * FURTHEST[kind] + torch.finfo(dtype).eps) * largest).all()
    assert (
        layer.packed.nbytes + layer.scales.nbytes
        == linear.weight.numel() * {"8bit": 1 + 4 / 256, "4bit": 0.5 + 4 / 64}[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_dequantized_weight(kind):
    layer = QuantizedLinear(frozen_linear(torch.float32), kind, "cpu", torch.float32)
    x = torch.randn(5, 96, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, layer.weight.double(), layer.bias.double())
    grad = torch.randn(5, 128)
    layer(x).backward(grad)
    expected.backward(grad.double())
    # sums of 96 and 128 products in fp32
    for found, wanted, terms in ((layer(x), expected, 96), (x.grad, exact.grad, 128)):
        assert (found.double() - wanted).abs().max() <= terms * 2**-24 * wanted.abs().max()


def test_what_is_replaced(tmp_path):
    network = nn.ModuleDict({"small": nn.Linear(8, 8), "big": nn.Linear(64, 64), "trained": nn.Linear(64, 64)})
    network["small"].requires_grad_(False)
    big = network["big"].requires_grad_(False).weight
    quantize_linears(network, "8bit", "cpu", torch.float32)
    assert [type(module) for module in network.values()] == [nn.Linear, QuantizedLinear, nn.Linear]
    # saved as it was, and neither rounded nor moved by a cast of the whole
    network.to(torch.bfloat16)
    assert torch.equal(network.state_dict()["big.weight"], big)
    assert network["big"].scales.view(torch.float32).numel() == 64 * 64 // BLOCKS["8bit"]


def test_t5_is_called_and_saved(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=1, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).requires_grad_(False).eval()
    exact = copy.deepcopy(encoder)
    quantize_linears(encoder, "8bit", "cpu", torch.bfloat16)
    encoder.to(torch.bfloat16)
    ids = torch.arange(8)[None]
    quantized = encoder(ids)[0]
    assert quantized.dtype == torch.bfloat16
    # normalised to a mean square of 1: bf16 has 8 bits, and so have the weights, over seven layers
    assert (quantized.float() - exact(ids)[0]).abs().max() < 14 * 2**-7
    encoder.save_pretrained(tmp_path)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], exact.state_dict()[name])


@pytest.fixture(scope="module", params=KINDS)
def run(request, model_dir, tmp_path_factory):
    """A trainer of a LoRA over quantized weights after two epochs, and its settings."""
    folder = tmp_path_factory.mktemp(request.param)
    # the state of their generator is saved
    prompts = ListPrompts(["a cat", "a dog", "a horse"])
    settings = {"quantize_frozen": request.param, "sample_num_steps": 2, "use_lora": True, "prompts": prompts}
    trainer = build_trainer(model_dir, folder / "run", train_micro_batch_size=1, **settings)
    trainer.train()
    return trainer, settings


def test_adapters_are_saved_over_the_weights_as_they_were(run, model_dir):
    trainer, _ = run
    assert any(isinstance(module, QuantizedLinear) for module in trainer.sd_pipeline.unet.modules())
    trainer.save_model()
    final = trainer.output_dir / "final"
    name = "unet/diffusion_pytorch_model.safetensors"
    saved, original = load_file(final / name), load_file(f"{model_dir}/{name}")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    pipe = StableDiffusionPipeline.from_pretrained(final)
    pipe.load_lora_weights(str(final), weight_name=LORA_WEIGHTS)
    adapter = {name: p for name, p in pipe.unet.named_parameters() if "lora_B" in name}
    trained = {name: p for name, p in trainer.sd_pipeline.unet.named_parameters() if "lora_B" in name}
    assert len(adapter) == len(trained)
    assert any(p.abs().max() > 0 for p in adapter.values())
    assert {p.sum().item() for p in adapter.values()} == {p.sum().item() for p in trained.values()}


def test_a_resumed_run_ends_with_the_same_bits(run, model_dir, tmp_path):
    trainer, settings = run
    again = build_trainer(
        model_dir,
        tmp_path / "again",
        train_micro_batch_size=1,
        resume_from=str(trainer.output_dir / "checkpoints" / "checkpoint_1"),
        **settings,
    )
    again.train()
    for one, other in zip(
        trainer.engine.optimizer.param_groups[0]["params"],
        again.engine.optimizer.param_groups[0]["params"],
        strict=True,
    ):
        assert torch.equal(one, other)


def test_the_ratio_is_1_whatever_the_micro_batch(model_dir, tmp_path):
    """The sampler's rows and training's give the same output: no row depends on the others of its call."""
    trainer = build_trainer(
        model_dir, tmp_path / "run", use_lora=True, quantize_frozen="4bit", sample_num_steps=2, num_epochs=1
    )
    unet, embeds = trainer.policy.unet, trainer.policy.negative_embeds
    latents, timesteps = torch.randn(4, *trainer.policy.latent_shape), torch.tensor([1, 200, 500, 900])
    with torch.no_grad():
        whole = unet(latents, timesteps, embeds.expand(4, -1, -1)).sample
    unet.train()
    rows = [unet(latents[i : i + 1], timesteps[i : i + 1], embeds).sample for i in range(4)]
    # the order of sums may differ between calls of other sizes, a few roundings in units of the largest value
    assert (torch.cat(rows) - whole).abs().max() < 100 * torch.finfo(torch.float32).eps * whole.abs().max()


def test_all_weights_cannot_be_trained(model_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="quantize_frozen is '4bit', but all weights of the network are trained"):
        build_trainer(model_dir, tmp_path / "run", quantize_frozen="4bit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpo_fast.pipeline.load_pipeline", None)
    options = ["--full-finetune", "--quantize_frozen", "8bit", "--mixed_precision", "no"]
    assert "quantize_frozen is '8bit', but all" in error_of_command(["train", *options])
