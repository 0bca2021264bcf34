"""The trained model with its card, as a folder that diffusers loads, on disk or on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, constants, errors, get_token, whoami
from huggingface_hub.utils import validate_repo_id

from ddpo_fast.families import Family, family_of_pipeline
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import files
from ddpo_fast.tiny_sd import MODELS

TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ family }} {{ "(" ~ base ~ ") " if base else "" }}fine-tuned with reinforcement learning
([DDPO](https://arxiv.org/abs/2305.13301)) by `ddpo_fast`{{ ": " ~ what if what else "" }}.

```python
from diffusers import {{ pipeline }}

pipeline = {{ pipeline }}.from_pretrained({{ path }}{{ absent }})
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
    "train_learning_rate",
    "train_clip_range",
    "train_num_inner_epochs",
    "mixed_precision",
    "seed",
)


def make_model_card(
    model_name: str,
    family: Family,
    base: str | None,
    lora: bool,
    tags: set[str],
    dataset_name: str | None = None,
    path: str | None = None,
    settings: dict[str, Any] | None = None,
) -> ModelCard:
    """A card that says where the model comes from, what it was trained for and how to open it.

    Args:
        path: the argument of `from_pretrained` in the card's example (default: the name).
        settings: names and values for the card's table.
    """
    network = "UNet" if family.network == "unet" else family.network
    data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        datasets=[dataset_name] if dataset_name else None,
        pipeline_tag="text-to-image",
        tags=sorted(tags | ({"lora"} if lora else set())),
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        family=family.name,
        pipeline=family.pipelines[0],
        base=base,
        lora=lora,
        what="a LoRA adapter" if lora else f"all weights of the {network}",
        path=json.dumps(path or model_name, ensure_ascii=False),
        # diffusers looks for every part of the class's constructor
        absent="".join(f", {part}=None" for part in family.optional if family.pipe_part(part) is None),
        settings={name: _in_table(value) for name, value in (settings or {}).items()},
    )


def _in_table(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def push_problem(name: str) -> str:
    """Why a model cannot be pushed to the Hub as `name`, in one sentence, or ''; to be asked before training."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        return f"the Hub takes no repository of the name {name!r} ({error}): choose another output_dir"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out"
    if not get_token():
        return "nobody is logged in: run `hf auth login` or set HF_TOKEN, or leave push_to_hub out"
    try:
        whoami()
    except (OSError, errors.HTTPError) as error:
        return f"the Hub does not answer ({str(error).splitlines()[0]}): log in anew, or leave push_to_hub out"
    return ""


class HubModel(PyTorchModelHubMixin):
    """The part of the trainer that saves and uploads: `save_model`, `save_pretrained`, `push_to_hub`, the model card.

    Every process calls these methods, and the main one writes. If the run keeps a moving average of the weights,
    `save_model` writes that too, into a second folder named `<folder>_ema`.
    """

    _tag_names = ["ddpo_fast", "ddpo"]

    sd_pipeline: Any
    accelerator: Any
    engine: Any
    output_dir: Path
    progress: Any
    run_log: Any
    run_settings: dict[str, Any]
    config: Any
    reward_fn: Any
    prompt_fn: Any
    _pushed_to: str | None = None

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
            try:
                self.sd_pipeline.save_pretrained(str(folder))
                self.create_model_card(folder=folder)
                files.follow_umask(folder)
            except Exception as error:
                if not (reason := files.why_unwritten(error)):
                    raise
                raise OSError(
                    f"the model could not be written to {folder}: {reason}; make room there, then go on with "
                    f"--resume_from {self.output_dir} to write it (the run's checkpoints are as they were)"
                ) from error
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
        name, path = self._card_name(folder)
        card = make_model_card(
            model_name or name,
            family_of_pipeline(self.sd_pipeline),
            # a path on this machine, or a bundled model's name, is no model of the Hub
            None if base is None or base in MODELS or Path(base).expanduser().exists() else base,
            bool(getattr(self.sd_pipeline, "use_lora", False)),
            {*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            dataset_name,
            model_name or path,
            self._card_settings(),
        )
        card.save(folder / "README.md")

    def _card_name(self, folder: Path) -> tuple[str, str]:
        """The model's name, and the argument of `from_pretrained`: a repository of the Hub, or the path of `folder`."""
        if self._pushed_to:
            # Without an owner in the name the Hub takes the user's. The mixin writes the model into a temporary folder
            # <owner>/<name>, from which the owner is known.
            repo = self._pushed_to if "/" in self._pushed_to else f"{folder.parent.name}/{self._pushed_to}"
            return repo, repo
        here, run = folder.absolute(), self.output_dir.absolute()
        near = here.is_relative_to(Path.cwd())
        return run.name if here.parent == run else here.name, str(here.relative_to(Path.cwd()) if near else here)

    def _card_settings(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for name, function in (("reward", self.reward_fn), ("prompts", self.prompt_fn)):
            used = self.run_settings.get(name) or getattr(function, "__name__", type(function).__name__)
            # a path on this machine means nothing to a reader
            known[name] = Path(str(used)).name
        known |= {
            key: value for key, value in self.run_settings.items() if key.startswith("lora_r") or key == "lora_alpha"
        }
        known["epochs trained"] = self._trained_epochs()
        values = {name: getattr(self.config, name, None) for name in CARD_SETTINGS}
        return known | {name: value for name, value in values.items() if value not in (None, "")}

    def _trained_epochs(self) -> str:
        """The whole epochs of the weights that are saved, and whether these are the best ones."""
        epochs, scores = self.progress.epochs, self.progress.scores
        if scores.best() != epochs:
            return str(epochs)
        return f"{epochs} (the best {scores.kind}, {scores.score(epochs):.4g})"

    def push_to_hub(self, repo_id: str | None = None, *, dataset_name: str | None = None, **kwargs: Any) -> str:
        """Uploads the model with its card and returns the address; the repository defaults to the folder's name."""
        if not self.accelerator.is_main_process:
            # the main process saves the model within the upload, which is a collective call
            self._save_pretrained(self.output_dir)
            return broadcast_from_main(self.accelerator, "")
        self._pushed_to = repo_id or self.output_dir.absolute().name
        try:
            url = super().push_to_hub(self._pushed_to, **kwargs)
        finally:
            self._pushed_to = None
        return broadcast_from_main(self.accelerator, str(url))
