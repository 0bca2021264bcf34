"""A CLIP: embeddings of images and of prompts in one space, which several rewards are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from ddpo_fast.model_configs import first_line
from ddpo_fast.rewards.clip_images import ImageFormat, read_image_format
from ddpo_fast.rewards.network import Network, checked_batch_size, weight_bytes
from ddpo_fast.rewards.weight_files import fetch, fetch_weights, local_path, named_folder, read_weights

IMAGE_FORMATS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
# the CLIP that PickScore and HPS v2 were trained on
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# the end token of configs before transformers 4.31, which stands for the highest id
_OLD_END = 2


class ClipNetwork:
    """A CLIP in transformers' format, from a folder or the Hub, that is loaded at its first use.

    Shapes: B images or prompts, D the width of the common space.

    Args:
        model: folder or Hub id of the weights and the config, or `bundled` for the scorer of the bundled model.
        processor: folder or Hub id of the tokenizer and the image preprocessing (default: `model`).
        text: whether prompts are embedded too; without it the weights of the text encoder are dropped.
        device, dtype, offload: see `Network`.
        batch_size: images, or prompts, of one forward pass.
        option: what messages call `model`.

    Raises `ValueError` for a local folder that is not a CLIP or lacks files. What is on the Hub is looked at when it is
    first used.
    """

    def __init__(
        self,
        model: str,
        *,
        processor: str | None = None,
        text: bool = True,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        offload: bool = False,
        batch_size: int = 32,
        option: str = "model",
    ) -> None:
        self.model, self.text, self.option = named_folder(model), text, option
        self.processor = self.model if processor is None else named_folder(processor)
        self.processor_option = option if processor is None else "processor"
        self.batch_size = checked_batch_size(batch_size)
        self.network = Network(self._load, device, dtype, offload)
        self._check_files()

    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """Unit-length embeddings [B, D] in fp32 of images [B, 3, H, W] in [0, 1], on the images' device.

        An image with a pixel that is not finite has NaN. Raises `ValueError` for images of another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)} but must be [B, 3, H, W] in [0, 1]"
            )
        with self.network.on(images.device) as (clip, device, dtype):
            embeds = [self._embed_images(clip, part.to(device), dtype) for part in images.split(self.batch_size)]
            return torch.cat(embeds).to(images.device)

    def text_embeds(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """Unit-length embeddings [B, D] in fp32 of prompts, on `device`.

        A prompt that is longer than the CLIP reads, 77 tokens in the published ones, is cut. Each prompt is encoded
        once, however often it is given.
        """
        device = torch.device(device)
        unique = list(dict.fromkeys(prompts))
        rows = {prompt: row for row, prompt in enumerate(unique)}
        with self.network.on(device) as (clip, computes_on, _):
            parts = [unique[i : i + self.batch_size] for i in range(0, len(unique), self.batch_size)]
            embeds = torch.cat([self._embed_prompts(clip, part, computes_on) for part in parts])
            return embeds[[rows[prompt] for prompt in prompts]].to(device)

    def cosines(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The cosine of each image's embedding with its prompt's, [B] in [-1, 1]."""
        # one use around both, so that offloaded weights are copied once
        with self.network.on(images.device):
            return (self.image_embeds(images) * self.text_embeds(prompts, images.device)).sum(-1)

    @property
    def logit_scale(self) -> float:
        """The natural logarithm of the factor that cosines were multiplied with in training. Loads the weights."""
        self.network.load()
        return self._logit_scale

    @property
    def image_format(self) -> ImageFormat:
        """The images that it takes, from the processor's file."""
        return self._image_format()

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in `dtype`, from the config alone."""
        with torch.device("meta"):
            return weight_bytes(self._without_unused(CLIPModel(self._config())), dtype)

    def on_meta(self, dtype: torch.dtype, size: tuple[int, int]) -> Callable[[int], None]:
        """A function that embeds so many images of this size on the `meta` device, from the config files alone.

        There an op has the shapes of its outputs but computes nothing, so that the memory can be traced.
        """
        with torch.device("meta"):
            clip = self._without_unused(CLIPModel(self._config())).to(dtype).eval()
        self._format = self._image_format()

        @torch.no_grad()
        def embed(images: int) -> None:
            self._embed_images(clip, torch.empty(images, 3, *size, device="meta"), dtype)

        return embed

    # what a CLIP in another layout has in its own way

    def _check_files(self) -> None:
        """Raises `ValueError` if a local folder is not a CLIP's or lacks a file."""
        if local_path(self.option, self.model) is not None:
            config, image_format = self._config(), self._image_format()
            fetch_weights(self.option, self.model)
            if config.vision_config.image_size != image_format.size:
                raise ValueError(
                    f"{self.option} is {self.model!r}, which takes images of {config.vision_config.image_size} pixels, "
                    f"and the processor in {self.processor!r} makes {image_format.size}: give the processor that "
                    "belongs to it"
                )
        if self.text and local_path(self.processor_option, self.processor) is not None:
            fetch(self.processor_option, self.processor, *TOKENIZERS)

    def _config(self) -> Any:
        path = fetch(self.option, self.model, "config.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["model_type"] != "clip":
                raise ValueError(f"its model_type is {found['model_type']!r}")
            return CLIPConfig.from_dict(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.option} is {self.model!r}, whose config.json is not a CLIP's ({first_line(error)}): give a "
                "CLIP in transformers' format"
            ) from error

    def _weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in fetch_weights(self.option, self.model):
            found |= read_weights(path)
        return found

    def _image_format(self) -> ImageFormat:
        return read_image_format(fetch(self.processor_option, self.processor, *IMAGE_FORMATS))

    # loading and computing

    def _load(self) -> Any:
        config = self._config()
        # fp32 is named, as transformers changes torch's default dtype of all threads while it loads another one
        clip: Any = CLIPModel.from_pretrained(
            None, config=config, state_dict=self._fitting_weights(config), dtype=torch.float32
        )
        self._format = self._image_format()
        self._tokenizer: Any = self._load_tokenizer(config) if self.text else None
        self._logit_scale = clip.logit_scale.item()
        return self._without_unused(clip)

    def _fitting_weights(self, config: Any) -> dict[str, torch.Tensor]:
        """The weights. Raises `ValueError` unless they are those of the config: missing ones would be random."""
        # positions are counted, and no weights, but old files have them
        weights = {key: tensor for key, tensor in self._weights().items() if not key.endswith("position_ids")}
        with torch.device("meta"):
            wanted = {(key, tensor.shape) for key, tensor in CLIPModel(config).state_dict().items()}
        wrong = wanted ^ {(key, tensor.shape) for key, tensor in weights.items()}
        if wrong:
            raise ValueError(
                f"{self.option} is {self.model!r}, whose weights do not fit its config, such as {min(wrong)[0]}: copy "
                "or download it again"
            )
        return weights

    def _load_tokenizer(self, config: Any) -> Any:
        try:
            tokenizer = CLIPTokenizerFast.from_pretrained(self.processor)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.processor_option} is {self.processor!r}, whose tokenizer cannot be read ({first_line(error)})"
            ) from error
        text = config.text_config
        end = max(tokenizer.get_vocab().values()) if text.eos_token_id == _OLD_END else text.eos_token_id
        # an embedding is read at the end token: without one, all prompts would have that of the first token
        if tokenizer.eos_token_id != end or len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"{self.processor_option} is {self.processor!r}, whose tokenizer is not that of {self.model!r}: it "
                f"ends prompts with token {tokenizer.eos_token_id} of {len(tokenizer)}, and the text encoder reads "
                f"token {end} of {text.vocab_size}"
            )
        self._length = min(text.max_position_embeddings, tokenizer.model_max_length)
        return tokenizer

    def _without_unused(self, clip: Any) -> Any:
        if not self.text:
            del clip.text_model, clip.text_projection
        return clip

    def _embed_images(self, clip: Any, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # looked at before the image is cut: what lies outside would not be noticed
        is_finite = images.isfinite().flatten(1).all(1, keepdim=True)
        pooled = clip.vision_model(pixel_values=self._format.pixels(images).to(dtype)).pooler_output
        embeds = functional.normalize(clip.visual_projection(pooled).float(), dim=-1)
        return embeds.where(is_finite, torch.nan)

    def _embed_prompts(self, clip: Any, prompts: list[str], device: torch.device) -> torch.Tensor:
        ids = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).input_ids
        # no mask: attention only looks back, and the padding comes after the end token
        pooled = clip.text_model(input_ids=ids.to(device)).pooler_output
        return functional.normalize(clip.text_projection(pooled).float(), dim=-1)


class ClipReward:
    """A reward whose networks are those of `clip`."""

    clip: ClipNetwork

    @property
    def network(self) -> Network:
        """Where the weights are and their type."""
        return self.clip.network

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in `dtype`, without loading them."""
        return self.clip.memory_bytes(dtype)


def processor_beside(model: str, otherwise: str) -> str:
    """The local folder of `model`, itself or the one that the file is in, if it has a tokenizer; else `otherwise`."""
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    return str(folder) if any((folder / file).is_file() for file in TOKENIZERS) else otherwise
