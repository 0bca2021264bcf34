"""A CLIP as rewards use it: its images, embeddings, files, and the rewards clip_score and pickscore."""

from __future__ import annotations

import json
import math

import pytest
import torch
from one_sentence import refused
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import IMAGE, LENGTH, Malicious, examples, write_clip, write_processor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from ddpo_fast.rewards import score
from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.rewards.clip_images import MEAN, STD, ImageFormat, read_image_format
from ddpo_fast.rewards.clip_score import ClipScore
from ddpo_fast.rewards.pickscore import PickScore

PROMPTS = ("a cat", "", "a red dog in the snow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def broken(tmp_path):
    """A folder of its own, to be damaged."""
    return write_clip(tmp_path / "clip")


# images

# Pillow rounds to 8 bits after each of its two passes. The second one carries on the first one's error of half a step,
# times the sum of the filter's absolute weights, which is at most 1.25, and adds half a step.
STEPS = 0.5 * 1.25 + 0.5
SIZES = [(1, 1), (32, 32), (24, 40), (100, 61), (1024, 1024), (40, 1000)]


@pytest.mark.parametrize("size", SIZES)
def test_images_are_those_of_the_published_processor(size):
    steps = (examples(1, max(size))[..., : size[0], : size[1]] * 255).round()
    picture = Image.fromarray(steps[0].permute(1, 2, 0).to(torch.uint8).numpy())
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    wanted = processor(picture, return_tensors="pt")["pixel_values"]
    actual = ImageFormat(IMAGE, IMAGE).pixels(steps / 255)
    assert actual.shape == wanted.shape
    errors = (actual - wanted).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    assert errors.max() < STEPS


@pytest.mark.parametrize("size", SIZES)
def test_padded_images_are_pillows_with_black_around(size):
    steps = (examples(1, max(size))[..., : size[0], : size[1]] * 255).round()
    picture = Image.fromarray(steps[0].permute(1, 2, 0).to(torch.uint8).numpy())
    scale = IMAGE / max(size)
    resized = picture.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (IMAGE, IMAGE))
    whole.paste(resized, ((IMAGE - resized.width) // 2, (IMAGE - resized.height) // 2))
    actual = ImageFormat(IMAGE, IMAGE, pads=True).pixels(steps / 255)[0]
    actual = actual * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    wanted = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(IMAGE, IMAGE, 3).permute(2, 0, 1)
    assert (actual * 255 - wanted).abs().max() < STEPS


@pytest.mark.parametrize(
    "written",
    [
        {"size": 36, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {
            "size": {"shortest_edge": 36},
            "crop_size": {"height": 32, "width": 32},
            "image_mean": [0.5] * 3,
            "image_std": [0.25] * 3,
        },
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_old_and_recent_files_of_processors(written, inside, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor": written} if inside else written))
    assert read_image_format(path) == ImageFormat(36, 32, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"do_center_crop": False}, "leaves out a step"),
        ({"resample": 2}, "another resizing filter"),
        ({"size": 24, "crop_size": 32}, "32 pixels out of 24"),
        ({"crop_size": {"height": 32, "width": 24}}, "not square"),
        ({"size": {"longest_edge": 32}}, "shortest_edge"),
        ({"image_mean": [0.5]}, "preprocessing of a CLIP"),
        ([], "preprocessing of a CLIP"),
    ],
)
def test_other_preprocessing_is_refused(written, words, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(written))
    with refused(ValueError, words):
        read_image_format(path)


# embeddings


def test_cosines_are_those_of_transformers(folder):
    images = examples(3)
    clip, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    # fp32 rounds each of the sums; in fp64 the same weights show by how much
    with torch.no_grad():
        inputs = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
        pixels = ImageFormat(IMAGE, IMAGE).pixels(images)
        wanted = clip.double()(**inputs, pixel_values=pixels.double()).logits_per_image.diag() / math.exp(4.6)
    actual = ClipNetwork(folder).cosines(images, PROMPTS)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def test_an_embedding_does_not_depend_on_the_others(folder):
    clip, images = ClipNetwork(folder, batch_size=2), examples(5)
    embeds = clip.image_embeds(images)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(embeds[3:4], ClipNetwork(folder, text=False).image_embeds(images[3:4]))
    prompts = ["a cat", "", "word " * 300, "a cat", "a cat"]
    texts = clip.text_embeds(prompts)
    assert torch.equal(texts[0], texts[4])
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(texts[row : row + 1], clip.text_embeds([prompt]))


def test_a_prompt_that_is_too_long_is_cut(folder):
    clip = ClipNetwork(folder)
    long, short = clip.text_embeds(["a cat " * 300, "a cat " * (LENGTH // 2 - 1)])
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_cpu(folder, dtype):
    wanted = ClipNetwork(folder).cosines(examples(3), PROMPTS)
    actual = ClipNetwork(folder, dtype=dtype).cosines(examples(3), PROMPTS)
    assert actual.dtype == torch.float32
    # a few roundings of numbers up to 1, each of at most half an epsilon, in each of four layers
    torch.testing.assert_close(actual, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_memory_is_that_of_the_weights(folder):
    for text in (True, False):
        clip = ClipNetwork(folder, text=text)
        parameters = clip.network.load().parameters()
        assert clip.memory_bytes(torch.float16) == 2 * sum(parameter.numel() for parameter in parameters)
    # the published config: 428 million weights, of which the image encoder has 304
    assert clip.memory_bytes(torch.float32) < ClipNetwork(folder).memory_bytes(torch.float32)


def test_nothing_outside_changes_at_the_first_call(folder):
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        result, _ = ClipScore(model=folder)(examples(2), PROMPTS[:2], ({}, {}))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert result.dtype == torch.float32
    assert not result.requires_grad


# rewards


def test_clip_score_is_a_hundred_cosines(folder):
    wanted = ClipNetwork(folder).cosines(examples(3), PROMPTS)
    rewards, info = ClipScore(model=folder)(examples(3), PROMPTS, ({},) * 3)
    torch.testing.assert_close(rewards, 100 * wanted)
    assert info == {}
    torch.testing.assert_close(ClipScore(model=folder, scale=2.5)(examples(3), PROMPTS, ())[0], 2.5 * wanted)


def test_pickscore_is_cosines_times_the_logit_scale(folder, tmp_path):
    weights, processor = write_clip(tmp_path / "weights", with_processor=False), write_processor(tmp_path / "other")
    rewards, _ = PickScore(model=str(weights), processor=str(processor))(examples(3), PROMPTS, ({},) * 3)
    torch.testing.assert_close(rewards, math.exp(4.6) * ClipNetwork(folder).cosines(examples(3), PROMPTS))
    # a folder with both needs no second one
    torch.testing.assert_close(PickScore(model=folder)(examples(3), PROMPTS, ({},) * 3)[0], rewards)


@pytest.mark.parametrize("size", [1, IMAGE, 1024])
def test_black_and_white_images_of_any_size(folder, size):
    images = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    rewards, _ = score(ClipScore(model=folder), images, ("", "word " * 300), ({}, {}))
    assert rewards.isfinite().all()
    assert rewards[0] != rewards[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_refused(folder, value):
    # the pixel is outside of the central square
    images = examples(2, 400)[..., :40, :]
    images[1, 0, 0, 0] = value
    rewards, _ = ClipScore(model=folder)(images, PROMPTS[:2], ({}, {}))
    assert rewards.isnan().tolist() == [False, True]
    with refused(ValueError, "returned nan for prompt ''"):
        score(ClipScore(model=folder), images, PROMPTS[:2], ({}, {}))


def test_images_of_another_type_are_refused(folder):
    for wrong in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8)):
        with refused(ValueError, "images are .* but must be"):
            ClipNetwork(folder).image_embeds(wrong)


# files


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "without config.json"),
        ("model.safetensors", "without model.safetensors or model.safetensors.index.json or pytorch_model.bin"),
        ("preprocessor_config.json", "without preprocessor_config.json or processor_config.json"),
        ("tokenizer.json", "without tokenizer.json or vocab.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_at_once(broken, missing, words):
    (broken / missing).unlink()
    with refused(ValueError, words, str(broken)):
        ClipScore(model=str(broken))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere", "no such folder"),
        ("", "no such folder"),
        (__file__, "is a file"),
    ],
)
def test_a_path_that_is_no_folder_is_refused_at_once(name, words):
    with refused(ValueError, words):
        ClipScore(model=name)


def test_a_hub_id_without_a_network():
    reward = ClipScore(model="nobody/nothing")
    with refused(ValueError, "model 'nobody/nothing' is no folder here", "hf download nobody/nothing"):
        reward(examples(1), ("",), ({},))


def test_another_kind_of_model_is_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with refused(ValueError, "its model_type is 'siglip'"):
        ClipScore(model=str(broken))


def test_a_processor_for_another_size_is_refused(broken):
    (broken / "preprocessor_config.json").write_text(json.dumps({"size": 64, "crop_size": 64}))
    with refused(ValueError, "takes images of 32 pixels", "makes 64"):
        ClipScore(model=str(broken))


def test_a_tokenizer_of_another_clip_is_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 700
    (broken / "config.json").write_text(json.dumps(config))
    with refused(ValueError, "token 788 of 789", "reads token 700 of 789"):
        ClipNetwork(str(broken)).text_embeds(["a cat"])


@pytest.mark.parametrize("change", ["missing", "of another shape", "superfluous"])
def test_weights_that_do_not_fit_the_config_are_refused(broken, change):
    weights = load_file(broken / "model.safetensors")
    last = weights.pop("visual_projection.weight")
    if change == "of another shape":
        weights["visual_projection.weight"] = last[:5].contiguous()
    elif change == "superfluous":
        weights |= {"visual_projection.weight": last, "visual_projection.weights": last.clone()}
    # positions, which files of old versions of transformers have
    weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(weights, broken / "model.safetensors")
    with refused(ValueError, "do not fit its config, such as visual_projection.weight"):
        ClipNetwork(str(broken)).image_embeds(examples(1))


def test_a_cut_file_is_refused(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with refused(ValueError, "cannot be read", "download it again"):
        ClipNetwork(str(broken)).image_embeds(examples(1))


def test_weights_in_a_pickle_of_tensors_are_read(broken, folder):
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    assert torch.equal(
        ClipNetwork(str(broken)).image_embeds(examples(2)), ClipNetwork(folder).image_embeds(examples(2))
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(broken, tmp_path, zipped):
    trace = tmp_path / "it ran"
    weights = {**load_file(broken / "model.safetensors"), "logit_scale": Malicious(trace)}
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with refused(ValueError, "could run code", "pytorch_model.bin"):
        ClipNetwork(str(broken)).image_embeds(examples(1))
    assert not trace.exists()
    torch.load(broken / "pytorch_model.bin", weights_only=False)
    assert trace.exists()


# weights in several files


@pytest.fixture
def sharded(broken):
    """The CLIP in several files with an index, as transformers writes a large one."""
    clip = CLIPModel.from_pretrained(broken)
    (broken / "model.safetensors").unlink()
    clip.save_pretrained(broken, max_shard_size="100KB")
    assert not (broken / "model.safetensors").exists()
    return broken


def test_weights_in_several_files_are_read(sharded, folder):
    images = examples(2)
    assert torch.equal(ClipNetwork(str(sharded)).image_embeds(images), ClipNetwork(folder).image_embeds(images))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "model-00001-of-00009.safetensors"}, "a folder without model-00001-of-00009.safetensors"),
        ({"a": "../model.safetensors"}, "is not the index of a network's files"),
        ({"a": ["model.safetensors"]}, "is not the index of a network's files"),
        ({}, "is not the index of a network's files"),
        ([], "is not the index of a network's files"),
    ],
)
def test_a_broken_index_is_refused_at_once(sharded, weight_map, words):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with refused(ValueError, words):
        ClipScore(model=str(sharded))


def test_a_file_that_an_index_does_not_list_is_missed(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    kept = min(index["weight_map"].values())
    index["weight_map"] = dict.fromkeys(index["weight_map"], kept)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(ValueError, "do not fit its config"):
        ClipNetwork(str(sharded)).image_embeds(examples(1))
