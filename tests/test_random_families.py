"""The random pipelines of bench/lib/random_families.py have the sizes of those published."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from lib import random_families


@pytest.mark.parametrize(
    ("name", "network", "weights", "text_encoders"),
    [
        # weights in thousand millions, as published
        ("sdxl", "unet", 2.567, 0.818),
        ("sd3.5-medium", "transformer", 2.243, 5.581),
        ("flux.1-dev", "transformer", 11.901, 4.885),
    ],
)
def test_they_have_the_published_sizes(name, network, weights, text_encoders):
    pipeline = random_families.make(name, "meta")
    sizes = {
        part: sum(p.numel() for p in module.parameters()) / 1e9
        for part, module in pipeline.components.items()
        if hasattr(module, "parameters")
    }
    assert sizes[network] == pytest.approx(weights, abs=1e-3)
    assert sum(size for part, size in sizes.items() if part.startswith("text")) == pytest.approx(
        text_encoders, abs=1e-3
    )


def test_configs_are_written_without_weights(tmp_path):
    folder = random_families.save_configs("sdxl", tmp_path / "sdxl")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "unet/config.json", "text_encoder_2/config.json", "vae/config.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
