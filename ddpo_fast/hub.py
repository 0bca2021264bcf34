"""The trained model as others get it: a folder for plain diffusers with its card, on disk or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin

from ddpo_fast import files
from ddpo_fast.processes import the_main_one

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


class HubModel(PyTorchModelHubMixin):
    """The part of TRL's trainer that saves and shares: `save_model`, `save_pretrained`, `push_to_hub`, the card.

    Every process calls them, and the main one writes. A moving average goes into a folder of its own, `..._ema`.
    """

    _tag_names = ["ddpo_fast", "ddpo"]

    sd_pipeline: Any
    accelerator: Any
    engine: Any
    output_dir: Path
    run_log: Any
    run_settings: dict[str, Any]

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Writes the model and its card to `output_dir` (default: `final` in the run's folder), for plain diffusers."""
        folder = Path(output_dir) if output_dir else self.output_dir / "final"
        self._save_pretrained(folder)
        if self.engine.ema is not None:
            with self.engine.averaged():
                self._write(folder.with_name(f"{folder.name}_ema"))

    def _save_pretrained(self, save_directory: str | os.PathLike) -> None:
        with self.engine.exact():
            self._write(Path(save_directory))

    def _write(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(str(folder))
            self.create_model_card(folder=folder)
            files.follow_umask(folder)
            if folder.absolute() == self.output_dir.absolute():
                self.run_log.write_config(self.run_settings)
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        """Writes README.md into `folder` (default: the run's folder)."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(folder or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        base = getattr(self.sd_pipeline, "pretrained_model", None)
        card = make_model_card(
            model_name or folder.absolute().name,
            # a path on this machine means nothing to a reader
            base if base and not Path(base).exists() else None,
            bool(getattr(self.sd_pipeline, "use_lora", False)),
            {*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            dataset_name,
        )
        card.save(folder / "README.md")

    def push_to_hub(self, repo_id: str | None = None, *, dataset_name: str | None = None, **kwargs: Any) -> str:
        """Uploads the model with its card; the repository's name defaults to the run folder's."""
        if not self.accelerator.is_main_process:
            # what the main process does for the upload, and what it waits for
            self._save_pretrained(self.output_dir)
            return the_main_one(self.accelerator, "")
        url = super().push_to_hub(repo_id or self.output_dir.absolute().name, **kwargs)
        return the_main_one(self.accelerator, str(url))
