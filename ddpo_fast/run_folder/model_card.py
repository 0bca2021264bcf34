"""The card of a trained model: what was trained, on what, how far it came, and how to open it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, errors, hf_hub_download

from ddpo_fast.families import Family
from ddpo_fast.run_folder import pictures, sample_files
from ddpo_fast.tiny_sd import MODELS

TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ family }} {{ "(" ~ base ~ ") " if base else "" }}fine-tuned with reinforcement learning
([DDPO](https://arxiv.org/abs/2305.13301)) by `ddpo_fast`{{ ": " ~ what if what else "" }}.
{%- if curve %}

{{ curve }}
{%- endif %}
{%- for name, alt in pictures.items() %}

![{{ alt }}]({{ name }})
{%- endfor %}

```python
from diffusers import {{ pipeline }}

pipeline = {{ pipeline }}.from_pretrained({{ opened }}{{ absent }})
{%- if lora %}
pipeline.load_lora_weights({{ path }})
{%- endif %}
image = pipeline("a photo").images[0]
```
{%- if settings %}

| setting | value |
|---|---|
{%- for name, value in settings.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- endif %}

## Licence

{{ licence }}

```bibtex
@inproceedings{black2024training,
    title     = {Training Diffusion Models with Reinforcement Learning},
    author    = {Kevin Black and Michael Janner and Yilun Du and Ilya Kostrikov and Sergey Levine},
    booktitle = {International Conference on Learning Representations},
    year      = 2024
}
```
"""

# the settings of a run that its model card lists
CARD_SETTINGS = (
    "num_epochs",
    "sample_num_steps",
    "sample_guidance_scale",
    "sample_eta",
    "negative_prompts",
    "height",
    "width",
    "sizes",
    "train_learning_rate",
    "train_clip_range",
    "train_num_inner_epochs",
    "mixed_precision",
    "seed",
)
# the pictures that lie beside a card, and what they show
CURVE, IMAGES = "rewards.png", "images.png"
SHOWN = {CURVE: "the mean reward in the course of training", IMAGES: "images from the same noise before and after"}
LICENCES = ("license", "license_name", "license_link")


def make_model_card(
    model_name: str,
    family: Family,
    base: str | None,
    lora: bool,
    tags: set[str],
    dataset_name: str | None = None,
    path: str | None = None,
    settings: dict[str, Any] | None = None,
    curve: str = "",
    shown: Sequence[str] = (),
    licence: dict[str, Any] | None = None,
    base_is_apart: bool = False,
) -> ModelCard:
    """A card that says where the model comes from, what it was trained for and how to open it.

    Args:
        path: the argument of `from_pretrained` in the card's example (default: the name).
        settings: names and values for the card's table.
        curve: a sentence about the reward before and after.
        shown: names of pictures that lie beside the card.
        licence: of the base model, as `licence_of` has it.
        base_is_apart: whether only a LoRA is at `path`, and the example opens `base` first.
    """
    network = "UNet" if family.network == "unet" else family.network
    data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        datasets=[dataset_name] if dataset_name else None,
        pipeline_tag="text-to-image",
        tags=sorted(tags | ({"lora"} if lora else set())),
        **(licence or {}),
    )
    where = json.dumps(path or model_name, ensure_ascii=False)
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        family=family.name,
        pipeline=family.pipelines[0],
        base=base,
        lora=lora,
        what="a LoRA adapter" if lora else f"all weights of the {network}",
        path=where,
        opened=json.dumps(base, ensure_ascii=False) if base_is_apart else where,
        # diffusers looks for every part of the class's constructor
        absent="".join(f", {part}=None" for part in family.optional if family.pipe_part(part) is None),
        settings={name: _in_table(value) for name, value in (settings or {}).items()},
        curve=curve,
        pictures={name: SHOWN[name] for name in shown},
        licence=_licence_sentence(licence or {}),
    )


def _licence_sentence(licence: dict[str, Any]) -> str:
    if not licence:
        return "The weights are under the licence of the base model, which its own card says."
    name = str(licence.get("license_name") or licence["license"])
    link = licence.get("license_link")
    return f"The weights are under the licence of the base model: {f'[{name}]({link})' if link else name}."


def _in_table(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def licence_of(base: str, asks_hub: bool = False) -> dict[str, Any]:
    """The licence in the card of a model, as the fields of a card's header, or nothing if it is not known.

    Args:
        base: a folder, a bundled model's name or a Hub id.
        asks_hub: whether the card may be fetched; else only a copy on this machine is read.
    """
    if base in MODELS:
        return {"license": "apache-2.0"}
    folder = Path(base).expanduser()
    try:
        path = folder / "README.md"
        if not folder.exists():
            path = Path(hf_hub_download(base, "README.md", local_files_only=not asks_hub))
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        found = {name: getattr(data, name, None) for name in LICENCES}
    # no card, no model of this name, no network; a header that is no YAML
    except (OSError, ValueError, errors.HfHubHTTPError, yaml.YAMLError):
        return {}
    return {name: value for name, value in found.items() if value} if found["license"] else {}


def curve_sentence(records: Sequence[dict[str, Any]]) -> str:
    """How the mean reward of an epoch changed, from metrics.jsonl's lines, or ''."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        return ""
    images = sum(record["images"] for record in epochs)
    # rewards of images of different sizes cannot be compared
    size = epochs[0].get("size", "")
    means = {at: record["reward_mean"] for at, record in enumerate(epochs, 1) if record.get("size", "") == size}
    last = max(means)
    return (
        f"The mean reward{f' of images of {size}' if size else ''} was {means[1]:.4g} in the first epoch and "
        f"{means[last]:.4g} in epoch {last}, after {images} images."
    )


def copy_pictures(run: Path, folder: Path) -> list[str]:
    """Puts the pictures of a run that a card shows into `folder`; returns their names."""
    folders = sample_files.folders_in(run)
    compared = run / "before_after.png"
    if len(folders) > 1:
        pictures.attempt(_draw_first_and_last, folders, folder / IMAGES)
    elif compared.exists():
        shutil.copyfile(compared, folder / IMAGES)
    if (run / CURVE).exists() and run.absolute() != folder.absolute():
        shutil.copyfile(run / CURVE, folder / CURVE)
    return [name for name in SHOWN if (folder / name).exists()]


def _draw_first_and_last(folders: Sequence[Path], path: Path) -> None:
    prompts, rows = sample_files.first_and_last(folders)
    pictures.draw_grid(prompts, rows, path)
