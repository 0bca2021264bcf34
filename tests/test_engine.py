"""Every engine takes the same optimizer steps, wherever it keeps weights and states, and loses no small one."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from compare_runs import changed_share, metrics_of, relative_distance, same_bits, trained_weights
from diffusers import UNet2DConditionModel
from rounding import RUNS_APART_IN_FP64, in_fp64

from ddpo_fast.engine import moments
from ddpo_fast.engine.from_main import copy_from_main
from ddpo_fast.engine.loss_scale import LossScale
from ddpo_fast.engine.offload import _Staging
from ddpo_fast.engine.optimizers import buckets, flat, rounded_stochastically
from ddpo_fast.prompts import load_prompts


def run(make_trainer, tmp_path, name: str = "run", change=lambda trainer: None, **settings):
    """(weights before, weights after, trainer) of a run of two epochs with two updates each."""
    trainer = make_trainer(output_dir=str(tmp_path / name), prompts=load_prompts("animals"), **settings)
    change(trainer)
    before = trained_weights(trainer)
    trainer.train()
    return before, trained_weights(trainer), trainer


def first_checkpoint(trainer) -> str:
    return str(trainer.progress.checkpoints / "checkpoint_1")


# small updates


@pytest.mark.parametrize("settings", [{}, {"offload": "optimizer"}, {"train_gradient_dtype": "half"}], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_at_a_small_rate_nearly_all_weights_move_in_four_updates(make_trainer, tmp_path, precision, settings):
    """Master weights are fp32 in every compute precision. In TRL 7 % of bf16 weights move."""
    settings = settings | {"mixed_precision": precision, "sample_num_steps": 2}
    before, after, trainer = run(make_trainer, tmp_path, train_learning_rate=1e-5, **settings)
    assert trainer.engine.updates == 4
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert changed_share(before, after) > 0.99


def test_stochastic_rounding_moves_weights_as_far_on_average(make_trainer, tmp_path):
    """Without master weights a few bf16 weights move, by more than fp32 ones would, and on average by as much."""
    settings = {"mixed_precision": "bf16", "train_learning_rate": 1e-5, "num_epochs": 1}
    before, exact, _ = run(make_trainer, tmp_path, "exact", **settings)
    start, rounded, trainer = run(make_trainer, tmp_path, "rounded", stochastic_rounding=True, **settings)
    assert {weight.dtype for weight in rounded.values()} == {torch.bfloat16}
    assert 0.05 < changed_share(start, rounded) < 0.9
    names = list(before)
    step = torch.cat([(exact[n] - before[n]).flatten() for n in names])
    taken = torch.cat([(rounded[n].float() - start[n].float()).flatten() for n in names])
    # the length of the rounded update along the exact one, as a share of the exact one's length
    share = (taken @ step / step.square().sum()).item()
    assert 0.9 < share < 1.1
    assert len(trainer.engine.optimizer.state) == len(names)


def test_stochastic_rounding_is_right_on_average():
    exact = torch.full((200_000,), 1.0 + 2.0**-9)  # a quarter of the way from 1 to the next bf16 number
    rounded = rounded_stochastically(exact, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    # the standard error of this share of 200,000 numbers is 1e-3
    assert abs((rounded > 1).float().mean().item() - 0.25) < 5e-3
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -1.0])
    torch.testing.assert_close(rounded_stochastically(odd, torch.Generator()).float(), odd, equal_nan=True)


# fp16


def test_an_overflow_halves_the_loss_scale_and_skips_the_update(make_trainer, tmp_path):
    for settings in ({}, {"offload": "optimizer"}, {"train_gradient_dtype": "half"}):
        trainer = make_trainer(
            mixed_precision="fp16", output_dir=str(tmp_path / str(settings)), ema_decay=0.5, **settings
        )
        before = trained_weights(trainer)
        average = [a.clone() for a in trainer.engine.ema.averages]
        for gradient, skipped in ((float("inf"), 1.0), (1.0, 0.0)):
            trainer.engine.weights.fill_gradients(torch.float32)
            for each in trainer.engine.weights.gradients:
                each.fill_(gradient)
            logged = trainer.engine.step()
            assert logged["skipped_step"].item() == skipped
            assert logged["loss_scale"].item() == 2.0 ** (16 if skipped else 15)
            assert changed_share(before, trained_weights(trainer)) == (0.0 if skipped else 1.0)
            same = all(torch.equal(a, b) for a, b in zip(average, trainer.engine.ema.averages, strict=True))
            assert same == bool(skipped)
        assert moments.step_of(trainer.engine.optimizer) == 1


def test_skipped_updates_are_in_the_log(make_trainer):
    trainer = make_trainer(mixed_precision="fp16", sample_num_steps=2)
    state = trainer.engine.state_dict()
    trainer.engine.load_state_dict({**state, "loss_scale": {**state["loss_scale"], "scale": 2.0**40}})
    trainer.train()
    updates = metrics_of(trainer, "update")
    assert [update["skipped_step"] for update in updates] == [1.0] * 4
    assert updates[1]["loss_scale"] == 2.0**39


def test_the_scale_grows_after_many_good_updates():
    scale = LossScale(torch.device("cpu"), enabled=True)
    good = torch.tensor(False)
    for _ in range(1999):
        scale.update(good)
    assert scale.value == 2.0**16
    scale.update(good)
    assert scale.value == 2.0**17
    other = LossScale(torch.device("cpu"), enabled=True)
    other.load_state_dict(scale.state_dict())
    assert other.value == 2.0**17


# equal steps


@pytest.mark.parametrize(
    ("settings", "plain", "limit"),
    [
        # the same computation in other memory
        ({"offload": "optimizer"}, {}, 1e-6),
        ({"offload": "optimizer", "mixed_precision": "bf16"}, {"mixed_precision": "bf16"}, 1e-6),
        ({"optimizer_in_backward": True}, {"train_max_grad_norm": float("inf")}, 1e-6),
        # sums of bf16 gradients have 8 significant bits, and Adam's first steps are their signs
        ({"mixed_precision": "bf16", "train_gradient_dtype": "half"}, {"mixed_precision": "bf16"}, 0.2),
        # 8-bit steps by bitsandbytes and by csrc/, which rounds the largest moments of a block less
        (
            {"train_use_8bit_adam": True, "offload": "optimizer"},
            {"train_use_8bit_adam": True},
            0.02,
        ),
        ({"train_use_8bit_adam": True}, {}, 0.15),
    ],
    ids=str,
)
def test_weights_end_where_those_of_the_plain_engine_do(make_trainer, tmp_path, settings, plain, limit):
    common = {"train_micro_batch_size": 20, "train_max_grad_norm": plain.get("train_max_grad_norm", 1.0)}
    start, reference, _ = run(make_trainer, tmp_path, "plain", **common | plain)
    _, after, _ = run(make_trainer, tmp_path, "other", **common | settings)
    assert relative_distance(after, reference, start) < limit


def test_only_large_tensors_have_eight_bit_states(make_trainer, tmp_path):
    for name, settings, kind in (("host", {"offload": "optimizer"}, "HostAdamW8bit"), ("device", {}, "AdamW8bit")):
        _, _, trainer = run(make_trainer, tmp_path, name, train_use_8bit_adam=True, num_epochs=1, **settings)
        optimizer = trainer.engine.optimizer
        assert type(optimizer).__name__ == kind
        for master in trainer.engine.weights.masters:
            expected = torch.uint8 if master.numel() >= 4096 else torch.float32
            assert optimizer.state[master]["state1"].dtype == expected


def test_a_lora_has_eight_bit_states_if_the_minimum_size_allows(make_trainer, tmp_path):
    settings = {"use_lora": True, "train_use_8bit_adam": True, "num_epochs": 1}
    for size, dtype in ((4096, torch.float32), (1, torch.uint8)):
        _, _, trainer = run(make_trainer, tmp_path, str(size), train_min_8bit_size=size, **settings)
        assert {state["state1"].dtype for state in trainer.engine.optimizer.state.values()} == {dtype}


def test_paged_states_train(make_trainer, tmp_path):
    before, after, trainer = run(make_trainer, tmp_path, train_use_8bit_adam=True, train_paged_adam=True)
    assert type(trainer.engine.optimizer).__name__ == "PagedAdamW8bit"
    assert changed_share(before, after) > 0.99


def test_offloaded_data_is_copied_once_an_update(make_trainer, tmp_path, monkeypatch):
    """Each gradient is copied to the host and each weight to the device once, for any size of micro-batches."""
    moved_bytes = []
    move = _Staging.start_copy
    monkeypatch.setattr(
        _Staging, "start_copy", lambda self, to, of: moved_bytes.append(sum(t.nbytes for t in of)) or move(self, to, of)
    )
    _, _, trainer = run(
        make_trainer,
        tmp_path,
        offload="optimizer",
        mixed_precision="bf16",
        train_gradient_dtype="half",
        train_micro_batch_size=2,
    )
    weights = sum(master.numel() for master in trainer.engine.weights.masters)
    assert sum(moved_bytes) == 4 * weights * (2 + 2)


def test_buckets_have_each_tensor_once(monkeypatch):
    monkeypatch.setattr("ddpo_fast.engine.optimizers.BUCKET", 10)
    assert list(buckets([4, 4, 4, 30, 1, 9, 1])) == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(buckets([])) == []


@pytest.mark.parametrize("settings", [{"offload": "optimizer"}, {"train_gradient_dtype": "half"}], ids=str)
def test_buckets_do_not_change_the_step(make_trainer, tmp_path, monkeypatch, settings):
    ends = []
    for size in (25_000_000, 3000):
        monkeypatch.setattr("ddpo_fast.engine.optimizers.BUCKET", size)
        ends.append(run(make_trainer, tmp_path, str(size), mixed_precision="bf16", num_epochs=1, **settings)[1])
    assert same_bits(*ends)


def test_flat_is_in_the_order_of_memory():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(flat(weight), weight.permute(0, 2, 3, 1).flatten())
    assert flat(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(flat(weight.contiguous(), like=weight), flat(weight))


# resuming and averaging


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16", "ema_decay": 0.9},
        # few denoising steps, as CPUs are slow in fp16
        {"mixed_precision": "fp16", "offload": "optimizer", "ema_decay": 0.9, "sample_num_steps": 2},
        {"train_use_8bit_adam": True},
        {"train_use_8bit_adam": True, "offload": "optimizer", "train_gradient_dtype": "half"},
        {"mixed_precision": "bf16", "stochastic_rounding": True, "train_use_8bit_adam": True},
        {"optimizer_in_backward": True, "train_max_grad_norm": float("inf"), "train_micro_batch_size": 20},
        {"use_lora": True, "train_use_8bit_adam": True, "train_min_8bit_size": 1},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(make_trainer, tmp_path, settings):
    start, whole, uncut = run(make_trainer, tmp_path, "whole", **settings)
    _, after, resumed = run(make_trainer, tmp_path, "again", resume_from=first_checkpoint(uncut), **settings)
    if torch.cuda.is_available():
        # atomic additions on a GPU sum in another order in each run
        assert relative_distance(after, whole, start) < 1e-2
        return
    assert same_bits(whole, after)
    for moment in moments.MOMENTS:
        for one, two in zip(uncut.engine.weights.masters, resumed.engine.weights.masters, strict=True):
            kept = moments.read(uncut.engine.optimizer, one, moment)
            assert torch.equal(kept, moments.read(resumed.engine.optimizer, two, moment))
    if "ema_decay" in settings:
        averages = zip(uncut.engine.ema.averages, resumed.engine.ema.averages, strict=True)
        assert all(torch.equal(one, two) for one, two in averages)


@pytest.mark.parametrize(
    ("was", "then", "limit"),
    [
        ({"offload": "optimizer"}, {}, 1e-6),
        ({}, {"offload": "optimizer", "train_use_8bit_adam": True}, 0.1),
        ({"train_use_8bit_adam": True}, {"offload": "optimizer", "train_use_8bit_adam": True}, 0.1),
        ({"train_use_8bit_adam": True, "fuse_unet": False}, {}, 0.1),
    ],
    ids=str,
)
def test_a_checkpoint_is_resumed_with_another_setting(make_trainer, tmp_path, was, then, limit):
    start, whole, uncut = run(make_trainer, tmp_path, "whole", **was)
    _, after, trainer = run(make_trainer, tmp_path, "again", resume_from=first_checkpoint(uncut), **then)
    assert trainer.engine.updates == 4
    assert relative_distance(after, whole, start) < limit


def test_the_average_follows_the_weights_and_is_saved(make_trainer, tmp_path):
    """After four updates the saved average is the one that its definition gives."""
    seen = []
    trainer = make_trainer(ema_decay=0.5, ema_device="cpu", mixed_precision="bf16")
    seen.append(trained_weights(trainer))
    step = trainer.engine.step
    trainer.engine.step = lambda: [step(), seen.append([m.detach().clone() for m in trainer.engine.weights.masters])][0]
    trainer.train()
    expected = list(seen[0].values())
    for weights in seen[1:]:
        expected = [0.5 * e + 0.5 * w for e, w in zip(expected, weights, strict=True)]
    trainer.save_model()
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "final_ema" / "unet")
    for average, (name, parameter) in zip(expected, saved.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), average, rtol=0, atol=1e-6, msg=name)
    last = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "final" / "unet")
    assert all(torch.equal(p, w) for p, w in zip(last.parameters(), trained_weights(trainer).values(), strict=True))


def test_gradients_of_recorded_graphs_keep_their_memory(make_trainer):
    """A recorded graph writes to the addresses that it was recorded with, so a step must not replace them."""
    trainer = make_trainer(train_use_8bit_adam=True)
    engine = trainer.engine
    engine.keeps_gradients = True
    engine.weights.fill_gradients(torch.float32)
    places = [gradient.data_ptr() for gradient in engine.weights.gradients]
    engine.step()
    assert [gradient.data_ptr() for gradient in engine.weights.gradients] == places
    assert not any(gradient.any() for gradient in engine.weights.gradients)


# memory


ENGINE_MISSING = "GET was unable to find an engine to execute this computation"


def test_running_out_of_memory_halves_the_micro_batch_and_goes_on(make_trainer, tmp_path, caplog):
    """A backward pass of more than 4 rows raises in its middle; the weights end as if none had raised."""
    start, reference, _ = run(make_trainer, tmp_path, "plain", in_fp64, train_micro_batch_size=2)
    prompts = load_prompts("animals")
    trainer = in_fp64(make_trainer(prompts=prompts, output_dir=str(tmp_path / "short"), train_micro_batch_size=20))

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if len(grad) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if len(grad) > 4:
                raise RuntimeError(ENGINE_MISSING)
            return grad

    middle = trainer.sd_pipeline.unet.mid_block
    middle.register_forward_hook(lambda _, args, output: Full.apply(output) if output.requires_grad else output)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "micro-batches of 10 instead of 20" in caplog.text
    assert trainer.sizes.micro_batch_size == 2
    assert relative_distance(trained_weights(trainer), reference, start) < RUNS_APART_IN_FP64


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(ENGINE_MISSING)])
def test_without_a_smaller_micro_batch_the_error_gives_advice(make_trainer, monkeypatch, error):
    trainer = make_trainer(train_micro_batch_size=1)

    def raise_in_training(unet, _inputs):
        if unet.training:
            raise error

    trainer.sd_pipeline.unet.register_forward_pre_hook(raise_in_training)
    with pytest.raises(RuntimeError, match="micro-batch of 1: set a smaller train_micro_batch_size, gradient_check"):
        trainer.train()


def test_offloading_frozen_networks_changes_no_bit(make_trainer, tmp_path):
    _, plain, _ = run(make_trainer, tmp_path, "plain", num_epochs=1)
    _, after, _ = run(make_trainer, tmp_path, "offloaded", num_epochs=1, offload_frozen=True)
    assert same_bits(plain, after)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "blocks"},
        {"gradient_checkpointing": "selective"},
        {"vae_slicing": True},
        {"vae_tiling": True},
    ],
    ids=str,
)
def test_settings_that_save_memory_do_not_change_the_result(make_trainer, tmp_path, settings):
    start, plain, _ = run(make_trainer, tmp_path, "plain", in_fp64, num_epochs=1)
    _, after, _ = run(make_trainer, tmp_path, "small", in_fp64, num_epochs=1, **settings)
    assert relative_distance(after, plain, start) < RUNS_APART_IN_FP64


def test_an_update_in_the_backward_pass_must_be_one_call(make_trainer):
    with pytest.raises(ValueError, match="optimizer_in_backward is True, but an update takes 7 UNet calls"):
        make_trainer(optimizer_in_backward=True, train_max_grad_norm=float("inf"), train_micro_batch_size=3)


def test_processes_use_the_smallest_of_their_sizes(make_trainer, monkeypatch):
    """Another process has 10 bytes of free memory, in which no second pair or batch fits."""
    trainer = make_trainer()
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, _op: value.clamp_(max=10))
    assert (trainer.sizes.micro_batch_size, trainer.sizes.merged_batches) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_main_process_gives_its_weights_in_buckets(monkeypatch, dtype):
    """To the bit, in any layout; the messages have up to 20 elements, or one larger tensor."""
    monkeypatch.setattr("ddpo_fast.engine.optimizers.BUCKET", 20)
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    shapes = [(3, 2), (), (2, 2, 1, 3), (5,), (3, 4, 2, 2), (7,)]
    given, taken = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    for tensors in (given, taken):
        tensors[2], tensors[4] = (t.to(memory_format=torch.channels_last) for t in (tensors[2], tensors[4]))
    expected, strides = [tensor.clone() for tensor in given], [tensor.stride() for tensor in taken]
    messages: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda message, src: messages.append(message.clone()))
    copy_from_main(given, accelerator)
    assert [message.numel() for message in messages] == [6 + 1 + 12, 5, 48, 7]
    monkeypatch.setattr(torch.distributed, "broadcast", lambda message, src: message.copy_(messages.pop(0)))
    copy_from_main(taken, accelerator)
    for tensors in (given, taken):
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert [tensor.stride() for tensor in taken] == strides
