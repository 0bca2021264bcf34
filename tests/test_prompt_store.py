"""`embed_prompts_once`: embeddings on disk, text encoders that are needed once, and the same numbers as without."""

from __future__ import annotations

import torch
from safetensors import safe_open
from tiny_run import build_pipeline, build_trainer

from ddpo_fast.prompt_embeddings import PromptEmbeddings
from ddpo_fast.prompt_store import PromptStore, key_of
from ddpo_fast.prompts import ListPrompts

PROMPTS = ["a cat", "a dog", "a horse"]
SETTINGS = {"embed_prompts_once": True, "sample_num_steps": 2, "use_lora": True, "num_epochs": 1}


def count_calls(trainer) -> list[int]:
    calls: list[int] = []
    trainer.sd_pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def stored_prompts(folder) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.add(file.metadata()["prompt"])
    return found


def test_prompts_of_a_list_are_embedded_before_training(model_dir, tmp_path):
    trainer = build_trainer(model_dir, tmp_path / "run", prompts=ListPrompts(PROMPTS), **SETTINGS)
    calls = count_calls(trainer)
    assert stored_prompts(tmp_path / "run" / "prompt_embeddings") == {"", *PROMPTS}
    trainer.train()
    trainer.evaluate(("a cat",), ({},))
    assert calls == []
    # a resumed run finds all of a long list, and brings none of them to the device before it is drawn
    again = PromptEmbeddings(trainer.policy.family, torch.device("cpu"), True, trainer.policy.embed_prompts.store)
    again.embed_all(PROMPTS)
    assert (calls, again.kept_bytes) == ([], 0)


def test_other_prompts_are_embedded_when_they_are_drawn_and_only_once(model_dir, tmp_path):
    numbers = iter(range(100))
    trainer = build_trainer(model_dir, tmp_path / "run", prompts=lambda: (f"{next(numbers) % 2} bees", {}), **SETTINGS)
    folder = tmp_path / "run" / "prompt_embeddings"
    assert stored_prompts(folder) == {""}
    calls = count_calls(trainer)
    trainer.train()
    assert stored_prompts(folder) == {"", "0 bees", "1 bees"}
    assert calls == [1]


def test_a_run_has_the_bits_of_one_that_keeps_its_encoders(tmp_path):
    """Also where they are stored in another precision than the run's."""
    build_pipeline(widths=(8, 16)).to(torch.float16).save_pretrained(tmp_path / "half")
    weights = []
    for once in (True, False):
        trainer = build_trainer(
            tmp_path / "half",
            tmp_path / str(once),
            prompts=ListPrompts(PROMPTS),
            **{**SETTINGS, "embed_prompts_once": once},
        )
        trainer.train()
        weights.append([p.detach() for p in trainer.sd_pipeline.unet.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_file_that_is_damaged_is_no_embedding(tmp_path):
    store = PromptStore(tmp_path, "key")
    store.write("a cat", torch.arange(3), torch.ones(2, 4))
    ids, embeds = store.read("a cat", torch.device("cpu"))
    assert torch.equal(ids, torch.arange(3))
    assert torch.equal(embeds, torch.ones(2, 4))
    assert PromptStore(tmp_path, "other").read("a cat", torch.device("cpu")) is None
    store.path("a cat").write_bytes(b"short")
    assert store.read("a cat", torch.device("cpu")) is None


def test_another_encoder_or_precision_has_another_key():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert len({key_of([one], "no"), key_of([other], "no"), key_of([one], "bf16"), key_of([one, other], "no")}) == 4
