"""Recording UNet calls as CUDA graphs and replaying them; on a machine without a GPU a stand-in records them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from compare_runs import metrics_of, relative_distance, same_bits, trained_weights
from rounding import drift_limits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpo_fast import cuda_graphs
from ddpo_fast.cuda_graphs import WARM_UPS, Recorded, Recording

on_a_gpu = torch.cuda.is_available()
PER_IMAGE_AND_STEP = ("prompt_embeds", "negative_prompt_embeds", "timesteps", "latents", "next_latents", "log_probs")


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """On a CPU a replay calls the function again and copies its outputs to where those of the recording are."""
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
            total.fill_(3.0)  # the stand-in runs the function while it records, and capturing a graph does not
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
            train_micro_batch_size=8,  # 20 pairs an update: two calls that are recorded, and 4 pairs that are not
            sample_merge_batches=1,
            allow_tf32=False,
            output_dir=str(tmp_path / f"{graphs}"),
        )
        before = trained_weights(trainer)
        limits = drift_limits(trainer)
        trainer.train()
        ends.append(trained_weights(trainer))
        assert metrics_of(trainer, "update")[0]["ratio_drift"] <= limits[0]
    if not on_a_gpu:
        assert same_bits(*ends)
    # atomic additions on a GPU sum in another order in each run
    assert relative_distance(ends[1], ends[0], before) < (5e-3 if precision == "no" else 5e-2)


class Watched(TorchDispatchMode):
    """Notes what a CUDA graph cannot record, and the addresses of what a call reads beside what it makes itself."""

    # tensors made of Python's numbers, and values that the host reads
    NAMES = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.refused, self.read, self.made = set(), set(), set()
        # so that no address is used twice
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.NAMES):
            self.refused.add(name)
        self.read |= self._addresses((args, kwargs)) - self.made
        result = func(*args, **(kwargs or {}))
        self.made |= self._addresses(result) - self.read
        return result

    def _addresses(self, values):
        tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        self.kept += tensors
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux_dev"])
def test_every_family_is_recorded(make_trainer, tiny_model, tmp_path, monkeypatch, family):
    """A recorded run, which also draws pictures, has the plain one's bits, and its replays read the same addresses."""
    replays, record = [], cuda_graphs.record

    def watched(function, arguments):
        made, mine = record(function, arguments), []
        replays.append(mine)

        def replay():
            with Watched() as calls:
                made.replay()
            mine.append((calls.refused, calls.read))

        return made._replace(replay=replay)

    if not on_a_gpu:
        monkeypatch.setattr(cuda_graphs, "record", watched)
    ends, start = [], None
    for graphs in (False, True):
        trainer = make_trainer(
            model=tiny_model(family),
            cuda_graphs=graphs,
            sample_num_steps=2,
            sample_freq=1,
            sample_num_images=1,
            train_micro_batch_size=4,
            sample_merge_batches=1,
            allow_tf32=False,
            height=16,
            width=24,
            output_dir=str(tmp_path / f"{graphs}"),
        )
        start = start or trained_weights(trainer)
        trainer.train()
        ends.append(trained_weights(trainer))
    assert relative_distance(ends[1], ends[0], start) < 5e-3
    if not on_a_gpu:
        assert same_bits(*ends)
        assert len(replays) >= 2, "sampling and training"
    for mine in replays:
        assert len(mine) > 1
        assert all(found == (set(), mine[0][1]) for found in mine)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_replay_adds_the_gradient_that_one_call_adds(make_trainer, tmp_path, precision):
    """An update of 4 images x 2 steps, which is one call of 8 pairs."""
    gradients, batch = [], {}
    for graphs in (False, True):
        trainer = make_trainer(
            mixed_precision=precision,
            cuda_graphs=graphs,
            allow_tf32=False,
            train_timestep_fraction=0.4,
            train_micro_batch_size=8,
            train_gradient_accumulation_steps=1,
            output_dir=tmp_path / f"{graphs}",
        )
        # both sample, which sets the scheduler's timesteps, and both train on the samples of the first one
        (trajectory,), _ = trainer._generate_samples(1, 4)
        if not batch:
            batch = {name: trajectory[name] for name in PER_IMAGE_AND_STEP}
            batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, 2.0], device=trajectory.timesteps.device)
        engine = trainer.engine

        def keep_gradient(engine=engine):
            gradients.append(torch.cat([g.flatten().double() for g in engine.weights.gradients]))
            engine.zero_gradients()
            return {}

        engine.step = keep_gradient
        # with graphs the first call records, and the second one is a replay alone
        for _ in range(1 + graphs):
            trainer._train_batched_samples(0, 0, 0, [batch])
    eager, *replayed = gradients
    # The same kernels run in the same order, so only sums by atomic additions may differ. These have fewer than 2^10
    # terms of random sign in fp32, so they differ by sqrt(2^10) roundings of the largest. In bf16 activations are
    # rounded after such a sum, by half a unit of bf16.
    bound = 2**5 * 2**-23 if precision == "no" else 2**-8
    assert eager.norm() > 0
    assert len(replayed) == 2
    for gradient in replayed:
        assert (gradient - eager).norm() <= (bound if on_a_gpu else 0) * eager.norm()


def test_recordings_go_with_their_micro_batch(make_trainer, monkeypatch):
    """Recordings keep the activations of their micro-batch, so they are freed when memory has run out."""
    trainer = make_trainer(cuda_graphs=True, train_micro_batch_size=8, num_epochs=1)
    record, kept = cuda_graphs.record, []

    def watched(function, arguments):
        recording = record(function, arguments)
        # those of sampling stay
        if function.__self__ is trainer.ppo:
            kept.extend(weakref.ref(tensor) for tensor in (*recording.inputs, *recording.outputs))
        return recording

    monkeypatch.setattr(cuda_graphs, "record", watched)
    trainer.train()
    assert any(reference() is not None for reference in kept)
    trainer.ppo._halve_micro_batch("no memory")
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert trainer.sizes.micro_batch_size == 4


def test_without_a_gpu_the_setting_is_refused(make_trainer, monkeypatch):
    if on_a_gpu:
        pytest.skip("there is a GPU")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cuda_graphs is True, but CUDA graphs need a CUDA device"):
        make_trainer(cuda_graphs=True)


class Clock:
    """Time of a host that takes `launch` seconds for a call, and of a device that takes `compute`, without a GPU."""

    def __init__(self, launch, compute):
        self.launch, self.compute, self.host, self.device = launch, compute, 0.0, 0.0

    def call(self):
        # a kernel at the begin and one at the end: the last one cannot run before it is launched
        begun = max(self.host, self.device)
        self.host += self.launch
        self.device = max(begun + self.compute, self.host)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def sleep(self, cycles):
        self.device = max(self.host, self.device) + cycles / cuda_graphs.CYCLES_A_SECOND

    def event(self, enable_timing):
        clock = self

        class Event:
            def record(self):
                self.at = max(clock.host, clock.device)

            def synchronize(self):
                clock.synchronize()

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        return Event()


def put_clock_behind_torch(monkeypatch, clock):
    monkeypatch.setattr(cuda_graphs.time, "perf_counter", lambda: clock.host)
    for name, value in (("synchronize", clock.synchronize), ("_sleep", clock.sleep), ("Event", clock.event)):
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(("launch", "compute", "expected"), [(30e-3, 5e-3, True), (30e-3, 60e-3, False)])
def test_the_probe_compares_the_host_with_a_device_that_need_not_wait(monkeypatch, launch, compute, expected):
    clock = Clock(launch, compute)
    put_clock_behind_torch(monkeypatch, clock)
    assert cuda_graphs.host_is_the_limit(clock.call) is expected


@pytest.mark.parametrize("pays", [False, True])
def test_a_run_decides_once_and_for_itself(make_trainer, tmp_path, monkeypatch, pays):
    """The probe is one of the run's micro-batch, whose size is chosen anew with the memory that graphs leave."""
    probed = []

    def probe(call):
        probed.append(len(call()))
        return pays

    monkeypatch.setattr(cuda_graphs, "host_is_the_limit", probe)
    sizes = []
    for again in (False, True):
        trainer = make_trainer(
            cuda_graphs=None,
            num_epochs=1 + again,
            output_dir=str(tmp_path),
            resume_from=str(tmp_path) if again else "",
        )
        assert trainer.config.cuda_graphs is None, "the user's settings stay"
        assert (trainer.ppo._recorded is not None) is pays
        assert trainer.engine.keeps_gradients is pays
        trainer.train()
        sizes.append(trainer.sizes.micro_batch_size)
    assert len(probed) == 1, "the resumed run uses what the first has measured"
    assert probed[0] == 2 * sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize(
    "settings", [{"auto_memory": True}, {"gpu_memory": 8.0}, {"sizes": ["16x16", "16x24"]}, {"in_backward": True}]
)
def test_settings_that_forbid_graphs_are_no_error(make_trainer, monkeypatch, settings):
    if settings.pop("in_backward", False):
        settings = {
            "optimizer_in_backward": True,
            "train_max_grad_norm": float("inf"),
            "train_micro_batch_size": 20,
        }
    monkeypatch.setattr(cuda_graphs, "host_is_the_limit", lambda call: True)
    trainer = make_trainer(cuda_graphs=None, **settings)
    assert trainer.ppo._recorded is None
    monkeypatch.setattr(cuda_graphs, "problem", lambda device: "no GPU")
    assert make_trainer(cuda_graphs=None).ppo._recorded is None
