"""The README.md that goes with a trained model."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

Stable Diffusion {{ "(" ~ base ~ ") " if base else "" }}fine-tuned with reinforcement learning
([DDPO](https://arxiv.org/abs/2305.13301)) by `ddpo_fast`{{ ": " ~ what if what else "" }}.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{{ model_name }}")
{%- if lora %}
pipeline.load_lora_weights("{{ model_name }}")
{%- endif %}
image = pipeline("a photo").images[0]
```

```bibtex
@inproceedings{black2024training,
    title     = {Training Diffusion Models with Reinforcement Learning},
    author    = {Kevin Black and Michael Janner and Yilun Du and Ilya Kostrikov and Sergey Levine},
    booktitle = {International Conference on Learning Representations},
    year      = 2024
}
```
"""


def make_model_card(
    model_name: str, base: str | None, lora: bool, tags: set[str], dataset_name: str | None = None
) -> ModelCard:
    """A card that says where the model comes from and how to open it."""
    data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        datasets=[dataset_name] if dataset_name else None,
        pipeline_tag="text-to-image",
        tags=sorted(tags | ({"lora"} if lora else set())),
    )
    what = "a LoRA adapter" if lora else "all weights of the UNet"
    return ModelCard.from_template(data, template_str=TEMPLATE, model_name=model_name, base=base, lora=lora, what=what)
