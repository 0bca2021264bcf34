from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from example_unets import add_adapter
from op_checks import DEVICE

from ddpo_fast.unet import convolutions, fuse_unet, unfuse_unet
from ddpo_fast.unet import modulated_blocks as blocks
from ddpo_fast.unet.fused_layers import FUSIBLE
from ddpo_fast.unet.joint_attention import JointProcessor

WIDTH = 32
# diffusers computes RMS norms in fp32 whatever their input is, so a fused one is more exact in fp64
LAYERS = FUSIBLE - {RMSNorm}


def make(kind, dtype=torch.float64):
    torch.manual_seed(0)
    of_heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
    if kind == "flux":
        made = FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 6, 6),
            **of_heads,
        )
    else:
        dual = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if kind == "sd3.5" else {}
        sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 3, "pos_embed_max_size": 8}
        made = SD3Transformer2DModel(
            caption_projection_dim=WIDTH, pooled_projection_dim=12, **sizes, **of_heads, **dual
        )
    return made.to(DEVICE, dtype).train()


def call(network):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, network.dtype)

    given = {"encoder_hidden_states": draw(2, 5, 24), "pooled_projections": draw(2, 12)}
    given["timestep"] = torch.tensor([3, 700], device=DEVICE)
    if isinstance(network, SD3Transformer2DModel):
        return network(draw(2, 4, 8, 8), **given).sample
    ids = torch.arange(48.0, device=DEVICE).view(16, 3) % 5
    return network(draw(2, 16, 8), **given, img_ids=ids, txt_ids=ids[:5]).sample


def output_and_gradients(network):
    output = call(network)
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=torch.float64).view_as(output)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return output, torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)


@pytest.fixture
def counted(monkeypatch):
    """How often each op for sums and norms is called: without a sum, and with one."""
    calls = [0, 0]
    op = blocks.add_layernorm

    def call(*args, **kwargs):
        calls["residual" in kwargs] += 1
        return op(*args, **kwargs)

    monkeypatch.setattr(blocks, "add_layernorm", call)
    return calls


# of three blocks of SD3 the last norms no text with its own gate; SD3.5's second attention has one more norm. FLUX.1's
# two double blocks have four norms each, and its two single blocks one.
@pytest.mark.parametrize("adds_in_kernels", [False, True])
@pytest.mark.parametrize(
    ("kind", "norms", "sums"), [("sd3", 5, 5), ("sd3.5", 6, 5), ("sd3.5 lora", 6, 5), ("flux", 6, 4)]
)
def test_the_same_output_and_gradients(kind, norms, sums, adds_in_kernels, counted, monkeypatch):
    network = make(kind.removesuffix(" lora"))
    if kind.endswith("lora"):
        add_adapter(network)
        network.double()
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: adds_in_kernels)
    expected, expected_gradients = output_and_gradients(network)
    names = [type(module) for module in network.modules()]
    processors = [type(module.processor) for module in network.modules() if hasattr(module, "processor")]
    output, gradients = output_and_gradients(fuse_unet(network, LAYERS))
    joint = sum(isinstance(getattr(module, "processor", None), JointProcessor) for module in network.modules())
    assert joint == (0 if kind == "flux" else len(processors))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-7, atol=1e-10)
    assert counted == [norms, sums]
    assert [type(module) for module in unfuse_unet(network).modules()] == names
    assert [type(module.processor) for module in network.modules() if hasattr(module, "processor")] == processors
    assert torch.equal(call(network), expected)


@pytest.mark.parametrize("kind", ["sd3.5", "flux"])
def test_recomputed_activations_and_frozen_weights(kind):
    network = fuse_unet(make(kind))
    network.requires_grad_(False)
    trained = [p for name, p in network.named_parameters() if "to_q" in name or "to_out" in name]
    for parameter in trained:
        parameter.requires_grad_()
    output, gradients = output_and_gradients(network)
    network.enable_gradient_checkpointing()
    again, recomputed = output_and_gradients(network)
    assert torch.equal(again, output)
    assert all(map(torch.equal, recomputed, gradients))


@pytest.mark.parametrize("kind", ["sd3.5", "flux"])
def test_a_hook_of_a_norm_runs(kind, counted):
    network = make(kind)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    runs = []
    for norm in norms:
        norm.register_forward_hook(lambda *_: runs.append(1))
    call(fuse_unet(network))
    assert len(runs) == len(norms)
    assert counted == [0, 0]


@pytest.mark.parametrize("kind", ["sd3.5", "flux"])
def test_half_precision_is_as_exact_as_diffusers(kind):
    network = make(kind)
    exact = call(network)
    plain = call(network.to(torch.bfloat16)).double()
    fused = call(fuse_unet(network)).double()
    assert fused.isfinite().all()
    assert F.mse_loss(fused, exact) <= 4 * F.mse_loss(plain, exact)
