from __future__ import annotations

import copy
import json
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from op_checks import DEVICE
from test_fused_layers import KINDS, make_unet, output_and_gradients, predict

from ddpo_fast.measured import Measured
from ddpo_fast.unet import attention, fuse_unet, unfuse_unet
from ddpo_fast.unet.attention import SDPAProcessor, XFormersProcessor, attention_problem, is_plain, set_attention


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
@pytest.mark.parametrize("name", ["sdpa", "xformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_output_and_gradients(can_run, kind, name, lora):
    unet = make_unet(kind, lora, torch.float64)
    expected = output_and_gradients(unet)
    assert set_attention(unet, name) == (name, "")
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


def test_auto_takes_pytorch_on_a_cpu_and_says_why(caplog, monkeypatch):
    unet = make_unet("bundled").cpu()
    caplog.clear()
    caplog.set_level("INFO", logger="ddpo_fast.unet.attention")
    monkeypatch.setattr(attention, "fastest_kernel", None)
    measured = Measured()
    reason = "not xformers: xformers' attention runs on CUDA only, not on cpu"
    assert set_attention(unet, "auto", measured=measured) == ("sdpa", reason)
    assert caplog.messages == [f"attention: sdpa ({reason})"]
    assert processors(unet) == {SDPAProcessor}
    assert measured == {}


class Kernels:
    """Stand-ins for kernels, each as long as its number says on a clock that nothing else moves."""

    def __init__(self, **times: float | Exception) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.attends = {name: partial(self._attend, name, time) for name, time in times.items()}

    def _attend(self, name, time, query, key, value):
        self.calls.append(name)
        if isinstance(time, Exception):
            raise time
        self.now += time * (1 + len(self.calls) % 3)  # some rounds are disturbed
        return query + key + value

    def seconds(self, run) -> float:
        begun = self.now
        run()
        return self.now - begun


REFUSALS = {
    "cudnn": RuntimeError("No available kernel. Aborting execution."),
    "xformers": NotImplementedError("No operator found for `backward` with inputs:\n  query: ..."),
}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"cudnn": 2.0, "flash": 1.0, "xformers": 3.5}, "flash"),
        ({"cudnn": 1.0, "flash": 3.5, "xformers": 2.0}, "cudnn"),
        ({**REFUSALS, "efficient": 9.0}, "efficient"),
        (REFUSALS, "sdpa"),
        ({"xformers": ImportError("no xformers"), "flash": 2.0}, "flash"),
    ],
)
def test_the_fastest_that_can_train_is_chosen(times, expected):
    kernels = Kernels(**times)
    random_state = torch.get_rng_state()
    with torch.no_grad():
        name, refused = attention.fastest_kernel(40, "cpu", torch.float32, kernels.attends, kernels.seconds)
    assert name == expected
    assert refused.keys() == {name for name, time in times.items() if isinstance(time, Exception)}
    assert all("\n" not in reason and "inputs" not in reason for reason in refused.values())
    for other, time in times.items():
        runs = 1 if isinstance(time, Exception) else attention.WARM_UPS + attention.ROUNDS
        assert kernels.calls.count(other) == runs
    assert torch.equal(torch.get_rng_state(), random_state), "the run draws the same whether it measures or not"


def test_a_kernel_without_a_backward_pass_is_refused():
    def forward_only(query, key, value):
        return query.detach()

    kernels = Kernels(flash=1.0)
    attends = {"forward only": forward_only, **kernels.attends}
    name, refused = attention.fastest_kernel(40, "cpu", torch.float32, attends, kernels.seconds)
    assert name == "flash"
    assert list(refused) == ["forward only"]


def test_pytorchs_kernels_are_asked_one_by_one():
    rows = torch.randn(1, 16, 2, 8)
    for name in attention.SDPA_KERNELS:
        attend = attention.candidate_kernels()[name]
        if name == "flash":
            expected = SDPAProcessor().attend(rows, rows, rows)
            torch.testing.assert_close(attend(rows, rows, rows), expected)
        torch.testing.assert_close(
            SDPAProcessor(name).attend(rows, rows, rows), SDPAProcessor().attend(rows, rows, rows)
        )


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU whose fastest attention is `answers`; what was measured."""
    answers, asked = {40: "cudnn", 80: "flash", 160: "xformers"}, []

    def fastest(head_dim, device, dtype, attends, seconds):
        asked.append((head_dim, device.type, dtype))
        return answers[head_dim], {"efficient": "no kernel"}

    monkeypatch.setattr(attention, "fastest_kernel", fastest)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention, "attention_problem", lambda *_: "")
    return answers, asked


def test_each_head_size_is_measured_once_in_the_life_of_a_run(fake_gpu):
    answers, asked = fake_gpu
    measured, gpu = Measured(), torch.device("cuda")
    first = attention.choose_kernels({160, 40}, gpu, torch.float16, measured)
    assert first == ({40: "cudnn", 160: "xformers"}, {"efficient": "head dim 160: no kernel"})
    answers.update({40: "flash", 160: "flash"})
    resumed = Measured(json.loads(json.dumps(measured)))
    assert attention.choose_kernels({40, 160}, gpu, torch.float16, resumed)[0] == first[0]
    assert len(asked) == 2
    assert set(resumed) == {f"attention of head dim {d} in float16 on a GPU" for d in (40, 160)}
    # another precision is another question
    assert attention.choose_kernels({40}, gpu, torch.bfloat16, resumed)[0] == {40: "flash"}


def test_the_main_process_decides(fake_gpu):
    chosen, _ = attention.choose_kernels(
        {40, 80}, torch.device("cuda"), torch.float16, Measured(), lambda mine: "flash"
    )
    assert chosen == {40: "flash", 80: "flash"}


def test_a_run_whose_xformers_is_gone_is_told_so(fake_gpu, monkeypatch):
    measured = Measured()
    attention.choose_kernels({160}, torch.device("cuda"), torch.float16, measured)
    monkeypatch.setattr(attention, "attention_problem", lambda *_: "xformers cannot be imported")
    with pytest.raises(ValueError, match="was xformers', which cannot run now: xformers cannot be imported"):
        attention.choose_kernels({160}, torch.device("cuda"), torch.float16, measured)


def test_each_module_gets_the_kernel_of_its_head_size(fake_gpu, can_run):
    fake_gpu[0].update({4: "flash", 8: "xformers", 16: "sdpa"})
    unet = make_unet("sd15", dtype=torch.float64)
    expected = output_and_gradients(unet)
    running, why = set_attention(unet, "auto", "cuda")
    assert why.startswith("not efficient: head dim ")
    found = set()
    for module in (m for m in unet.modules() if isinstance(m, Attention)):
        head_dim = module.inner_dim // module.heads
        kernel = "xformers" if type(module.processor) is XFormersProcessor else module.processor.kernel
        assert kernel == {4: "flash", 8: "xformers", 16: None}[head_dim]
        found.add(head_dim)
    assert len(found) > 1
    assert all(f"(head dim {head_dim})" in running for head_dim in found)
    torch.testing.assert_close(output_and_gradients(unet), expected, rtol=1e-7, atol=1e-10)
    # a copy and a UNet whose layers are fused keep it
    kernels = [getattr(p, "kernel", "xformers") for p in unet.attn_processors.values()]
    for other in (copy.deepcopy(unet), unfuse_unet(fuse_unet(unet))):
        kept = [getattr(p, "kernel", None) for p in other.attn_processors.values()]
        assert [kernel for kernel in kept if kernel] == [kernel for kernel in kernels if kernel]


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_a_gpu_is_measured():
    gpu = torch.device("cuda")
    kernels, reasons = attention.choose_kernels({40, 80, 160}, gpu, torch.float16)
    print(kernels, reasons)
    for head_dim, kernel in kernels.items():
        assert kernel in attention.candidate_kernels()
        rows = [torch.randn(2, 256, 4, head_dim, device=gpu, dtype=torch.float16) for _ in range(3)]
        exact = SDPAProcessor().attend(*(row.double() for row in rows))
        got = attention._processor(kernel).attend(*rows)
        # the output, of at most a few units, and the probabilities are rounded to 11 bits
        torch.testing.assert_close(got.double(), exact, atol=4 * 2**-11, rtol=2**-9)


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
