"""Two processes over gloo: rows 7, 8 and 9 of the table of differences. In TRL the replicas' weights diverge, and the
first checkpoint hangs.

One update sees all images of an epoch here, so that one process with all of them and two with half each have the same
gradient up to the order of sums.
"""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradient_sums
import pytest
import torch
from compare_runs import metrics_of, relative_distance, same_bits
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from run_process import environment, finish

from ddpo_fast import DDPOConfig
from ddpo_fast.engine.zero_settings import zero_settings
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline

WORKER = Path(__file__).with_name("process_worker.py")
# ZeRO 3 gathers each module's weights in each call: few steps, and a second epoch only where it is looked at. Adam's
# first steps are the gradients' signs, which rounding turns for a few in a million; a large epsilon smooths that.
EPOCH = {
    "train_batch_size": 4,
    "train_gradient_accumulation_steps": 2,
    "sample_num_steps": 2,
    "train_adam_epsilon": 1e-4,
    "epochs": 1,
}
MORE = {"epochs": 2}
LORA = EPOCH | {"use_lora": True}
SEVERAL = {"reward": "tiny_run:brightness:-1,process_worker:contrast:2"}
TWO = {
    "ddp": EPOCH,
    "zero-1": EPOCH | {"zero": 1},
    "zero-2": EPOCH | MORE | {"zero": 2},
    "zero-3": EPOCH | MORE | {"zero": 3, "ema_decay": 0.5, "sample_freq": 1, "sample_num_images": 2},
    "offload": EPOCH | {"offload": "optimizer"},
    "bf16": EPOCH | {"mixed_precision": "bf16"},
    "zero-3-bf16": EPOCH | {"zero": 3, "mixed_precision": "bf16"},
    "bound": EPOCH | {"train_target_update": 1e-2},
    "bound-zero-2-offload": EPOCH | {"train_target_update": 1e-2, "zero": 2, "offload": "optimizer"},
    "bound-zero-3-offload": EPOCH | {"train_target_update": 1e-2, "zero": 3, "offload": "all"},
    # images of another size in each of the two epochs
    "bits-zero-2": EPOCH
    | MORE
    | {"zero": 2, "offload": "optimizer", "train_use_8bit_adam": True, "mixed_precision": "bf16"}
    | {"sizes": ["16x16", "16x24"]},
    "several": EPOCH | SEVERAL,
    "lora": LORA,
    "lora-zero-2": LORA | {"zero": 2, "offload": "optimizer"},
    "lora-zero-3": LORA | {"zero": 3},
}
# With guidance, so that training's calls have the negative prompt's rows too, and of images that are not square.
FAMILY = {"sample_guidance_scale": 3.0, "height": 16, "width": 24}
FAMILIES = ("sdxl", "sd35", "flux_dev")
# all weights of FLUX.1 do not fit any GPU
OF_FAMILY = {family: FAMILY | {"use_lora": family == "flux_dev"} for family in FAMILIES}
# from the first epoch's checkpoint of the run that is named
RESUMED = {
    "zero-2-again": EPOCH | MORE | {"zero": 2, "resumes": "zero-2"},
    "zero-3-again": EPOCH | MORE | {"zero": 3, "ema_decay": 0.5, "resumes": "zero-3"},
    "bits-zero-2-again": TWO["bits-zero-2"] | {"resumes": "bits-zero-2"},
    "zero-3-from-2": EPOCH | MORE | {"zero": 3, "resumes": "zero-2"},
    "ddp-from-zero-3": EPOCH | MORE | {"resumes": "zero-3", "ema_decay": 0.5},
    "zero-2-from-ddp": EPOCH | MORE | {"zero": 2, "resumes": "ddp"},
}
TWICE = EPOCH | {"train_gradient_accumulation_steps": 4, "sample_num_batches_per_epoch": 4}
ONE = {
    "one": TWICE | {"like": "ddp", "sample_freq": 1, "sample_num_images": 2},
    "one-several": TWICE | SEVERAL | {"like": "several"},
    "one-zero-2": TWICE | {"like": "ddp", "zero": 2},
    "one-lora": TWICE | {"like": "lora", "use_lora": True},
    "one-from-zero-2": TWICE | MORE | {"resumes": "zero-2"},
    "one-zero-3-from-ddp": TWICE | MORE | {"resumes": "ddp", "zero": 3},
}
ALL = TWO | RESUMED | ONE
# ZeRO 2 differs from 3 in what the engine keeps, and not by family
FAMILY_STAGES = [("sdxl", 2), *((family, 3) for family in FAMILIES)]
TWO_OF_FAMILIES = {f"{family}-zero-{n}": EPOCH | OF_FAMILY[family] | {"zero": n} for family, n in FAMILY_STAGES}
ONE_OF_FAMILIES = {f"{family}-one": TWICE | case | {"like": f"{family}-zero-3"} for family, case in OF_FAMILY.items()}
GROUPS = {
    "num_epochs": 1,
    "sample_num_steps": 2,
    "sample_group_size": 4,
    "sample_redraws": 3,
}
OF_GROUPS = {f"groups-{credit}": GROUPS | {"train_image_credit": credit} for credit in ("coca", "value")}


def run(model: str, folder: Path, *cases: dict) -> None:
    """Trains the cases of one process, and those of two."""
    files = [folder / f"cases_{processes}.json" for processes, _ in enumerate(cases, 1)]
    for file, listed in zip(files, cases, strict=True):
        file.write_text(json.dumps(listed))
    finish([sys.executable, WORKER, model, folder, *files], env=environment())


@pytest.fixture(scope="module")
def runs(model_dir, tiny_model, tmp_path_factory):
    """(folder of all runs, the result of each by its name)."""
    folder = tmp_path_factory.mktemp("processes")
    two, one = (
        {name: case | {"model": tiny_model(name.partition("-")[0])} for name, case in cases.items()}
        for cases in (TWO_OF_FAMILIES, ONE_OF_FAMILIES)
    )
    run(model_dir, folder, ONE | one, TWO | RESUMED | two | OF_GROUPS | {"gradients": {}})
    return folder, {name: torch.load(folder / name / "result.pt", weights_only=True) for name in [*ALL, *two, *one]}


@pytest.fixture(scope="module")
def start(model_dir):
    unet = UNet2DConditionModel.from_pretrained(Path(model_dir) / "unet")
    return {name: parameter.detach() for name, parameter in unet.named_parameters()}


def apart(results: dict, name: str, other: str, start: dict[str, torch.Tensor], when: str = "weights") -> float:
    """How far two runs' weights are from each other, as a share of how far training moved them.

    They are those after the first epoch of a run, which for one that was resumed is the only one, or `when="end"`.
    """
    one, two = results[name][when], results[other][when]
    # an adapter is not in the model's folder: here it starts from zero
    return relative_distance(one, two, {name: start.get(name, torch.zeros_like(two[name])) for name in two})


def test_images_of_fixed_noise_are_those_of_one_process(runs):
    """Of a ZeRO 3 whose weights are split too; the best images of training are those of all processes."""
    folder, _ = runs
    for epoch in (0, 1):
        two, one = (
            json.loads((folder / name / "samples" / f"epoch_{epoch:05d}" / "samples.json").read_text())["samples"]
            for name in ("zero-3", "one")
        )
        assert [entry["reward"] for entry in two] == pytest.approx([entry["reward"] for entry in one], rel=1e-4)
    assert len({entry["reward"] for entry in two}) == 2
    extremes = json.loads((folder / "zero-3" / "samples" / "epoch_00001" / "extremes.json").read_text())["samples"]
    assert len(extremes) == 8
    assert max(entry["reward"] for entry in extremes) == extremes[0]["reward"]


def test_several_rewards_are_measured_over_the_images_of_all_processes(runs):
    """The epoch's 16 images are of two processes or of one; their rewards differ by the rounding that is said below."""
    _, results = runs
    two, one = (results[name]["spreads"] for name in ("several", "one-several"))
    for name, spread in two.items():
        assert spread["count"] == 16
        assert spread["squares"] > 0
        assert spread == pytest.approx(one[name], rel=1e-3)
    advantages = [results[run]["advantages"].flatten() for run in ("several", "one-several")]
    torch.testing.assert_close(*advantages, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in TWO | ONE
        if n not in ("ddp", "lora") and not any(part in n for part in ("from", "bf16", "bits", "bound", "several"))
    ],
)
def test_every_setting_ends_at_the_same_weights(runs, start, name):
    """Settings change the number of rows of a UNet call and the layout of weights, and so the rounding of sums: in fp32
    latents of size 1 differ by 3e-5 after the steps, and advantages, which divide rewards by their spread, by as much.
    So do gradients, whose elements are 2e-3 in the mean: Adam's epsilon of 1e-4 makes of that 2e-3 * 3e-5 / 1e-4 = 6e-4
    of a step at most.
    """
    _, results = runs
    other = "lora" if "lora" in name else "ddp"
    torch.testing.assert_close(results[name]["trail"], results[other]["trail"], rtol=0, atol=2e-4)
    one, two = (results[run]["advantages"].flatten() for run in (name, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert results[name]["prompts"] == results[other]["prompts"] > 2
    assert apart(results, name, other, start) < 3e-3


@pytest.mark.parametrize(("family", "stage"), FAMILY_STAGES)
def test_sdxl_and_flow_matching_end_at_the_weights_of_one_process(runs, tiny_model, family, stage):
    """To the accuracy of the test above; what one of the processes wrote opens as a model with these weights."""
    folder, results = runs
    two, one = results[f"{family}-zero-{stage}"], results[f"{family}-one"]
    torch.testing.assert_close(two["trail"], one["trail"], rtol=0, atol=2e-4)
    torch.testing.assert_close(two["advantages"].flatten(), one["advantages"].flatten(), rtol=0, atol=1e-4)
    lora = OF_FAMILY[family]["use_lora"]
    begin, final = (
        DefaultDDPOStableDiffusionPipeline(str(path), use_lora=lora).unet.state_dict()
        for path in (tiny_model(family), folder / f"{family}-zero-{stage}" / "final")
    )
    # an adapter's second factor starts at 0, and its first one, which has no gradient yet, at random
    begin = {name: begin.get(name, torch.zeros_like(weight)) for name, weight in one["weights"].items()}
    moved = [name for name in begin if "lora_A" not in name]
    assert (
        relative_distance(*({name: some[name] for name in moved} for some in (two["weights"], one["weights"], begin)))
        < 3e-3
    )
    assert all(torch.equal(final[name], weight) for name, weight in two["weights"].items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_of_all_micro_batches_and_processes_are_averaged(runs, precision):
    """In bf16 the error is at most twice that of plain averages, and norms follow rounded weights. In fp32 a gradient's
    element is a sum of 40 products in each of 12 layers, and a product's rounding is 2^-24: in all 12 sqrt(40) 2^-24 =
    5e-6 of it.
    """
    folder, _ = runs
    found = torch.load(folder / "gradients" / "gradients.pt", weights_only=True)
    weights, norms = gradient_sums.exact(precision)
    begin = {name: p.detach() for name, p in gradient_sums.network().named_parameters()}
    far = {n: relative_distance(case["weights"], weights, begin) for n, case in found.items() if n.endswith(precision)}
    assert max(far.values()) < (1e-5 if precision == "no" else 2 * far["ddp-bf16"])
    for name in far:
        assert found[name]["norms"] == pytest.approx(norms, rel=1e-5 if precision == "no" else 2**-7), name


def test_from_stage_2_on_a_process_holds_its_part_of_the_gradients(runs):
    """Between micro-batches; DeepSpeed may not have freed its last message by then. Stage 3 holds its part always."""
    folder, _ = runs
    found = torch.load(folder / "gradients" / "gradients.pt", weights_only=True)
    message, tensors = 4 * gradient_sums.BUCKET, 4 * 4 * gradient_sums.WIDTH**2
    for name, case in found.items():
        new = case["predicted_held"] * ("zero-3" not in name)
        assert new <= case["held"] <= new + message * ("zero-2" in name), name
        assert case["peak"] <= new + case["predicted_peak"] + tensors, name
    assert found["zero-2-bf16"]["predicted_held"] == found["zero-1-bf16"]["predicted_held"] / 2


@pytest.mark.parametrize("name", ["bound-zero-2-offload", "bound-zero-3-offload"])
def test_zero_shortens_an_update_as_one_engine_does(runs, start, name):
    """All processes keep the same share, which they find from the pairs of all: to the accuracy of the test above."""
    folder, results = runs
    assert apart(results, name, "bound", start) < 3e-3
    shares = [metrics_of(folder / run, "update")[0]["update_share"] for run in ("bound", name)]
    assert shares[0] < 0.5
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    # the weights that the network computes with were shortened too, or the distance would not have changed
    assert metrics_of(folder / name, "update")[0]["update_distance"] < 1.25e-2


def test_stage_3_in_half_precision_is_as_good_as_without(runs, start):
    """bf16 has 8 significant bits: latents agree to 2 %, and weights are as near to those of fp32 as without ZeRO."""
    _, results = runs
    split, plain = results["zero-3-bf16"]["trail"], results["bf16"]["trail"]
    assert (split - plain).norm() < 0.02 * plain.norm()
    assert apart(results, "zero-3-bf16", "ddp", start) < 1.1 * apart(results, "bf16", "ddp", start)


def test_processes_draw_different_images(runs):
    folder, results = runs
    trail = results["ddp"]["trail"]
    first, second = trail.chunk(2)
    assert (first - second).flatten(1).norm(dim=1).min() > 1
    assert not torch.equal(*(torch.load(folder / "ddp" / f"states_{i}.pt")["torch"] for i in (0, 1)))


def test_processes_draw_different_prompts(runs):
    """The list has 27 of them, and an epoch 8 draws of each process: in none of the runs is a prompt drawn twice."""
    _, results = runs
    for name in TWO | RESUMED:
        drawn = results[name]["drawn"]
        assert len(drawn) == len(set(drawn)) == 16, name
    assert len({tuple(results[name]["drawn"]) for name in ("ddp", "ddp-from-zero-3")}) == 2, "each epoch has its own"


@pytest.mark.parametrize("name", OF_GROUPS)
def test_processes_draw_groups_again_as_often(runs, name):
    """One batch of four further images in each process, of which the first needs none."""
    folder, _ = runs
    (epoch,) = metrics_of(folder / name, "epoch")
    assert epoch["images"] == 16
    assert epoch["images_scored"] == 24
    assert epoch["image_spread"] > 0
    found = [json.loads((folder / name / f"{process}.json").read_text()) for process in (0, 1)]
    assert found[0]["prompts"] == ["cat 1"] * 4 + ["cat 2"] * 4
    assert found[1]["prompts"] == ["cat 3"] * 4 + ["cat 2"] * 4
    assert all(advantage != 0 for each in found for advantage in each["advantages"])


def test_torchs_linear_layer_is_restored(runs):
    """DeepSpeed's stage 3 replaces `torch.nn.functional.linear`, which would change the bits of later runs."""
    _, results = runs
    assert all(result["linear_is_torchs"] for result in results.values())


@pytest.mark.parametrize("name", ["zero-2", "zero-3", "bits-zero-2"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(runs, name):
    _, results = runs
    assert same_bits(results[name]["end"], results[f"{name}-again"]["end"])


@pytest.mark.parametrize(
    ("name", "whole"),
    [("zero-3-from-2", "zero-2"), ("ddp-from-zero-3", "zero-3"), ("zero-2-from-ddp", "zero-2")],
)
def test_a_checkpoint_is_resumed_with_another_stage(runs, start, name, whole):
    _, results = runs
    assert apart(results, name, whole, start, "end") < 3e-3


@pytest.mark.parametrize(("name", "was"), [("one-from-zero-2", "zero-2"), ("one-zero-3-from-ddp", "ddp")])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(runs, start, name, was):
    """It samples other images, but starts from the weights, moments and statistics of the checkpoint."""
    folder, results = runs
    assert 0 < apart(results, name, was, start) < 2
    assert [record["update"] for record in metrics_of(folder / name, "update")] == [1]
    training = torch.load(folder / name / "checkpoints" / "checkpoint_2" / "training.pt", weights_only=True)
    assert (training["engine"]["updates"], training["engine"]["step"]) == (2, 2)
    assert results[name]["prompts"] >= results[was]["prompts"]


@pytest.mark.parametrize("name", ["bound-zero-2-offload", "zero-3", "lora-zero-3"])
def test_one_process_writes_a_plain_model(runs, model_dir, name):
    folder, results = runs
    final = StableDiffusionPipeline.from_pretrained(folder / name / "final")
    weights = results[name]["end"]
    if name.startswith("lora"):
        final.load_lora_weights(folder / name / "final")
        assert final.get_active_adapters()
    else:
        assert all(torch.equal(p, weights[n]) for n, p in final.unet.named_parameters())
    files = {path.name for path in (folder / name / "checkpoints" / "checkpoint_1").iterdir()}
    assert {"random_0.pt", "random_1.pt", "state.json", "training.pt"} <= files
    kinds = [record["kind"] for record in metrics_of(folder / name)]
    assert kinds.count("epoch") == kinds.count("update") == TWO[name]["epochs"]
    assert (folder / name / "final_ema").exists() == (name == "zero-3")


# when one process stops

STOPS = """
import os, signal, sys, torch
torch.set_num_threads(1)
from tiny_run import build_trainer
from ddpo_fast.prompts import load_prompts
model, folder, how, zero = sys.argv[1:]
scored = []
def reward(images, prompts, metadata):
    scored.append(len(images))
    if len(scored) > 2 and os.environ["RANK"] == "1":
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no such picture")
    return images.mean((1, 2, 3)), {}
prompts = load_prompts("animals")
build_trainer(model, folder, reward=reward, prompts=prompts, zero=int(zero), sample_num_steps=2).train()
"""


@pytest.mark.parametrize(("how", "zero"), [("raise", 3), ("kill", 0)])
def test_all_stop_when_one_does(model_dir, tmp_path, how, zero):
    """One stops in the second epoch; the checkpoint of the first one is complete."""
    (tmp_path / "stops.py").write_text(STOPS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    stops = [*launcher, tmp_path / "stops.py", model_dir, tmp_path / "run", how, zero]
    done = finish(stops, status=None, env=environment())
    assert done.returncode != 0
    if how == "raise":
        # one process prints its traceback, and the other which process stopped and why
        assert "ValueError: no such picture" in done.stderr
        assert "process 1 stopped: RuntimeError: the reward function raised ValueError: no such" in done.stderr
    else:
        assert "SIGKILL" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_1" / "state.json").exists()


# the commands


def test_two_nodes_of_one_process_train_the_weights_of_one_node_of_two(runs, model_dir):
    """Started as on two machines, over loopback: the same bits, as the processes do the same work."""
    folder, results = runs
    cases = folder / "cases_nodes.json"
    cases.write_text(json.dumps({"nodes": TWO["ddp"]}))
    worker = [WORKER, model_dir, folder, cases]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int):
        place = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", "--master_addr=127.0.0.1"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *place, f"--master_port={port}"]
        return finish([*launcher, *worker], env=environment())

    with ThreadPoolExecutor(2) as machines:
        list(machines.map(start, (0, 1)))
    found = torch.load(folder / "nodes" / "result.pt", weights_only=True)
    assert same_bits(found["weights"], results["ddp"]["weights"])
    assert found["drawn"] == results["ddp"]["drawn"]


def test_the_deepspeed_command(model_dir, tmp_path):
    train = Path(__file__).parents[1] / "ddpo_fast" / "train.py"
    options = ["--full-finetune", "--zero", "2", "--offload", "optimizer", "--pretrained_model", model_dir]
    sizes = ["--num_epochs", "1", "--sample_num_steps", "2", "--output_dir", str(tmp_path / "run")]
    # beside the recipe of the command line
    sizes += ["--sample_batch_size", "8", "--sample_num_batches_per_epoch", "1"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    done = finish([*launcher, str(train), *options, *sizes], env=environment())
    assert "16 images per epoch (1 batches of 8 x 2 processes)" in done.stdout
    assert "train_target_update=0.5 (recipe: 0.1)" in done.stdout, "with 2 steps in place of 50"
    assert "ninja" not in done.stdout + done.stderr, "something was compiled"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_processes"] == 2
    StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final")


def test_deepspeed_on_one_process_with_its_own_file(make_trainer, tmp_path, monkeypatch):
    """The file names the optimizer and the offloading, and leaves the rest to 'auto'."""
    # DeepSpeed sets this variable: monkeypatch restores it only if it has set it before
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    settings = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    trainer = make_trainer(deepspeed=str(tmp_path / "ds.json"), mixed_precision="bf16")
    trainer.train()
    assert trainer.engine.stage == 2
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert trainer.engine.updates == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "no ZeRO stage of 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16 enabled=True, but mixed_precision is"),
        ([1], "not a JSON object"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, settings, message):
    path = tmp_path / "ds.json"
    if settings is not None:
        path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        zero_settings(DDPOConfig(deepspeed=str(path)), "no")


def test_fp16_on_a_cpu_is_refused_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="DeepSpeed does not have on a CPU: use 'bf16' or 'no'"):
        zero_settings(DDPOConfig(zero=2), "fp16")
