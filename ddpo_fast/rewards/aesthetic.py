"""How much people like an image, whatever its prompt: LAION's aesthetic predictor, and heads that are trained here."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.rewards.head import head_width, read_head, scores
from ddpo_fast.rewards.network import Network, weight_bytes
from ddpo_fast.rewards.weight_files import fetch, file_of, local_path, named_folder

# of `ddpo-fast train-reward`, of TRL and of LAION
TRAINED_HEAD = "head.safetensors"
HEADS = (TRAINED_HEAD, "aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")
VIT_L = "openai/clip-vit-large-patch14"


class AestheticScore:
    """A few layers, the head, on a CLIP's unit-length embedding of the image. Prompts are not read.

    Range: the published heads were trained on ratings of 1 to 10, and images of Stable Diffusion 1.5 have about 5.5. A
    head that `ddpo-fast train-reward` made has the range of its ratings. Source: LAION's improved-aesthetic-predictor,
    in the copy of TRL's example for DDPO. Licences: Apache-2.0 for the head, and MIT for OpenAI's CLIP ViT-L/14. That
    takes the central 224 pixels of an image whose shorter edge is resized to 224.

    Args:
        model: the head, see `head.py`: a file, or a folder or Hub id that has one of `HEADS`; `bundled` for that of the
            bundled model, which says how cleanly an image is drawn.
        clip: folder or Hub id of the CLIP that the head was trained on (default: the one that `model`'s config.json
            names if `ddpo-fast train-reward` wrote it, else ViT-L/14).
        device, dtype, offload, batch_size: see `ClipNetwork`; the head is small and always in fp32.
    """

    def __init__(
        self,
        *,
        model: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        offload: bool = False,
        batch_size: int = 32,
    ) -> None:
        model = named_folder(model, "head")
        self.model, self.clip_name = model, clip
        self._options: Any = {"device": device, "dtype": dtype, "offload": offload, "batch_size": batch_size}
        self._lock = threading.Lock()
        self._networks: tuple[ClipNetwork, Network] | None = None
        if local_path("model", model) is not None:
            self.networks()

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> tuple[torch.Tensor, dict]:
        clip, head = self.networks()
        embeds = clip.image_embeds(images)
        with head.on(images.device) as (layers, device, _):
            if embeds.shape[1] != head_width(layers):
                raise ValueError(
                    f"model is {self.model!r}, a head for embeddings of width {head_width(layers)}, and those of "
                    f"{clip.model!r} have {embeds.shape[1]}: give as clip the CLIP that the head was trained on"
                )
            return scores(layers, embeds.to(device)).to(images.device), {}

    def networks(self) -> tuple[ClipNetwork, Network]:
        """The CLIP and the head. Of a `model` on the Hub they are known once its files are here, at the first use."""
        with self._lock:
            if self._networks is None:
                path = file_of("model", self.model, *HEADS)
                head, name = read_head(path), self.clip_name or _clip_of("model", self.model, path)
                self._networks = (
                    ClipNetwork(name, text=False, option="clip", **self._options),
                    Network(lambda: head, self._options["device"], torch.float32, offload=False),
                )
            return self._networks

    @property
    def clip(self) -> ClipNetwork:
        """What embeds the images."""
        return self.networks()[0]

    @property
    def network(self) -> Network:
        """Where the weights of the CLIP are and their type."""
        return self.clip.network

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights, the CLIP's in `dtype`, from its config alone."""
        clip, head = self.networks()
        return clip.memory_bytes(dtype) + weight_bytes(head.load(), torch.float32)


def _clip_of(option: str, model: str, head: Path) -> str:
    """The CLIP that a head is for: of one that `ddpo-fast train-reward` made, what the config beside it says."""
    if head.name != TRAINED_HEAD:
        return VIT_L
    is_file = Path(model).expanduser().is_file()
    config = head.parent / "config.json" if is_file else fetch(option, model, "config.json")
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["clip"]
        if not isinstance(name, str):
            raise ValueError(f"clip is {name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(config)!r} does not say which CLIP the head is for ({error!r}): give clip") from error
    return name
