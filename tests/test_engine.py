"""Whatever keeps the weights and the optimizer's states: the same steps, and no small one is lost."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from rounding import RUNS_APART_IN_FP64, in_fp64

from ddpo_fast.engine import moments
from ddpo_fast.engine.loss_scale import LossScale
from ddpo_fast.engine.offload import _Staging
from ddpo_fast.engine.optimizers import buckets, flat, rounded_stochastically
from ddpo_fast.prompts import load_prompts


def trained(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The share of the weights that are not what they were."""
    changed = sum((before[name] != after[name]).sum() for name in before)
    return float(changed) / sum(weight.numel() for weight in before.values())


def apart(one: dict, two: dict, start: dict) -> float:
    difference = sum((one[name] - two[name]).square().sum() for name in start) ** 0.5
    return float(difference / sum((two[name] - start[name]).square().sum() for name in start) ** 0.5)


def run(make_trainer, tmp_path, name: str = "run", change=lambda trainer: None, **settings):
    """(weights before, after, the trainer) of two epochs of two updates."""
    trainer = make_trainer(output_dir=str(tmp_path / name), prompts=load_prompts("animals"), **settings)
    change(trainer)
    before = trained(trainer)
    trainer.train()
    return before, trained(trainer), trainer


# precision that trains


@pytest.mark.parametrize("settings", [{}, {"offload": "optimizer"}, {"train_gradient_dtype": "half"}], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_at_a_small_rate_nearly_all_weights_move_in_four_updates(make_trainer, tmp_path, precision, settings):
    """TRL: 7 % in bf16. Exact weights move whatever the compute precision."""
    settings = settings | {"mixed_precision": precision, "sample_num_steps": 2}
    before, after, trainer = run(make_trainer, tmp_path, train_learning_rate=1e-5, **settings)
    assert trainer.engine.updates == 4
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert moved(before, after) > 0.99


def test_stochastic_rounding_moves_weights_as_far_on_average(make_trainer, tmp_path):
    """bf16 weights alone: at a small rate a few of them move, by more than the exact ones, and the mean is the same."""
    settings = {"mixed_precision": "bf16", "train_learning_rate": 1e-5, "num_epochs": 1}
    before, exact, _ = run(make_trainer, tmp_path, "exact", **settings)
    start, rounded, trainer = run(make_trainer, tmp_path, "rounded", stochastic_rounding=True, **settings)
    assert {weight.dtype for weight in rounded.values()} == {torch.bfloat16}
    assert 0.05 < moved(start, rounded) < 0.9
    names = list(before)
    step = torch.cat([(exact[n] - before[n]).flatten() for n in names])
    taken = torch.cat([(rounded[n].float() - start[n].float()).flatten() for n in names])
    # both go the way of the update, as far as its length along it
    share = (taken @ step / step.square().sum()).item()
    assert 0.9 < share < 1.1
    assert len(trainer.engine.optimizer.state) == len(names)


def test_stochastic_rounding_is_right_on_average():
    exact = torch.full((200_000,), 1.0 + 2.0**-9)  # a quarter of the way from 1 to the next bf16 number
    rounded = rounded_stochastically(exact, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    # the standard error of the share is 1e-3
    assert abs((rounded > 1).float().mean().item() - 0.25) < 5e-3
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -1.0])
    torch.testing.assert_close(rounded_stochastically(odd, torch.Generator()).float(), odd, equal_nan=True)


# fp16


def test_an_overflow_halves_the_scale_and_leaves_the_update_out(make_trainer, tmp_path):
    for settings in ({}, {"offload": "optimizer"}, {"train_gradient_dtype": "half"}):
        trainer = make_trainer(
            mixed_precision="fp16", output_dir=str(tmp_path / str(settings)), ema_decay=0.5, **settings
        )
        before = trained(trainer)
        average = [a.clone() for a in trainer.engine.ema.averages]
        for gradient, skipped in ((float("inf"), 1.0), (1.0, 0.0)):
            trainer.engine.weights.fill_gradients(torch.float32)
            for each in trainer.engine.weights.gradients:
                each.fill_(gradient)
            logged = trainer.engine.step()
            assert logged["skipped_step"].item() == skipped
            assert logged["loss_scale"].item() == 2.0 ** (16 if skipped else 15)
            assert moved(before, trained(trainer)) == (0.0 if skipped else 1.0)
            same = all(torch.equal(a, b) for a, b in zip(average, trainer.engine.ema.averages, strict=True))
            assert same == bool(skipped)
        assert moments.step_of(trainer.engine.optimizer) == 1


def test_skipped_updates_are_in_the_log(make_trainer):
    trainer = make_trainer(mixed_precision="fp16", sample_num_steps=2)
    trainer.engine._scale.value.fill_(2.0**40)
    trainer.train()
    updates = [record for record in trainer.run_log.metrics.read() if record["kind"] == "update"]
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


# the same steps


@pytest.mark.parametrize(
    ("settings", "plain", "limit"),
    [
        # the same numbers in another place
        ({"offload": "optimizer"}, {}, 1e-6),
        ({"offload": "optimizer", "mixed_precision": "bf16"}, {"mixed_precision": "bf16"}, 1e-6),
        ({"optimizer_in_backward": True}, {"train_max_grad_norm": float("inf")}, 1e-6),
        # sums of bf16 gradients have 8 bits, and Adam's first steps are their signs
        ({"mixed_precision": "bf16", "train_gradient_dtype": "half"}, {"mixed_precision": "bf16"}, 0.2),
        # the same 8-bit steps by bitsandbytes and by csrc/, which rounds a moment's extreme by less
        (
            {"train_use_8bit_adam": True, "offload": "optimizer"},
            {"train_use_8bit_adam": True},
            0.02,
        ),
        ({"train_use_8bit_adam": True}, {}, 0.15),
    ],
    ids=str,
)
def test_weights_end_where_the_plain_engine_puts_them(make_trainer, tmp_path, settings, plain, limit):
    common = {"train_micro_batch_size": 20, "train_max_grad_norm": plain.get("train_max_grad_norm", 1.0)}
    start, reference, _ = run(make_trainer, tmp_path, "plain", **common | plain)
    _, after, _ = run(make_trainer, tmp_path, "other", **common | settings)
    assert apart(after, reference, start) < limit


def test_eight_bits_are_kept_where_they_pay(make_trainer, tmp_path):
    for name, settings, kind in (("host", {"offload": "optimizer"}, "HostAdamW8bit"), ("device", {}, "AdamW8bit")):
        _, _, trainer = run(make_trainer, tmp_path, name, train_use_8bit_adam=True, num_epochs=1, **settings)
        optimizer = trainer.engine.optimizer
        assert type(optimizer).__name__ == kind
        for master in trainer.engine.weights.masters:
            expected = torch.uint8 if master.numel() >= 4096 else torch.float32
            assert optimizer.state[master]["state1"].dtype == expected


def test_a_lora_has_eight_bit_states_if_small_tensors_may(make_trainer, tmp_path):
    settings = {"use_lora": True, "train_use_8bit_adam": True, "num_epochs": 1}
    for size, dtype in ((4096, torch.float32), (1, torch.uint8)):
        _, _, trainer = run(make_trainer, tmp_path, str(size), train_min_8bit_size=size, **settings)
        assert {state["state1"].dtype for state in trainer.engine.optimizer.state.values()} == {dtype}


def test_paged_states_train(make_trainer, tmp_path):
    before, after, trainer = run(make_trainer, tmp_path, train_use_8bit_adam=True, train_paged_adam=True)
    assert type(trainer.engine.optimizer).__name__ == "PagedAdamW8bit"
    assert moved(before, after) > 0.99


def test_offloaded_data_crosses_once_an_update(make_trainer, tmp_path, monkeypatch):
    """However many micro-batches an update has: every gradient comes down once, and every copy goes up once."""
    moved_bytes = []
    move = _Staging.move
    monkeypatch.setattr(
        _Staging, "move", lambda self, to, of: moved_bytes.append(sum(t.nbytes for t in of)) or move(self, to, of)
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


def test_buckets_hold_everything_once(monkeypatch):
    monkeypatch.setattr("ddpo_fast.engine.optimizers.BUCKET", 10)
    assert list(buckets([4, 4, 4, 30, 1, 9, 1])) == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(buckets([])) == []


@pytest.mark.parametrize("settings", [{"offload": "optimizer"}, {"train_gradient_dtype": "half"}], ids=str)
def test_buckets_do_not_change_the_step(make_trainer, tmp_path, monkeypatch, settings):
    ends = []
    for size in (25_000_000, 3000):
        monkeypatch.setattr("ddpo_fast.engine.optimizers.BUCKET", size)
        ends.append(run(make_trainer, tmp_path, str(size), mixed_precision="bf16", num_epochs=1, **settings)[1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_flat_is_in_the_order_of_memory():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(flat(weight), weight.permute(0, 2, 3, 1).flatten())
    assert flat(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(flat(weight.contiguous(), like=weight), flat(weight))


# what is kept


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16", "ema_decay": 0.9},
        # few steps, as processors are slow in fp16
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
    make_trainer(output_dir=str(tmp_path / "cut"), prompts=load_prompts("animals"), **settings).train(1)
    _, after, resumed = run(make_trainer, tmp_path, "cut", resume_from=str(tmp_path / "cut"), **settings)
    if torch.cuda.is_available():
        # a GPU's atomics sum in an order of their own from run to run
        assert apart(after, whole, start) < 1e-2
        return
    assert all(torch.equal(whole[name], after[name]) for name in whole)
    for moment in moments.MOMENTS:
        for one, two in zip(uncut.engine.weights.masters, resumed.engine.weights.masters, strict=True):
            kept = moments.get(uncut.engine.optimizer, one, moment)
            assert torch.equal(kept, moments.get(resumed.engine.optimizer, two, moment))
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
def test_another_setting_goes_on_from_a_checkpoint(make_trainer, tmp_path, was, then, limit):
    start, whole, _ = run(make_trainer, tmp_path, "whole", **was)
    make_trainer(output_dir=str(tmp_path / "cut"), prompts=load_prompts("animals"), **was).train(1)
    _, after, trainer = run(make_trainer, tmp_path, "cut", resume_from=str(tmp_path / "cut"), **then)
    assert trainer.engine.updates == 4
    assert apart(after, whole, start) < limit


def test_the_average_follows_the_weights_and_is_saved(make_trainer, tmp_path):
    """Four updates: the average is the sum of the weights that its definition says, on either device."""
    seen = []
    trainer = make_trainer(ema_decay=0.5, ema_device="cpu", mixed_precision="bf16")
    seen.append(trained(trainer))
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
    assert all(torch.equal(p, w) for p, w in zip(last.parameters(), trained(trainer).values(), strict=True))


def test_gradients_in_place_stay_there(make_trainer):
    """A recorded graph writes to them where they were, whatever kind of step they went into."""
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
    """A UNet call of more than 4 rows raises half-way through a backward pass; the weights end as if none had."""
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
    assert apart(trained(trainer), reference, start) < RUNS_APART_IN_FP64


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(ENGINE_MISSING)])
def test_without_a_smaller_micro_batch_there_is_advice(make_trainer, monkeypatch, error):
    trainer = make_trainer(train_micro_batch_size=1)

    def full(*_):
        raise error

    trainer.policy.output = full
    with pytest.raises(RuntimeError, match="micro-batch of 1: set a smaller train_micro_batch_size, gradient_check"):
        trainer.train()


def test_frozen_networks_sleep_on_the_host(make_trainer, tmp_path):
    _, plain, _ = run(make_trainer, tmp_path, "plain", num_epochs=1)
    _, after, _ = run(make_trainer, tmp_path, "asleep", num_epochs=1, offload_frozen=True)
    assert all(torch.equal(plain[name], after[name]) for name in plain)


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
def test_memory_is_no_maths(make_trainer, tmp_path, settings):
    start, plain, _ = run(make_trainer, tmp_path, "plain", in_fp64, num_epochs=1)
    _, after, _ = run(make_trainer, tmp_path, "small", in_fp64, num_epochs=1, **settings)
    assert apart(after, plain, start) < RUNS_APART_IN_FP64


def test_every_update_in_backward_must_be_one_call(make_trainer):
    with pytest.raises(ValueError, match="optimizer_in_backward is True, but an update takes 7 UNet calls"):
        make_trainer(optimizer_in_backward=True, train_max_grad_norm=float("inf"), train_micro_batch_size=3)


def test_processes_take_the_least_of_their_sizes(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr("ddpo_fast.batch_sizes.all_reduce_min", lambda _, value: min(value, 10))
    assert trainer.sizes._free_bytes() <= 10
