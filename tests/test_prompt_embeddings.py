"""The trainer's embeddings of prompts equal those of the diffusers pipeline."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_run import build_pipeline

from ddpo_fast.families import Flux, StableDiffusion
from ddpo_fast.prompt_embeddings import PromptEmbeddings

PROMPTS = ["a <toy> on a table", "a cat"]


@pytest.fixture
def pipe():
    pipe = build_pipeline()
    pipe.text_encoder.requires_grad_(False)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    return pipe


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_equal_those_of_diffusers(pipe, remembers, masked):
    """Also with a textual inversion, whose one token becomes several, and an encoder that needs the attention mask."""
    pipe.text_encoder.config.use_attention_mask = masked
    embed = PromptEmbeddings(StableDiffusion(pipe), torch.device("cpu"), remembers)
    assert embed.remembers == remembers
    for _ in range(2):
        ids, embeddings = embed(PROMPTS)
        theirs, negative = pipe.encode_prompt(PROMPTS[1], "cpu", 1, True, negative_prompt=PROMPTS[0])
        # the encoder is called with another number of rows: a few roundings of values near 1
        torch.testing.assert_close(embeddings, torch.cat([negative, theirs]), rtol=0, atol=1e-5)
    tokens = pipe.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert tokens[2:5] == ["<toy>", "<toy>_1", "<toy>_2"]


def test_the_ids_of_a_textual_inversion_are_those_that_flux_reads():
    pipe = tiny_models.flux()
    vectors = torch.randn(3, tiny_models.CLIP, generator=torch.Generator().manual_seed(1))
    pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>", text_encoder=pipe.text_encoder)
    read = []
    pipe.text_encoder.register_forward_pre_hook(lambda encoder, inputs: read.append(inputs[0]))
    ids, _ = Flux(pipe).encode(PROMPTS, torch.device("cpu"))
    assert torch.equal(ids, read[0])
    assert pipe.tokenizer.convert_ids_to_tokens(ids[0].tolist())[2:5] == ["<toy>", "<toy>_1", "<toy>_2"]
