"""Recording and replaying: the bookkeeping with a stand-in for CUDA, which a GPU machine replaces by the real thing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from rounding import drift_limits

from ddpo_fast import cuda_graphs
from ddpo_fast.cuda_graphs import WARM_UPS, Recorded, Recording
from ddpo_fast.trajectory import pair_index, pairs_of

on_a_gpu = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """On a CPU a replay calls the function again and writes its outputs where those of the recording were."""
    if on_a_gpu:
        return

    def record(function, arguments):
        inputs = [argument.clone() for argument in arguments]
        for _ in range(WARM_UPS):
            function(*inputs)
        outputs = [torch.empty_like(output) for output in function(*inputs)]

        def replay():
            for static, output in zip(outputs, function(*inputs), strict=True):
                static.copy_(output)

        return Recording(inputs, replay, outputs)

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(cuda_graphs, "problem", lambda device: "")


def test_replays_read_new_arguments_and_undo_warm_ups():
    device = "cuda" if on_a_gpu else "cpu"
    total = torch.zeros((), device=device)

    def add(x, y):
        total.add_(x.sum())
        return [x + y]

    recorded = Recorded(add, total.zero_)
    ones = torch.ones(3, device=device)
    for i in range(1, 4):
        assert torch.equal(recorded(ones, i * ones)[0], (1 + i) * ones)
        if not on_a_gpu and i == 1:
            total.fill_(3.0)  # the stand-in's own recording counts, a captured graph's does not
        assert total.item() == 3 * i
    assert torch.equal(recorded(ones[:2], ones[:2])[0], 2 * ones[:2])


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_recorded_run_ends_where_the_plain_one_does(make_trainer, tmp_path, use_lora, precision):
    ends = []
    for graphs in (False, True):
        trainer = make_trainer(
            use_lora=use_lora,
            mixed_precision=precision,
            cuda_graphs=graphs,
            train_micro_batch_size=8,  # 20 pairs an update: two that are recorded and a rest that is not
            sample_merge_batches=1,
            allow_tf32=False,
            output_dir=str(tmp_path / f"{graphs}"),
        )
        trained = {n: p for n, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        limits = drift_limits(trainer)
        trainer.train()
        ends.append({n: p.detach().clone() for n, p in trained.items()})
        updates = [r for r in trainer.run_log.metrics.read() if r["kind"] == "update"]
        assert updates[0]["ratio_drift"] <= limits[0]
    if not on_a_gpu:
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in before)
    moved = sum((ends[0][n] - before[n]).square().sum() for n in before) ** 0.5
    apart = sum((ends[0][n] - ends[1][n]).square().sum() for n in before) ** 0.5
    # a GPU's atomics sum in an order of their own from run to run
    assert apart < (5e-3 if precision == "no" else 5e-2) * moved


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_replay_adds_the_gradient_that_one_call_adds(make_trainer, precision):
    trainer = make_trainer(mixed_precision=precision, cuda_graphs=True, allow_tf32=False)
    (trajectory,), _ = trainer._generate_samples(1, 4)
    trajectory = trajectory.with_advantages(torch.tensor([1.0, -1.0, 0.5, 2.0]))
    pairs = pairs_of([trajectory], pair_index([trajectory], 5)[:8], guided=True)
    ppo, engine, gradients = trainer.ppo, trainer.engine, []
    with engine.computing():
        operands = *pairs, engine.loss_scale().clone()
        # the second recorded call is a replay alone
        for learn in (ppo._add_gradient, ppo._recorded, ppo._recorded):
            engine.zero_gradients()
            learn(*operands)
            gradients.append(torch.cat([g.flatten().double() for g in engine.weights.gradients]))
    eager, *replayed = gradients
    # The same kernels in the same order: only what a GPU's atomics add up may be rounded in another order. These are
    # sums of fewer than 2^10 terms in fp32, of random sign: sqrt(2^10) roundings of the largest. Activations are
    # rounded anew after such a sum, to half a unit of bf16.
    bound = 2**5 * 2**-23 if precision == "no" else 2**-8
    assert eager.norm() > 0
    for gradient in replayed:
        assert (gradient - eager).norm() <= (bound if on_a_gpu else 0) * eager.norm()


def test_recordings_go_with_their_micro_batch(make_trainer):
    """Their pools would hold the memory that ran out."""
    trainer = make_trainer(cuda_graphs=True, train_micro_batch_size=8, num_epochs=1)
    trainer.train()
    recordings = list(trainer.ppo._recorded._recordings.values())
    kept = [weakref.ref(tensor) for recording in recordings for tensor in (*recording.inputs, *recording.outputs)]
    assert kept
    del recordings
    trainer.ppo._halve_micro_batch("no memory")
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert trainer.sizes.micro_batch_size == 4


def test_without_a_gpu_there_is_a_reason(make_trainer, monkeypatch):
    if on_a_gpu:
        pytest.skip("there is a GPU")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cuda_graphs is True, but CUDA graphs need a CUDA device"):
        make_trainer(cuda_graphs=True)
