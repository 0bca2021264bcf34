from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from example_unets import KINDS, add_adapter, inputs_of, make_unet, output_and_gradients, predict, trained_parameters
from op_checks import DEVICE, assert_as_exact_as_plain
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast.batch_sizes import MOST_ROWS
from ddpo_fast.ops import force_backend
from ddpo_fast.unet import (
    SDPAProcessor,
    convolutions,
    fuse_unet,
    linear_layers,
    residual_blocks,
    transformer_blocks,
    unfuse_unet,
    up_blocks,
)
from ddpo_fast.unet import fused_layers as fusing

TINY = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_output_and_gradients(kind, lora):
    unet = make_unet(kind, lora, torch.float64)
    plain, plain_gradients = output_and_gradients(unet)
    fused, fused_gradients = output_and_gradients(fuse_unet(unet))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fused_gradients, plain_gradients, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_same_in_channels_last_without_a_contiguous_image(kind, lora):
    """1x1 convolutions are linear layers of the pixels there, and every convolution gets channels_last images."""
    unet = make_unet(kind, lora, torch.float64)
    expected = output_and_gradients(unet)
    fuse_unet(unet).to(memory_format=torch.channels_last)
    layouts = []
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride()[1]))
    fused = output_and_gradients(unet, sample=inputs_of(unet)["sample"].to(memory_format=torch.channels_last))
    torch.testing.assert_close(fused, expected, rtol=1e-7, atol=1e-10)
    assert set(layouts) == {1}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_where_kernels_add_what_a_cpu_adds_apart(kind, lora, monkeypatch):
    """As on a GPU: biases in GEGLU and in the sums before layer norms, gradients of skip connections, q, k and v."""
    unet = make_unet(kind, lora, torch.float64)
    expected = output_and_gradients(unet)
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)
    fuse_unet(unet).to(memory_format=torch.channels_last)
    calls = Counter()
    counted = [(linear_layers, "qkv_linear"), (linear_layers, "lora_qkv_linear"), (residual_blocks, "ImageSum")]
    counted += [(up_blocks, "ImageConcatenation"), (transformer_blocks, "two_products"), (up_blocks, "BiasedImages")]
    for module, name in (*counted, (fusing, "add_product_"), (transformer_blocks, "add_product_")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, Counted(op, name, calls))
    fused = output_and_gradients(unet, sample=inputs_of(unet)["sample"].to(memory_format=torch.channels_last))
    torch.testing.assert_close(fused, expected, rtol=1e-7, atol=1e-10)
    count = {
        kind: sum(isinstance(m, kind) for m in unet.modules()) for kind in (BasicTransformerBlock, Transformer2DModel)
    }
    blocks, transformers = count.values()
    # the norms after both attentions add what is left of their adapters
    own = {"lora_qkv_linear": blocks, "two_products": 2 * blocks} if lora else {"qkv_linear": blocks}
    # both products at the ends of transformers add to a residual, each transformer computes the sum before it, and each
    # residual block of the up path the concatenation
    joined = {"ImageConcatenation": sum(len(block.resnets) for block in unet.up_blocks)}
    # and, after an upsampler, the bias of its convolution
    joined["BiasedImages"] = len(unet.up_blocks) - 1
    assert calls == {**own, **joined, "add_product_": blocks + transformers, "ImageSum": transformers}
    with torch.no_grad():
        sampled = predict(unet)
    assert torch.equal(predict(unet), sampled)


def test_freeu_changes_what_is_concatenated(monkeypatch):
    unet = make_unet("sd15", dtype=torch.float64)
    plain = predict(unet)
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)
    fuse_unet(unet).enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    changed = predict(unet)
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(changed, predict(unfuse_unet(unet)), rtol=1e-9, atol=1e-10)


class Counted:
    """A function or class whose calls are counted by name; `isinstance` takes it for what it stands for."""

    def __init__(self, called, name, calls):
        self.called, self.name, self.calls = called, name, calls

    def __call__(self, *args):
        self.calls[self.name] += 1
        return self.called(*args)

    def __instancecheck__(self, instance):
        return isinstance(instance, self.called)


class Wrapped(torch.nn.Module):
    """A layer of another kind, without the attributes of a linear layer, as one with quantized weights is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_adapters_on_layers_of_another_kind_are_called_one_by_one(monkeypatch):
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)
    unet = make_unet("sd15", lora=True, dtype=torch.float64)
    expected = output_and_gradients(unet)
    fuse_unet(unet)
    for module in list(unet.modules()):
        if isinstance(module, linear_layers.FusedLoraLinear):
            module.base_layer = Wrapped(module.base_layer)
    torch.testing.assert_close(output_and_gradients(unet), expected, rtol=1e-7, atol=1e-10)


HOOKED = [
    "up_blocks.1",
    "up_blocks.1.resnets.0",
    "upsamplers.0",
    "upsamplers.0.conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "norm",
    "proj_in",
    "proj_out",
    "net.2",
    "resnets.0",
    "transformer_blocks.0",
]


@pytest.mark.parametrize("adds_in_kernels", [False, True])
@pytest.mark.parametrize("layer", HOOKED)
def test_a_hook_of_a_layer_runs_although_others_could_add_its_bias_or_its_sum(layer, adds_in_kernels, monkeypatch):
    unet = make_unet("sd15", dtype=torch.float64, **TINY)
    modules = [module for name, module in unet.named_modules() if f".{name}".endswith(f".{layer}")]
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: 1.1 * output)
    expected = output_and_gradients(unet)
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: adds_in_kernels)
    fuse_unet(unet).to(memory_format=torch.channels_last)
    fused = output_and_gradients(unet, sample=inputs_of(unet)["sample"].to(memory_format=torch.channels_last))
    torch.testing.assert_close(fused, expected, rtol=1e-7, atol=1e-10)


def test_a_block_in_chunks_gives_the_layer_before_it_the_gradient_of_its_bias(monkeypatch):
    unet = make_unet("sd15", dtype=torch.float64, **TINY)
    expected = output_and_gradients(unet)
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: True)
    for module in fuse_unet(unet).modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, 0)
    torch.testing.assert_close(output_and_gradients(unet), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_of_transformers(dtype):
    exact, x = fusing.RMSNorm(24, eps=1e-6).double(), torch.randn(5, 24, dtype=torch.float64)
    exact.weight.data.uniform_(0.5, 2)
    plain = copy.deepcopy(exact).to(dtype)
    fused = fuse_unet(torch.nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(fused) is fusing.FusedRMSNorm
    exact.weight.data.copy_(plain.weight)
    x = x.to(dtype)
    # diffusers computes the variance in fp32 for fp64 too
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact.weight
    assert_as_exact_as_plain(fused(x), plain(x), expected)
    assert torch.equal(fused(x.double()), plain(x.double()))


def everything(unet, **others):
    output, gradients = output_and_gradients(unet, **others)
    return output, torch.cat([gradient.flatten() for gradient in gradients.values()])


def layers_of(unet: torch.nn.Module) -> int:
    """How many layers with weights the network has."""
    return sum(1 for module in unet.modules() if any(True for _ in module.parameters(recurse=False)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_the_plain_unet_in_fp32(kind, lora):
    unet = make_unet(kind, lora)
    exact = everything(copy.deepcopy(unet).double())
    assert_as_exact_as_plain(everything(fuse_unet(copy.deepcopy(unet))), everything(unet), exact, layers_of(unet))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_in_fp32_as_it_trains_on_a_device(kind, lora):
    unet = make_unet(kind, lora)
    layers, plain, exact = layers_of(unet), everything(unet), everything(copy.deepcopy(unet).double())
    fuse_unet(unet.to(memory_format=torch.channels_last), fusing.faster_layers(DEVICE))
    sample = inputs_of(unet)["sample"].to(memory_format=torch.channels_last)
    assert_as_exact_as_plain(everything(unet, sample=sample), plain, exact, layers)


def test_norms_are_fused_on_a_cpu_where_their_cpp_runs():
    by_kernels = {torch.nn.GroupNorm, GEGLU, ResnetBlock2D, Transformer2DModel}
    fast = fusing.faster_layers("cpu")
    assert by_kernels < fast
    with force_backend("reference"):
        assert fusing.faster_layers("cpu") == fast - by_kernels


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_half_precision(lora):
    """Full training autocasts over fp32 weights; an adapter is fp32 on a frozen UNet in half precision."""
    unet = make_unet("bundled", lora)
    exact, exact_gradients = output_and_gradients(copy.deepcopy(unet).double())
    fused = fuse_unet(copy.deepcopy(unet))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        runs = [output_and_gradients(model) for model in (fused, unet)]
    if lora:
        for parameter in fused.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
        runs[0] = output_and_gradients(fused, **inputs_of(fused, torch.bfloat16))
    errors = [(output.double() - exact).norm() / exact.norm() for output, _ in runs]
    assert errors[0] <= 2 * errors[1]
    for _, gradients in runs:
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    errors = [sum((g[name] - e).square().sum() for name, e in exact_gradients.items()) for _, g in runs]
    assert errors[0] <= 4 * errors[1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sampling_and_training_compute_the_same_bits(lora):
    unet = fuse_unet(make_unet("sd15", lora))
    with torch.no_grad():
        sampled = predict(unet)
    assert torch.equal(predict(unet), sampled)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_unfusing_restores_the_unet(kind, lora):
    unet = make_unet(kind, lora)
    classes = [type(module) for module in unet.modules()]
    names, bits = list(unet.state_dict()), predict(unet)
    fuse_unet(unet)
    fused_classes = [type(module) for module in unet.modules()]
    assert list(unet.state_dict()) == names
    assert isinstance(unet.mid_block.resnets[0], fusing.ResnetBlock2D)
    assert fuse_unet(unet) is unet
    assert [type(module) for module in unet.modules()] == fused_classes
    assert unfuse_unet(unet) is unet
    assert [type(module) for module in unet.modules()] == classes
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(predict(unet), bits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_that_can_be_fused_is_fused(kind):
    unet = fuse_unet(make_unet(kind, lora=True))
    left = {type(module) for module in unet.modules()} & set(fusing.FUSED)
    assert not left
    assert {type(processor) for processor in unet.attn_processors.values()} == {SDPAProcessor}
    assert type(unet) is UNet2DConditionModel


class DivisionsByOne(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            divisor = args[1]
            self.count += isinstance(divisor, (int, float)) and divisor == 1
            self.count += isinstance(divisor, torch.Tensor) and divisor.numel() == 1 and divisor.item() == 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_divide_by_an_output_scale_of_one(kind):
    unet = make_unet(kind)
    counts = []
    for model in (unet, fuse_unet(copy.deepcopy(unet))):
        with DivisionsByOne() as divisions:
            output_and_gradients(model)
        counts.append(divisions.count)
    blocks = sum(isinstance(m, (fusing.ResnetBlock2D, fusing.Attention)) for m in unet.modules())
    assert counts[0] >= blocks
    assert counts[1] == 0


def saved_bytes(unet: UNet2DConditionModel) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = predict(unet)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_fewer_activations_are_kept():
    full, adapted = make_unet("sd15"), make_unet("sd15", lora=True)
    before = saved_bytes(full), saved_bytes(adapted)
    after = saved_bytes(fuse_unet(full)), saved_bytes(fuse_unet(adapted))
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.7 * before[1]


def test_requires_grad_may_change_afterwards():
    unet = fuse_unet(make_unet("bundled"))
    everything = saved_bytes(unet)
    unet.requires_grad_(False)
    unet.conv_in.bias.requires_grad_()
    assert saved_bytes(unet) < 0.9 * everything
    (name,) = trained_parameters(unet)
    _, gradients = output_and_gradients(unet)
    unfuse_unet(unet).requires_grad_()
    torch.testing.assert_close(gradients[name], output_and_gradients(unet)[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_fused_unet_is_saved_as_a_plain_one(tmp_path, lora):
    unet = make_unet("sd15", lora)
    unet.save_pretrained(tmp_path / "plain")
    fuse_unet(unet).save_pretrained(tmp_path / "fused")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    if not lora:
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / "fused").to(DEVICE)
        torch.testing.assert_close(loaded.state_dict(), unet.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_are_independent(copied):
    unet = fuse_unet(make_unet("bundled", lora=True))
    twin = copied(unet)
    assert [type(module) for module in twin.modules()] == [type(module) for module in unet.modules()]
    assert torch.equal(predict(twin), predict(unet))


@pytest.mark.parametrize(
    "settings",
    [
        {"act_fn": "gelu"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"dropout": 0.5},
        {"mid_block_scale_factor": 1.5},
        {"resnet_skip_time_act": True},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {"down_block_types": ("AttnDownBlock2D",) * 4, "up_block_types": ("AttnUpBlock2D",) * 4},
        {"only_cross_attention": True, "class_embed_type": "timestep"},
        {"norm_eps": 1e-2, "conv_out_kernel": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unets_with_other_options_compute_the_same(settings):
    unet = make_unet("sd15", dtype=torch.float64, **settings)
    labels = torch.tensor([1.0, 5.0], dtype=torch.float64, device=DEVICE)
    results = []
    for model in (unet, fuse_unet(copy.deepcopy(unet))):
        torch.manual_seed(2)
        results.append(output_and_gradients(model, class_labels=labels if unet.config.class_embed_type else None))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


def test_attention_masks():
    unet = make_unet("sd15", lora=True, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7], device=DEVICE)
    plain = predict(unet, encoder_attention_mask=mask)
    assert not torch.allclose(plain, predict(unet))
    torch.testing.assert_close(predict(fuse_unet(unet), encoder_attention_mask=mask), plain, rtol=1e-9, atol=1e-10)


def scaled(unet):
    for module in unet.modules():
        if isinstance(module, fusing.lora.Linear):
            module.scale_layer(0.3)


def hooked(unet):
    """A forward hook on lora_B that doubles its output; it runs only if the module itself is called."""
    for module in unet.modules():
        if isinstance(module, fusing.lora.Linear):
            module.lora_B["default"].register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = {
    "off": lambda unet: unet.disable_adapters(),
    "merged": lambda unet: unet.fuse_lora(),
    "two": lambda unet: (add_adapter(unet, "other"), unet.set_adapters(["default", "other"], [0.5, 2.0])),
    "other of two": lambda unet: (add_adapter(unet, "other"), unet.set_adapter("other")),
    "dora": lambda unet: (add_adapter(unet, "dora", use_dora=True), unet.set_adapter("dora")),
    "dropout": lambda unet: (add_adapter(unet, "dropout", lora_dropout=0.5), unet.set_adapter("dropout")),
    "bias": lambda unet: (add_adapter(unet, "bias", lora_bias=True), unet.set_adapter("bias")),
    "scaled": scaled,
    "hooked": hooked,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_adapters_in_every_state(change):
    """Changed on a fused UNet and before fusing: an adapter in an unusual state is computed by peft."""
    plain = make_unet("sd15", lora=True, dtype=torch.float64, **TINY)
    before = predict(plain)
    fused = fuse_unet(copy.deepcopy(plain))
    results = []
    for unet in (plain, fused):
        torch.manual_seed(3)
        change(unet)
        unet.double().train()
        torch.manual_seed(4)
        results.append(predict(unet))
    assert torch.allclose(results[0], before) == (change is CHANGES["merged"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)
    torch.manual_seed(4)
    torch.testing.assert_close(predict(fuse_unet(plain)), results[0], rtol=1e-9, atol=1e-10)


def test_adapters_pass_gradients_to_the_weight_below():
    plain = make_unet("sd15", lora=True, dtype=torch.float64).requires_grad_()
    expected = output_and_gradients(plain)[1]
    torch.testing.assert_close(output_and_gradients(fuse_unet(plain))[1], expected, rtol=1e-7, atol=1e-10)


def test_a_module_with_its_own_forward_is_not_fused():
    """accelerate's offloading sets `forward` on the instance, which hides the forward of a new class."""
    unet = make_unet("sd15", dtype=torch.float64)
    expected = predict(unet)
    calls = []
    for module in (unet.mid_block.resnets[0].norm1, unet.conv_act, unet.conv_in):

        def forward(x, own=module.forward):
            calls.append(own)
            return own(x)

        module.forward = forward
    torch.testing.assert_close(predict(fuse_unet(unet)), expected, rtol=1e-9, atol=1e-10)
    assert len(calls) == 3
    assert type(unet.mid_block.resnets[0]) is fusing.ResnetBlock2D
    assert type(unet.mid_block.resnets[1]) is fusing.FusedResnetBlock2D


def test_hooks_still_run():
    unet = make_unet("bundled")
    seen = []
    unet.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: seen.append("norm"))
    unet.conv_out.register_forward_hook(lambda *_: seen.append("conv"))
    predict(fuse_unet(unet))
    assert seen == ["norm", "conv"]


@pytest.mark.parametrize("adds_in_kernels", [False, True])
def test_gradient_checkpointing(adds_in_kernels, monkeypatch):
    unet = make_unet("bundled", lora=not adds_in_kernels, dtype=torch.float64)
    expected = output_and_gradients(fuse_unet(unet))[1]
    monkeypatch.setattr(convolutions, "adds_in_kernels", lambda x: adds_in_kernels)
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(output_and_gradients(unet)[1], expected)


def upsampling_layers():
    plain = Upsample2D(4, use_conv=True)
    fused = copy.deepcopy(plain)
    fused.__class__ = up_blocks.FusedUpsample2D
    return plain, fused


@pytest.mark.parametrize("rows", [2, MOST_ROWS])
def test_an_upsampler_keeps_channels_last_for_any_number_of_rows(rows):
    """diffusers makes 64 rows or more contiguous, and so the inputs of all later layers."""
    plain, fused = upsampling_layers()
    assert fusing._fits_upsample(plain)
    layouts = []
    fused.conv.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride()[1]))
    x = torch.randn(rows, 4, 3, 2).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), plain(x))
    assert layouts == [1]


def test_an_upsampler_with_another_size_or_too_many_elements_is_diffusers(monkeypatch):
    plain, fused = upsampling_layers()
    x = torch.randn(2, 4, 3, 2)
    torch.testing.assert_close(fused(x, (5, 4)), plain(x, (5, 4)))
    called = []
    monkeypatch.setattr(Upsample2D, "forward", lambda *_, **__: called.append(1))
    fused(x)
    assert not called
    monkeypatch.setattr(up_blocks, "MOST_UPSAMPLED", 4 * x.numel() - 1)
    fused(x)
    assert called


def test_channels_last_is_kept_through_the_unet():
    unet = fuse_unet(make_unet("sd15", lora=True)).to(memory_format=torch.channels_last)
    layouts = []
    for module in unet.modules():
        if isinstance(module, (fusing.GroupNormSiLU, fusing.FrozenConv2d)):
            module.register_forward_hook(
                lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    sample = inputs_of(unet)["sample"].contiguous(memory_format=torch.channels_last)
    predict(unet, sample=sample)
    assert len(layouts) > 30
    assert all(layouts)
