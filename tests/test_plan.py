"""Predicted memory against numbers computed by hand and against what networks keep, and the chosen settings."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_sentence import error_of_command

from ddpo_fast import DDPOConfig, cli
from ddpo_fast.batch_sizes import kept_bytes
from ddpo_fast.commands import plan, train
from ddpo_fast.commands.options import RunArguments
from ddpo_fast.device_memory import GB
from ddpo_fast.engine.optimizers import BUCKET
from ddpo_fast.model_configs import check_model
from ddpo_fast.plan.candidates import MARGIN, SAVINGS, choose, with_settings
from ddpo_fast.plan.footprint import Adapter, Footprint
from ddpo_fast.plan.live_bytes import LiveBytes, trace
from ddpo_fast.plan.phases import decode_bytes, predict
from ddpo_fast.plan.reward_memory import RewardMemory
from ddpo_fast.plan.update_bytes import state_bytes
from ddpo_fast.tiny_sd import MODEL

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from lib.sd15_random import make_sd15

SD15_WEIGHTS = 859_520_964
FULL = DDPOConfig(mixed_precision="bf16")


@pytest.fixture(scope="session")
def sd15(tmp_path_factory) -> str:
    """A folder with the configs of Stable Diffusion 1.5 and no weights."""
    folder = tmp_path_factory.mktemp("sd15")
    pipe = make_sd15("meta")
    pipe.save_config(folder)
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.scheduler.save_config(folder / "scheduler")
    pipe.unet.save_config(folder / "unet")
    pipe.vae.save_config(folder / "vae")
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    return str(folder)


@pytest.fixture(scope="session")
def footprints(sd15) -> dict[str, Footprint]:
    """Footprints that all tests share, as each one traces the networks, which takes seconds."""
    configs = check_model(sd15, has_weights=False)
    return {
        "full": Footprint(configs, None, torch.bfloat16),
        "lora": Footprint(configs, Adapter(), torch.bfloat16),
        "plain": Footprint(configs, None, torch.bfloat16, fused=False),
    }


def config(**settings) -> DDPOConfig:
    """A config without checks, as bitsandbytes may not be installed."""
    return with_settings(FULL, settings)


# weights


def test_weights_are_counted(footprints):
    full, lora = footprints["full"], footprints["lora"]
    assert (full.trained_weights, full.frozen_bytes) == (SD15_WEIGHTS, 0)
    assert (lora.trained_weights, lora.frozen_bytes) == (797_184, 2 * SD15_WEIGHTS)
    # the text encoder also has the numbers of its 77 positions
    assert (full.vae_bytes, full.text_bytes) == (2 * 83_653_863, 2 * 123_060_480 + 8 * 77)


@pytest.mark.parametrize(
    ("settings", "gpu", "host"),
    [
        # half-precision copy, fp32 weights, fp32 gradients, two fp32 moments
        ({}, 2 + 4 + 4 + 8, 0),
        ({"train_gradient_dtype": "half"}, 2 + 4 + 2 + 8, 0),
        ({"stochastic_rounding": True}, 2 + 4 + 8, 0),
        ({"ema_decay": 0.99}, 2 + 4 + 4 + 8 + 4, 0),
        ({"ema_decay": 0.99, "ema_device": "cpu"}, 2 + 4 + 4 + 8, 4),
        ({"offload": "optimizer", "train_gradient_dtype": "half"}, 2 + 2, 4 + 8),
        ({"offload": "optimizer", "ema_decay": 0.99}, 2 + 4, 4 + 8 + 4),
        # the model before training, in half precision
        ({"train_kl_weight": 0.1}, 2 + 4 + 4 + 8 + 2, 0),
        # averages to sample with take the place of the half-precision copy, unless that is all there is
        ({"ema_decay": 0.99, "ema_sampling": True}, 2 + 4 + 4 + 8 + 4, 0),
        ({"ema_decay": 0.99, "ema_sampling": True, "stochastic_rounding": True}, 2 + 4 + 8 + 4 + 2, 0),
    ],
)
def test_bytes_of_a_trained_weight(footprints, settings, gpu, host):
    plan = predict(footprints["full"], config(train_micro_batch_size=1, **settings))
    parts = plan.phases["training"]
    of_weights = ("UNet", "fp32 weights", "gradients", "optimizer states", "moving average")
    of_weights += ("reference weights", "averages to sample with")
    assert sum(parts.get(name, 0) for name in of_weights) == gpu * SD15_WEIGHTS
    assert sum(plan.host.get(name, 0) for name in of_weights) == host * SD15_WEIGHTS


def test_single_precision_has_one_set_of_weights(sd15):
    footprint = Footprint(check_model(sd15, has_weights=False), None, torch.float32)
    parts = predict(footprint, config(mixed_precision="no", train_micro_batch_size=1)).phases["updating"]
    assert parts["UNet"] + parts["gradients"] + parts["optimizer states"] == (4 + 4 + 8) * SD15_WEIGHTS
    assert "fp32 weights" not in parts
    away = predict(footprint, config(mixed_precision="no", train_micro_batch_size=1, offload="optimizer"))
    assert away.phases["updating"]["UNet"] == away.host["fp32 weights"] == 4 * SD15_WEIGHTS


def test_eight_bits_are_for_large_tensors():
    assert state_bytes([4095, 4096], config(train_use_8bit_adam=True)) == 8 * 4095 + 2 * 4096 + 8 * 4096 // 256
    assert state_bytes([4095, 4096], config()) == 8 * (4095 + 4096)
    every = config(train_use_8bit_adam=True, train_min_8bit_size=0)
    assert state_bytes([256], every) == 2 * 256 + 8


def test_a_bounded_update_keeps_the_weights_before_it(footprints):
    def updating(**settings):
        return predict(footprints["full"], config(train_micro_batch_size=1, **settings), 4 if "zero" in settings else 1)

    def copy_on_gpu(**settings):
        bounded, plain = updating(train_target_update=0.1, **settings), updating(**settings)
        return bounded.phases["updating"]["activations, buffers"] - plain.phases["updating"]["activations, buffers"]

    # in fp32 beside the fp32 weights, in bf16 where there are no others, and this process's part with ZeRO
    assert copy_on_gpu() == 4 * SD15_WEIGHTS
    assert copy_on_gpu(mixed_precision="bf16", stochastic_rounding=True) == 2 * SD15_WEIGHTS
    assert copy_on_gpu(zero=2) == SD15_WEIGHTS
    assert copy_on_gpu(offload="optimizer") == 0
    away = updating(train_target_update=0.1, train_guard=True, offload="optimizer")
    assert away.host["weights before an update"] == away.host["best weights"] == 4 * SD15_WEIGHTS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_splits_states_over_processes(footprints, stage):
    plan = predict(footprints["full"], config(train_micro_batch_size=1, zero=stage), num_processes=4)
    parts = plan.phases["training"]
    assert parts["fp32 weights"] + parts["optimizer states"] == (4 + 8) * SD15_WEIGHTS // 4
    assert parts["gradients"] == 4 * SD15_WEIGHTS // (1 if stage == 1 else 4)
    # DeepSpeed keeps stage 3's
    assert plan.phases["sampling"].get("gradients", 0) == (SD15_WEIGHTS if stage == 3 else 0)
    gathered = 2 * 2 * footprints["full"].largest_block
    assert parts["UNet"] == (2 * SD15_WEIGHTS if stage < 3 else 2 * SD15_WEIGHTS // 4 + gathered)
    away = predict(footprints["full"], config(train_micro_batch_size=1, zero=stage, offload="optimizer"), 4)
    assert away.host == {
        "fp32 weights": SD15_WEIGHTS,
        "optimizer states": 2 * SD15_WEIGHTS,
        # in fp32 for the step; stage 3 adds them up in host memory too
        "gradients": SD15_WEIGHTS * (2 if stage == 3 else 1),
    }
    averaged = predict(footprints["full"], config(train_micro_batch_size=1, zero=stage, ema_decay=0.9), 4)
    assert averaged.phases["training"]["moving average"] == SD15_WEIGHTS


def test_recorded_graphs_keep_gradients_and_their_own_memory(footprints):
    plan = predict(footprints["lora"], config(train_micro_batch_size=2, cuda_graphs=True))
    eager = predict(footprints["lora"], config(train_micro_batch_size=2)).phases
    assert plan.phases["sampling"]["gradients"] == 4 * 797_184
    kept = [eager[phase]["activations, buffers"] for phase in ("sampling", "training")]
    assert all(parts["recorded graphs"] == sum(kept) for name, parts in plan.phases.items() if name != "loading")


# SD 1.5's largest tensor, a convolution of 2560 to 1280 channels, is larger than a bucket
LARGEST = 2560 * 1280 * 9


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({}, 0),
        # gradients multiplied by the clipping factor
        ({"train_use_8bit_adam": True}, 4),
        # gradients converted to fp32 before that
        ({"train_gradient_dtype": "half"}, 4 + 4),
        # weights in fp32; random numbers, their sum, and the rounded weights in fp32 and bf16
        ({"stochastic_rounding": True}, 4 + 4 + (4 + 4 + 2)),
        ({"stochastic_rounding": True, "train_gradient_dtype": "half"}, 4 + 4 + 4 + (4 + 4 + 2)),
        # all of it is in host memory
        ({"offload": "optimizer", "train_gradient_dtype": "half"}, 0),
    ],
)
def test_an_update_makes_copies_of_a_bucket(footprints, settings, each):
    plan = predict(footprints["full"], config(train_micro_batch_size=1, **settings))
    assert plan.phases["updating"]["activations, buffers"] == each * LARGEST


@pytest.mark.parametrize("settings", [{}, {"train_gradient_dtype": "half"}, {"stochastic_rounding": True}])
def test_an_update_in_the_backward_pass_is_of_one_tensor(footprints, settings):
    in_backward = {**settings, "optimizer_in_backward": True, "train_max_grad_norm": float("inf")}
    whole = predict(footprints["full"], config(train_micro_batch_size=1, **settings)).phases
    parts = predict(footprints["full"], config(train_micro_batch_size=1, **in_backward)).phases
    gradient = 2 if "train_gradient_dtype" in settings else 4
    assert parts["training"]["gradients"] == gradient * LARGEST
    made = parts["training"]["activations, buffers"] - whole["training"]["activations, buffers"]
    assert made == (whole["updating"]["activations, buffers"] or 4 * LARGEST)
    assert "gradients" not in parts["updating"]
    assert parts["updating"]["activations, buffers"] == 0


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([BUCKET, 200], BUCKET + 200), ([100, 200], 300), ([BUCKET, 200, BUCKET, 100], BUCKET + 200)],
)
def test_host_memory_of_an_offloaded_step(footprints, sizes, weights):
    """Two buffers for fp32 gradients and two for bf16 copies take turns; each has its largest bucket of `weights`."""
    footprint = copy.copy(footprints["full"])
    footprint.trained_sizes = sizes
    host = predict(footprint, config(train_micro_batch_size=1, offload="optimizer")).host
    assert host["pinned buffers"] == (4 + 2) * weights


@pytest.mark.parametrize(
    ("settings", "wide"),
    [
        ({}, 4),
        ({"train_gradient_dtype": "half"}, 4 + 4),
        ({"train_use_8bit_adam": True}, 0),
    ],
)
def test_an_offloaded_step_makes_fp32_gradients_unless_it_reads_them_in_half_precision(footprints, settings, wide):
    host = predict(footprints["full"], config(train_micro_batch_size=1, offload="optimizer", **settings)).host
    assert host.get("fp32 gradients", 0) == wide * LARGEST
    gradient = 2 if "train_gradient_dtype" in settings else 4
    assert LARGEST < host["pinned buffers"] / (gradient + 2) <= 2 * LARGEST


def test_offloaded_networks_take_device_memory_only_while_they_compute(footprints):
    vae, text = footprints["lora"].vae_bytes, footprints["lora"].text_bytes
    # both embeddings and the last norm of CLIP, and one of its 12 layers, whose width is 768
    passing = 2 * 768 * (49408 + 77 + 2) + 2 * (12 * 768**2 + 13 * 768) + 8 * 77
    phases = predict(footprints["lora"], config(offload_frozen=True, train_micro_batch_size=1)).phases
    found = {name: (parts.get("VAE", 0), parts.get("text encoder", 0)) for name, parts in phases.items()}
    none = (0, 0)
    assert found == {
        "loading": none,
        "encoding": (0, passing),
        "sampling": none,
        "decoding": (vae, 0),
        "training": none,
        "updating": none,
    }
    phases = predict(footprints["lora"], config(train_micro_batch_size=1)).phases
    assert all((parts["VAE"], parts["text encoder"]) == (vae, text) for parts in phases.values())


def test_prompts_that_are_embedded_once_leave_the_text_encoder_out(footprints):
    text = footprints["lora"].passing_text_bytes
    plan = predict(footprints["lora"], config(embed_prompts_once=True, train_micro_batch_size=1))
    found = {name: parts.get("text encoder", 0) for name, parts in plan.phases.items()}
    assert found == {name: text if name == "encoding" else 0 for name in plan.phases}
    kept = {name for name, parts in plan.phases.items() if parts.get("kept prompts")}
    assert kept == set(plan.phases) - {"loading"}
    # mapped from its file, it takes no host memory either
    away = predict(footprints["lora"], config(embed_prompts_once=True, offload_frozen=True, train_micro_batch_size=1))
    assert (plan.host, away.host) == ({}, {"VAE": footprints["lora"].vae_bytes})


@pytest.mark.parametrize(("kind", "each"), [("8bit", 1 + 4 / 256), ("4bit", 1 / 2 + 4 / 64)])
def test_quantized_weights_under_an_adapter(sd15, kind, each):
    footprint = Footprint(check_model(sd15, has_weights=False), Adapter(), torch.bfloat16, quantized=kind)
    layers = make_sd15("meta").unet.modules()
    linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    assert footprint.frozen_bytes == 2 * (SD15_WEIGHTS - linear) + each * linear
    assert footprint.trained_weights == 797_184


def test_latents_of_an_epoch(footprints):
    few, many = (
        predict(footprints["lora"], config(train_micro_batch_size=1, sample_num_batches_per_epoch=n)).phases["updating"]
        for n in (2, 12)
    )
    image = 4 * 51 * 4 * 64 * 64 + 50 * 12 + 77 * (8 + 2 * 2 * 768) + 2 * 3 * 512 * 512
    assert many["trajectories, images"] - few["trajectories, images"] == 10 * image


# activations


@pytest.mark.parametrize(
    ("name", "mode", "gigabytes"),
    [
        ("plain", "none", 0.937),
        ("full", "none", 0.777),
        ("plain", "selective", 0.777),
        ("plain", "blocks", 0.155),
        ("lora", "none", 0.526),
    ],
)
def test_bytes_that_a_row_keeps(footprints, name, mode, gigabytes):
    """Measured with saved-tensor hooks these were 0.937, 0.780, 0.155 and 0.529 GB."""
    assert footprints[name].kept_per_row(mode) / GB == pytest.approx(gigabytes, abs=6e-4)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_peak_of_a_row_is_above_what_it_keeps_and_least_with_blocks(footprints, name):
    footprint = footprints[name]
    peaks = {mode: footprint.training(mode).peak(8) for mode in ("none", "blocks")}
    assert all(peaks[mode] > 8 * footprint.kept_per_row(mode) for mode in peaks)
    assert peaks["blocks"] < 0.35 * peaks["none"]


@pytest.mark.parametrize("adapter", [None, Adapter()], ids=["full", "lora"])
def test_the_trace_keeps_what_the_network_keeps(adapter):
    """Of the bundled model on a CPU, where no layer that keeps less is fused."""
    footprint = Footprint(check_model(str(MODEL)), adapter, torch.float32, "cpu", fused=False)
    unet = footprint._network().to_empty(device="cpu").train()
    there = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    inputs = (torch.empty_like(x, device="cpu").zero_() for x in footprint._inputs(8))
    assert 8 * footprint.kept_per_row() == pytest.approx(kept_bytes(lambda: unet(*inputs), there), rel=0.01)


def test_live_bytes_are_those_of_tensors_that_exist():
    with LiveBytes("cpu") as live:
        a = torch.empty(10, device="meta")
        b = a + 1
        view = b[:5]
        del b
        c = torch.cat([view, view])
        del a, c
        d = view * 2
    assert live.after_op == [40, 80, 80, 120, 60]
    assert live.now == 40 + 20
    del d, view
    assert live.now == 0


def test_a_trace_is_linear_op_by_op():
    def compute(rows: int) -> None:
        torch.empty(100, device="meta")
        torch.empty(rows, 5, device="meta")

    peak = trace(compute, "cpu").peak
    assert [peak(rows) for rows in (1, 20, 21)] == [400, 400, 420]


def test_vae_slicing_decodes_one_image_at_a_time(footprints):
    one, eight, sliced = (
        decode_bytes(footprints["lora"], config(vae_slicing=slicing), images)
        for slicing, images in ((False, 1), (False, 8), (True, 8))
    )
    assert eight == pytest.approx(8 * one, rel=0.01)
    assert sliced == one + 7 * 2 * 3 * 512 * 512


# chosen settings


@pytest.mark.parametrize("name", ["full", "lora"])
def test_chosen_settings_fit_or_the_plan_says_why_none_do(footprints, name):
    slowest = []
    for gigabytes in (6, 8, 12, 16, 24, 40, 48, 80):
        limit = gigabytes * GB * (1 - MARGIN)
        choice = choose(footprints[name], config(), gigabytes * GB)
        assert choice.plan.peak <= limit
        assert choice.plan.totals == predict(footprints[name], with_settings(config(), choice.settings)).totals
        assert len(choice.reasons) == len(choice.settings)
        saving = [lever for lever in SAVINGS if lever in choice.settings.items()]
        slowest.append(max((SAVINGS.index(lever) for lever in saving), default=-1))
        for lever, _ in saving:
            # without any one of the chosen savings even the smallest calls would not fit
            least = min(4, choice.settings["train_micro_batch_size"])
            without = {k: v for k, v in choice.settings.items() if k != lever}
            small = {**without, "train_micro_batch_size": least, "sample_merge_batches": 1}
            assert predict(footprints[name], with_settings(config(), small)).peak > limit
    assert slowest == sorted(slowest, reverse=True)
    assert choice.settings == {"train_micro_batch_size": 25, "sample_merge_batches": 2}, "50 pairs in equal parts"
    with pytest.raises(ValueError, match=r"needs at least \d\.\d GB of GPU memory .*, and there are 3"):
        choose(footprints[name], config(), 3 * GB)


def test_more_memory_is_never_slower(footprints):
    """With the same savings a larger GPU has at least as large micro-batches."""
    before: dict[tuple, int] = {}
    for gigabytes in range(6, 81, 2):
        settings = choose(footprints["full"], config(), gigabytes * GB).settings
        kind = tuple(sorted((k, v) for k, v in settings.items() if k not in ("train_micro_batch_size",)))
        assert settings["train_micro_batch_size"] >= before.get(kind, 0)
        before[kind] = settings["train_micro_batch_size"]


def test_settings_of_the_user_are_kept(footprints):
    own = config(gradient_checkpointing="selective", train_micro_batch_size=2, ema_decay=0.9, vae_slicing=True)
    settings = choose(footprints["full"], own, 8 * GB).settings
    assert not set(settings) & {"gradient_checkpointing", "train_micro_batch_size", "ema_decay", "vae_slicing"}
    assert settings["offload"] == "optimizer"


# the commands


def test_a_plan_needs_configs_only(sd15, capsys):
    assert not [path for path in Path(sd15).rglob("*") if path.suffix in (".safetensors", ".bin")]
    cli.main(["plan", "--pretrained_model", sd15, "--gpu-memory", "24", "--train_learning_rate", "1e-05"])
    printed = capsys.readouterr().out
    for text in ("a LoRA of rank 4 in 24 GB", "all weights in 24 GB", "optimizer states", "Not measured"):
        assert text in printed
    lora, full = (line for line in printed.splitlines() if line.startswith("ddpo-fast train"))
    run, parsed = train.read_options(full.split()[2:])
    assert run.full_finetune
    # with enough memory no savings are chosen: no recomputation and no offloading
    assert (parsed.gradient_checkpointing, parsed.offload, parsed.train_use_8bit_adam) == ("none", "none", True)
    assert parsed.train_learning_rate == 1e-5
    assert not train.read_options(lora.split()[2:])[0].full_finetune


def test_the_plan_of_a_lora_with_given_options(capsys):
    cli.main(["plan", "--gpu_memory", "8", "--lora_rank", "16"])
    assert "all weights" not in capsys.readouterr().out
    cli.main(["plan", "--gpu_memory", "8", "--full-finetune"])
    assert "a LoRA" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu-memory", "0.05", "--lora_rank", "4"], "needs at least"),
        (["--pretrained_model", "./nowhere", "--gpu-memory", "8"], "no such folder"),
        (
            ["--gpu-memory", "8", "--full-finetune", "--offload", "optimizer", "--host_memory", "0.001"],
            "of host memory",
        ),
        (["--gpu-memory", "8", "--host_memory", "nan"], "host_memory is nan"),
    ],
)
def test_an_impossible_plan_is_one_sentence(options, said):
    assert said in error_of_command(["plan", *options])


def test_host_memory_that_is_not_there_is_named(footprints, monkeypatch, capsys):
    made = predict(footprints["full"], config(train_micro_batch_size=1, offload="optimizer"))
    assert made.host_bytes == sum(made.host.values())
    assert plan.host_problem(made, 1, made.host_bytes) == ""
    said = plan.host_problem(made, 2, made.host_bytes)
    assert f"needs {2 * made.host_bytes / GB:.1f} GB of host memory for 2 processes (each fp32 weights" in said
    # the plan may be for another machine, but a run is on this one
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**6))
    cli.main(["plan", "--gpu_memory", "8", "--full-finetune", "--offload", "optimizer"])
    assert "on this machine: training needs" in capsys.readouterr().out
    settings = DDPOConfig(mixed_precision="no", auto_memory=True, gpu_memory=8, offload="optimizer")
    with pytest.raises(ValueError, match="GB of host memory"):
        plan.apply_auto_memory(RunArguments(full_finetune=True), settings, "cpu")


def test_without_a_gpu_the_plan_asks_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="say how many GB it has with --gpu-memory"):
        cli.main(["plan"])


def test_auto_memory_changes_only_settings_that_are_not_given():
    run = RunArguments(full_finetune=True)
    settings = DDPOConfig(
        mixed_precision="no", auto_memory=True, gpu_memory=0.13, train_micro_batch_size=3, train_batch_size=1
    )
    before, said = {**vars(settings)}, []
    changes = plan.apply_auto_memory(run, settings, "cpu", said.append)
    assert changes
    assert {f.name for f in fields(DDPOConfig) if before[f.name] != getattr(settings, f.name)} <= set(changes)
    assert settings.train_micro_batch_size == 3
    assert len(said) == len(changes) + 1
    assert all(line.startswith("auto_memory: ") for line in said)


@pytest.mark.parametrize("kind", ["resident", "offloaded", "activations", "processes"])
def test_where_the_memory_of_a_reward_is(footprints, kind):
    size = 2 * 10**9
    without, footprint = predict(footprints["lora"], config()), copy.copy(footprints["lora"])
    footprint.reward = RewardMemory(**{kind: size})
    with_reward = predict(footprint, config())
    added = {phase: with_reward.totals[phase] - without.totals[phase] for phase in without.totals}
    phases = {"resident": set(added) - {"loading"}, "processes": set(added)}.get(kind, {"sampling", "decoding"})
    assert added == {phase: size if phase in phases else 0 for phase in added}
    if kind == "processes":
        # these have allocators of their own
        assert with_reward.allocated == without.allocated


def test_the_host_memory_of_a_reward_is_added(footprints):
    footprint = copy.copy(footprints["lora"])
    footprint.reward = RewardMemory(host=5)
    assert predict(footprint, config()).host["reward"] == 5


def test_auto_memory_needs_a_gpu_or_a_size():
    said: list[str] = []
    settings = DDPOConfig(mixed_precision="no", auto_memory=True)
    assert plan.apply_auto_memory(RunArguments(), settings, "cpu", said.append) == {}
    assert said == ["auto_memory: there is no GPU here, so nothing is chosen"]


def test_train_uses_the_settings_of_auto_memory(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = (
        "--recipe trl --num_epochs 1 --sample_num_steps 2 --mixed_precision no --prompts animals --auto-memory "
        "--gpu_memory 1"
    )
    cli.main(["train", *options.split(), "--output_dir", "run", "--pretrained_model", model_dir])
    assert "auto_memory: train_micro_batch_size=2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["train_micro_batch_size"] == 2
