"""Models in one `.safetensors` file, in the layout in which Stable Diffusion 1.x, 2.x and XL were first published.

Such a file holds weights only. What they mean, the configs and the tokenizers, is read from a diffusers folder of the
same kind of model, whose weights are not needed. The kind is told from the names of the file's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ddpo_fast.families import SDXL, Family, StableDiffusion
from ddpo_fast.families.stable_diffusion import CHANNELS
from ddpo_fast.safetensors_header import dtype_of, read_header

# the beginnings of the names of the parts' tensors
UNET, VAE, TEXTS = "model.diffusion_model.", "first_stage_model.", ("cond_stage_model.", "conditioner.embedders.")
CONV_IN, VAE_IN = f"{UNET}input_blocks.0.0.weight", f"{VAE}decoder.conv_in.weight"
# the title of a kind of model, and the embedding of positions that only its text encoder has
KINDS = {
    "Stable Diffusion XL": "conditioner.embedders.1.model.positional_embedding",
    "Stable Diffusion 2.x": "cond_stage_model.model.positional_embedding",
    "Stable Diffusion 1.x": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
}
# parts of names that only tensors of files for other uses have
OTHERS = {
    "conditioner.embedders.0.model.": "a refiner of Stable Diffusion XL",
    "edm_mean": "a model with EDM's noise levels",
    "joint_blocks.": "a Stable Diffusion 3",
    "double_blocks.": "a FLUX",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA",
    "down_blocks.": "one part of a pipeline in diffusers' layout",
}
# where the configs of a kind are. Files of Stable Diffusion 2.x do not say whether they predict the noise or v, so that
# their configs have to be named.
PUBLISHED = {
    "Stable Diffusion 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
}
# the files of a diffusers folder that are not weights
CONFIGS = ("*.json", "*.txt", "*.model")


class SingleFile:
    """A model's file, of which the names and shapes of the tensors have been read.

    Raises `ValueError` with the end of a sentence for one that cannot be trained, `OSError` for one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"it is a {path.suffix or 'nameless'} file, and no pickle is read, as that can run code: give a "
                "diffusers folder, a Hub id or a .safetensors file"
            )
        self.path = path
        self.tensors = {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}
        self.kind = self._kind()

    @property
    def family(self) -> type[Family]:
        return SDXL if self.kind == SDXL.title else StableDiffusion

    def _kind(self) -> str:
        for part, what in OTHERS.items():
            if any(part in name.removeprefix(UNET) for name in self.tensors):
                raise ValueError(f"it is {what}: give a file of Stable Diffusion 1.x, 2.x or XL, or a diffusers folder")
        for what, wanted in (("UNet", CONV_IN), ("VAE", VAE_IN), ("text encoder", tuple(KINDS.values()))):
            if not any(name in self.tensors for name in ((wanted,) if isinstance(wanted, str) else wanted)):
                raise ValueError(
                    f"it has no {what} in the layout of Stable Diffusion 1.x, 2.x or XL: give a whole model's file, or "
                    "a diffusers folder"
                )
        taken, given = self._shape(CONV_IN)[1], self._shape(f"{UNET}out.2.weight")[0]
        if taken != given:
            kind = f", as one for {CHANNELS[taken]} does" if taken in CHANNELS else ""
            raise ValueError(f"its UNet takes {taken} channels and gives {given}{kind}: give a text-to-image model")
        return next(kind for kind, name in KINDS.items() if name in self.tensors)

    def _shape(self, name: str) -> list[int]:
        if name not in self.tensors:
            raise ValueError(f"it has no {name}: copy the file again")
        return self.tensors[name]["shape"]

    def configs(self, given: str = "") -> Path:
        """The diffusers folder with the configs: the `given` one or Hub id, else beside the file, else the Hub's cache.

        Raises `ValueError` if there is none.
        """
        if given:
            folder = Path(given).expanduser()
            if (folder / "model_index.json").is_file():
                return folder
            if folder.exists() or given.startswith(("/", "./", "../", "~")):
                raise ValueError(f"single_file_config is {given!r}, which is no diffusers folder with model_index.json")
            return self._from_hub(given)
        for folder in (self.path.with_suffix(""), self.path.parent):
            if (folder / "model_index.json").is_file():
                return folder
        if self.kind not in PUBLISHED:
            raise ValueError(
                f"it is a {self.kind}, whose file does not say what its UNet predicts: name a diffusers folder with "
                "its configs with --single_file_config"
            )
        return self._from_hub(PUBLISHED[self.kind])

    def _from_hub(self, name: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=[*CONFIGS, *(f"*/{pattern}" for pattern in CONFIGS)]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"it is a {self.kind} and has no configs of its own, and those of {name!r} are neither in the cache "
                f"nor can be fetched ({type(error).__name__}): give a diffusers folder of this kind with "
                "--single_file_config; its weights are not read"
            ) from None

    def check_fits(self, family: type[Family], parts: Mapping[str, Mapping[str, Any]], scheduler: Any) -> None:
        """Raises `ValueError` unless the tensors have the shapes that the configs of `parts` say."""
        if family is not self.family:
            raise ValueError(f"the file is a {self.kind}, and these are configs of a {family.title}")
        widths = [entry["shape"][1] for name, entry in self.tensors.items() if name.endswith("attn2.to_k.weight")]
        sizes = {
            "unet's in_channels": (parts["unet"]["in_channels"], self._shape(CONV_IN)[1]),
            "unet's block_out_channels": (parts["unet"]["block_out_channels"][0], self._shape(CONV_IN)[0]),
            "unet's cross_attention_dim": (parts["unet"]["cross_attention_dim"], widths[0] if widths else None),
            "vae's latent_channels": (parts["vae"]["latent_channels"], self._shape(VAE_IN)[1]),
        }
        encoder = "text_encoder_2" if family is SDXL else "text_encoder"
        sizes[f"{encoder}'s hidden_size"] = parts[encoder]["hidden_size"], self._shape(KINDS[self.kind])[-1]
        for what, (config, file) in sizes.items():
            if config != file:
                raise ValueError(f"the {what} is {config} in the configs and {file} in the file")
        predicts = getattr(scheduler.config, "prediction_type", "epsilon")
        if "v_pred" in self.tensors and predicts != "v_prediction":
            raise ValueError(f"the file says that its UNet predicts v, and the scheduler's config {predicts!r}")
        if "ztsnr" in self.tensors and not scheduler.config.rescale_betas_zero_snr:
            raise ValueError(
                "the file says that its noise has zero terminal SNR, which needs rescale_betas_zero_snr in the "
                "scheduler's config"
            )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision that holds all numbers of the parts."""
        return dtype_of(entry for name, entry in self.tensors.items() if name.startswith((UNET, VAE, *TEXTS)))


def file_of(name: str) -> Path | None:
    """The file that `pretrained_model` names, or None if it names none."""
    path = Path(name).expanduser() if name else None
    return path if path is not None and path.is_file() else None
