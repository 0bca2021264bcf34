from __future__ import annotations

import os

# before torch: on a shared machine two threads can take many times as long as one
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # before anyone imports triton: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_run import SETTINGS, Prompts, brightness, build_pipeline, forget_accelerate_state

from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    forget_accelerate_state()
    yield
    forget_accelerate_state()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """The random pipeline, saved."""
    folder = tmp_path_factory.mktemp("random_sd")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    """`make_trainer(use_lora=..., hook=..., reward=..., prompts=..., **settings)`."""

    def make(
        *, use_lora=False, hook=None, reward=brightness, prompts=None, pipeline=None, model=model_dir, **settings
    ) -> DDPOTrainer:
        config = DDPOConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), **settings})
        pipeline = pipeline or DefaultDDPOStableDiffusionPipeline(model, use_lora=use_lora)
        return DDPOTrainer(config, reward, prompts or Prompts(), pipeline, image_samples_hook=hook)

    return make


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh memory is full of NaN: an element that a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
