"""Epochs of images of several sizes in turn: what the network is given, what is compared, and a resumed run."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from compare_runs import as_bytes, metrics_of, same_bits, trained_weights
from one_sentence import refused
from recorded_run import epoch_records, write_run
from rounding import drift_limits
from tiny_run import Prompts, brightness

from ddpo_fast import DDPOConfig, DefaultDDPOStableDiffusionPipeline
from ddpo_fast.advantages import PerPromptStatTracker
from ddpo_fast.by_size import BySize
from ddpo_fast.commands import plan, settings_file
from ddpo_fast.commands.options import plan_parser, train_parser
from ddpo_fast.model_configs import check_model
from ddpo_fast.report import curves, overview, remarks
from ddpo_fast.report.run_records import read
from ddpo_fast.rewards import SeveralRewards, load
from ddpo_fast.run_folder.model_card import curve_sentence
from ddpo_fast.run_folder.pictures import reward_curves

SIZES = ["16x16", "16x24", "24x16"]
RUN = {
    "sizes": SIZES,
    "num_epochs": 3,
    "sample_num_steps": 3,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 1,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 1,
    "train_micro_batch_size": 4,
}


def kilobytes(images, prompts, metadata):
    return load("jpeg_compressibility")(images, prompts, metadata)


def tensors_of(value) -> dict[str, torch.Tensor]:
    """The tensors in the arguments of a call, by place or name."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return {f"{name}/{inner}": one for name, part in pairs for inner, one in tensors_of(part).items()}


def calls_of(network, run) -> list[dict[str, torch.Tensor]]:
    """The tensors that each call of a network was given in a run."""
    calls = []
    handle = network.register_forward_pre_hook(
        lambda module, arguments, keywords: calls.append(tensors_of((*arguments, keywords))), with_kwargs=True
    )
    run()
    handle.remove()
    return calls


def negatives_apart(pipeline) -> float:
    """How far SD3's pooled embedding of the negative prompt may be from plain diffusers'.

    It is encoded once, as in TRL, and by diffusers once for each image. A product of one row adds up in another order
    than one of several: each element is a sum of W products, of a row of norm sqrt(W), which layer norm gives, with the
    projection's. Each of the two sums is rounded by at most W 2^-24 of the sum of its products' sizes.
    """
    projections = [encoder.text_projection for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    return max(
        2 * layer.in_features * 2**-24 * layer.in_features**0.5 * layer.weight.norm(dim=1).max().item()
        for layer in projections
    )


@pytest.mark.parametrize(
    ("model", "use_lora"), [("sd", False), ("sd", True), ("sdxl", True), ("sd35", True), ("flux_dev", True)]
)
def test_each_size_has_the_inputs_of_plain_diffusers_and_ratios_of_1(make_trainer, tiny_model, model, use_lora):
    """The first call's inputs and all timesteps to the bit, but for `negatives_apart`. Other images of other sizes are
    drawn before the updates, and change nothing: FLUX's noise levels follow the size."""
    shapes = []

    def reward(images, prompts, metadata):
        shapes.append(tuple(images.shape[2:]))
        return kilobytes(images, prompts, metadata)

    # encoded two at a time, as plain diffusers does: a text's bits may depend on the others of its batch
    names = itertools.cycle(["a cat", "a dog"])
    folder = None if model == "sd" else tiny_model(model)
    settings = {
        **RUN,
        "prompts": lambda: (next(names), {}),
        "fuse_unet": False,
        "sample_cache": False,
        "sample_freq": 2,
        "sample_num_images": 2,
    }
    # else the first call of the network measures its memory
    settings["sample_merge_batches"] = 1
    trainer = make_trainer(model=folder, use_lora=use_lora, reward=reward, **settings)
    plain, limits = trainer.sd_pipeline.sd_pipeline, drift_limits(trainer)
    generate, pending = trainer._generate_samples, [(16, 16), (16, 24), (24, 16)]

    def generate_and_compare(*args, **kwargs):
        made = []
        ours = calls_of(trainer.sd_pipeline.unet, lambda: made.append(generate(*args, **kwargs)))
        [sample] = made[0][0]
        height, width = pending.pop(0)
        assert sample.trail.shape[-2:] == (height // 2, width // 2)
        given = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}
        given |= {"guidance_scale": trainer.config.sample_guidance_scale, "latents": sample.trail[:, 0].clone()}
        if model == "flux_dev":
            given["latents"] = plain._pack_latents(given["latents"], 2, 16, height // 2, width // 2)
        plain.set_progress_bar_config(disable=True)
        with torch.no_grad():
            theirs = calls_of(trainer.sd_pipeline.unet, lambda: plain(list(sample.prompts), **given))
        assert len(ours) >= len(theirs) == 3
        time = "1/" if "1/" in theirs[0] else "0/timestep/"
        for step, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            for name in other if step == 0 else [time]:
                # a timestep may be one number for all rows
                mine = one[name].expand_as(other[name])
                if name == "0/pooled_projections/" and model == "sd35":
                    assert (mine - other[name]).chunk(2)[0].abs().max() <= negatives_apart(plain)
                    mine, other[name] = (rows.chunk(2)[1] for rows in (mine, other[name]))
                assert torch.equal(mine, other[name]), name
        trainer.evaluate(("a cat",), ({},))
        return made[0]

    trainer._generate_samples = generate_and_compare
    before = trained_weights(trainer)
    trainer.train()
    assert not pending
    assert not same_bits(before, trained_weights(trainer))
    assert [record["size"] for record in metrics_of(trainer, "epoch")] == SIZES
    drifts = [update["ratio_drift"] for update in metrics_of(trainer, "update")]
    assert all(drift < limit for drift, limit in zip(drifts, limits, strict=True))
    # drawn at first, after two epochs and at the end, and what each epoch evaluates: of the first size
    first = (16, 16)
    assert shapes.count(first) == 3 + 3 + 1
    assert [shape for shape in shapes if shape != first] == [(16, 24), (24, 16)]


def test_one_of_the_sizes_alone_is_that_height_and_width(make_trainer, tmp_path):
    settings = {**RUN, "num_epochs": 1, "prompts": Prompts()}
    weights = []
    for more in ({"sizes": [(16, 24)]}, {"sizes": None, "height": 16, "width": 24}):
        trainer = make_trainer(**{**settings, **more, "prompts": Prompts()}, output_dir=tmp_path / str(len(weights)))
        trainer.train()
        weights.append(trained_weights(trainer))
    assert same_bits(*weights)


@pytest.mark.parametrize("model", ["sd", "flux_schnell"])
def test_a_run_resumed_in_the_middle_of_a_turn_ends_with_the_same_bits(make_trainer, tiny_model, tmp_path, model):
    settings = {**RUN, "num_epochs": 5, "train_guard": True}
    settings |= {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    settings |= {"sizes": SIZES[:2], "prompts": lambda: (random.choice(["a cat", "a dog"]), {})}
    settings |= {"use_lora": model != "sd", "model": None if model == "sd" else tiny_model(model)}

    def state(trainer):
        parts = trainer.stat_tracker, trainer.guard, trainer.reward_fn
        return as_bytes([part.state_dict() for part in parts])

    def made(folder, **more):
        return make_trainer(output_dir=tmp_path / folder, **{**settings, "reward": several(), **more})

    def several():
        return SeveralRewards({"kb": kilobytes, "bright": brightness}, {"kb": 1.0, "bright": 1.0})

    whole = made("whole")
    whole.train()
    made("cut").train(3)
    resumed = made("cut", resume_from=str(tmp_path / "cut"))
    resumed.train()
    assert [record["size"] for record in metrics_of(resumed, "epoch")] == [*SIZES[:2] * 2, SIZES[0]]
    assert same_bits(trained_weights(whole), trained_weights(resumed))
    assert state(whole) == state(resumed)
    # the best checkpoint is looked for among rewards of one size
    assert [epochs for epochs, _ in resumed.progress.scores.state_dict()] == [0, 2, 4]
    # the order of the sizes says which an epoch has
    with refused(ValueError, "sizes is .'16x24', '16x16'., but the run"):
        made("cut", resume_from=str(tmp_path / "cut"), sizes=SIZES[1::-1])


def test_states_of_one_size_are_packed_as_they_are():
    numbers = BySize(dict)
    numbers.now["sizes"] = [1.0]
    packed = numbers.packed(dict)
    assert packed == {"sizes": [1.0]}
    numbers.unpack(packed, dict)
    assert numbers.now == {"sizes": [1.0]}
    numbers.use("16x24")
    assert numbers.now == {}
    numbers.now["a"] = [2.0]
    other = BySize(dict)
    other.use("16x24")
    other.unpack(numbers.packed(dict), dict)
    assert other.now == {"a": [2.0]}
    other.use("8x8")
    assert other.now == {}


def test_statistics_of_a_prompt_are_of_one_size():
    both, alone = (PerPromptStatTracker(buffer_size=8, min_count=4) for _ in range(2))
    for size in ("16x16", "16x24"):
        both.use_size(size)
        both.update(["a cat"] * 4, [1000.0, 2.0, 3.0, 4.0] if size == "16x16" else [1.0, 2.0, 3.0, 4.0])
    expected = [alone.update(["a cat"] * 4, values) for values in ([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 6.0])]
    assert both.update(["a cat"] * 4, [2.0, 2.0, 5.0, 6.0]).tolist() == expected[1].tolist()
    assert both.get_stats() == alone.get_stats()


def test_spreads_of_several_rewards_are_of_one_size():
    several = SeveralRewards({"a": kilobytes, "b": kilobytes}, {"a": 1.0, "b": 0.0})
    for size, scale in (("16x16", 1.0), ("16x24", 100.0)):
        values = scale * torch.tensor([1.0, 3.0])
        several.use_size(size)
        several.observe({"a": values.numpy(), "b": values.numpy()})
        assert several.weighted({"a": values, "b": values}).tolist() == [-1, 1]


def test_the_guard_compares_epochs_of_one_size(make_trainer):
    trainer = make_trainer(**{**RUN, "train_guard": True})
    guard, (weight, *_) = trainer.guard, trainer.guard.parameters
    noise, sampled = 0.1 * torch.linspace(-1, 1, 8), []

    def epoch(size: str, reward: float, spread: float = 0.5) -> bool:
        sampled.append(weight.detach().clone())
        guard.use_size(size)
        goes_back = guard.watch(reward + noise, ["a cat"] * 8, torch.tensor(spread))
        if not goes_back:
            with torch.no_grad():
                weight.add_(1.0)
        return goes_back

    # the larger images have far smaller rewards, and differ more
    for reward in (0.0, 1.0, 1.1):
        assert not epoch("16x16", reward)
        assert not epoch("16x24", reward - 100, spread=5.0)
    assert guard.engine.rate.shrunk == 1
    assert epoch("16x16", 0.2)
    # the best of the small images are of the fifth epoch, and of the others of the sixth
    assert torch.equal(weight.detach(), sampled[4])
    # what the others had come to with later weights has been given up as well
    assert not epoch("16x24", -99.9, spread=5.0)
    assert not epoch("16x24", -99.9, spread=5.0)
    assert guard.returns == 1


def test_what_depends_on_all_sizes(make_trainer, tiny_model):
    config = DDPOConfig(sizes=SIZES)
    assert config.largest_size == (16, 24)
    assert DDPOConfig(height=16).largest_size == (16, None)
    trainer = make_trainer(**{**RUN, "train_clip_unit": "step", "train_clip_range": 0.5})
    assert trainer.policy.largest_latent_shape == (4, 8, 12)
    trainer._use_size_of(1)
    assert trainer.policy.latent_shape == (4, 8, 12)
    assert trainer.run_log.clip_range == trainer.run_log.health.clip_range == 0.5 / (4 * 8 * 12) ** 0.5
    trainer.run_log.health.variety(0, {"image_spread": 0.5})
    assert trainer.run_log.health.first_spreads == {"image_spread of 16x24": [0.5]}
    options = plan_parser().parse(["--pretrained_model", tiny_model("sdxl"), "--sizes", *SIZES])
    case = plan.Case(options, {"pretrained_model", "sizes"}, full=False)
    configs = check_model(tiny_model("sdxl"))
    footprint = plan.footprint_of(case.run, case.config, configs, False, None)
    assert footprint.latent_shape == (4, 8, 12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": ["16x20"]}, "sizes has 16x20, whose width is 20, which 8 does not divide"),
        ({"height": 16}, "sizes and height or width are both set"),
        ({"width": 16}, "sizes and height or width are both set"),
        ({"compile_unet": True}, "made for images of one size"),
        ({"cuda_graphs": True}, "made for images of one size"),
        ({"sizes": ["16x16", "8x16"], "train_pool_latents": 8}, "the model's latents have 4 x 8 pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make_trainer, tmp_path, settings, words):
    with refused(ValueError, words):
        make_trainer(**{**RUN, **settings})
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_takes_no_size_is_refused(make_trainer, model_dir):
    class Own(DefaultDDPOStableDiffusionPipeline):
        def __call__(
            self, prompt_embeds, negative_prompt_embeds, num_inference_steps, guidance_scale, eta, output_type
        ):
            raise NotImplementedError

    with refused(ValueError, "takes no argument height"):
        make_trainer(pipeline=Own(model_dir), **RUN)


def test_sizes_are_options(tmp_path):
    parser = train_parser()
    options = parser.parse(["--sizes", "64x64", "64x96"])
    assert options.sizes == ["64x64", "64x96"]
    assert parser.parse(["--sizes", "None"]).sizes is None
    file = tmp_path / "run.yaml"
    file.write_text(settings_file.entry("sizes", options.sizes), encoding="utf-8")
    assert parser.parse(settings_file.expanded([str(file)], parser)).sizes == ["64x64", "64x96"]
    assert plan._as_option("sizes", options.sizes) == ["--sizes", "64x64", "64x96"]


def test_reports_compare_within_a_size(tmp_path):
    """Epochs of the second size have rewards that are 10 lower: no fall, and lines of their own."""

    def rewards(epoch: int) -> float:
        return epoch / 10 - 10 * (epoch % 2)

    records = epoch_records(9, reward_mean=rewards)
    for record in records:
        if record["kind"] == "epoch":
            record["size"] = SIZES[record["epoch"] % 2]
    folder = write_run(tmp_path / "run", records, sizes=SIZES[:2])
    run = read(folder)
    assert "mean reward of images of 16x16 went from 0 to 0.8" in overview.sentence(run)
    assert overview.tiles(run)[0][1:] == ("0 → 0.8", "best 0.8, in epoch 9")
    assert not [remark for remark in remarks.remarks_on(run) if "reward has fallen" in remark.title.lower()]
    lines = [trace for trace in curves.reward_charts([run])[0]["data"] if "name" in trace]
    assert [trace["name"].rpartition(", ")[2] for trace in lines] == SIZES[:2]
    images = curves.reward_charts([run])[0]["xs"][-1]["images"]
    each = next(record["images"] for record in records if record["kind"] == "epoch")
    assert images == [each * epoch for epoch in (2, 4, 6, 8)]
    assert "of images of 16x16 was 0 in the first epoch and 0.8 in epoch 9" in curve_sentence(records)
    assert {"reward, 16x16", "reward, 16x24"} <= reward_curves(records).keys()
