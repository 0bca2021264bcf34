"""What a model takes, told from its config files: its weights one by one, and the live bytes of each computation.

Networks are built on the `meta` device: no weights are read and nothing is allocated. Shapes: R rows of a UNet, or
images, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo_fast import sampler
from ddpo_fast.model_configs import ModelConfigs
from ddpo_fast.plan.live_bytes import Trace, trace
from ddpo_fast.prompt_embeddings import ENCODED_AT_ONCE
from ddpo_fast.unet import (
    SDPAProcessor,
    UNetCache,
    cache_problem,
    faster_layers,
    fuse_unet,
    is_plain,
    set_gradient_checkpointing,
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA's shape."""

    rank: int = 4
    target_modules: Sequence[str] = ("to_k", "to_q", "to_v", "to_out.0")


class Footprint:
    """A model as one kind of run has it. Each trace is made when it is first asked for, in a second or two.

    Args:
        configs: the model's.
        adapter: the LoRA that is trained, or None for all weights.
        dtype: what the networks compute in.
        device_type: 'cuda' or 'cpu': which layers are fused, and which kernels run.
        fused: the setting `fuse_unet`.
        steps: of denoising.
        cached: the setting `sample_cache`.
    """

    def __init__(
        self,
        configs: ModelConfigs,
        adapter: Adapter | None,
        dtype: torch.dtype,
        device_type: str = "cuda",
        fused: bool = True,
        steps: int = 50,
        cached: bool = True,
    ) -> None:
        self.configs, self.adapter, self.dtype, self.device_type = configs, adapter, dtype, device_type
        self.fused, self.steps, self.cached = fused, steps, cached
        with torch.device("meta"):
            self._vae: Any = AutoencoderKL.from_config(configs.vae)
            self._text_encoder: Any = CLIPTextModel(CLIPTextConfig(**configs.text_encoder))
        for frozen in (self._vae, self._text_encoder):
            _in_precision(frozen.eval().requires_grad_(False), dtype)
        unet = self._unet()
        trained = [p for p in unet.parameters() if p.requires_grad]
        self.trained_sizes = [p.numel() for p in trained]
        self.unet_weights = sum(p.numel() for p in unet.parameters())
        self.vae_weights, self.text_weights = (
            sum(p.numel() for p in network.parameters()) for network in (self._vae, self._text_encoder)
        )
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        self.largest_block = max(sum(p.numel() for p in block.parameters()) for block in blocks)

    @property
    def trained_weights(self) -> int:
        return sum(self.trained_sizes)

    @property
    def frozen_weights(self) -> int:
        """Of the UNet."""
        return self.unet_weights - self.trained_weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.configs.latent_shape

    @property
    def embedding_shape(self) -> tuple[int, int]:
        return self.configs.text_encoder["max_position_embeddings"], self.configs.unet["cross_attention_dim"]

    @property
    def pixels(self) -> int:
        """Values of an image."""
        height, width = self.configs.image_size
        return 3 * height * width

    @property
    def decoded_at_once(self) -> int:
        _, height, width = self.latent_shape
        return max(1, sampler.DECODED_AT_ONCE // (height * width))

    def _unet(self) -> Any:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(self.configs.unet)
            if self.adapter is not None:
                unet.requires_grad_(False)
                unet.add_adapter(LoraConfig(r=self.adapter.rank, target_modules=list(self.adapter.target_modules)))
        _in_precision(unet, self.dtype)
        for module in unet.modules():
            # as `set_attention` does
            if hasattr(module, "set_processor") and is_plain(module):
                module.set_processor(SDPAProcessor())
        if self.fused:
            fuse_unet(unet.to(memory_format=torch.channels_last), faster_layers(self.device_type))
        return unet

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a training forward makes them of fp32 latents."""
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        timesteps = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, *self.embedding_shape, dtype=self.dtype, device="meta")
        return latents.to(self.dtype), timesteps, embeds

    @functools.cache  # noqa: B019 (a footprint lives as long as its plan)
    def training(self, mode: str = "none", gradients: torch.dtype | None = None) -> Trace:
        """A micro-batch of R rows, forward and backward.

        Args:
            mode: of `set_gradient_checkpointing`.
            gradients: None: they are added to others, and a weight's is alive until it has been. Else there were none
                before, and they stay, in this dtype.
        """
        unet = set_gradient_checkpointing(self._unet(), mode).train()
        added: list[torch.Tensor] = []

        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if gradients is not None:
                added.append(parameter.grad.to(gradients))
            parameter.grad = None

        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(add)

        def compute(rows: int) -> None:
            output = unet(*self._inputs(rows)).sample
            torch.autograd.backward(output, torch.empty_like(output))
            added.clear()

        return trace(compute, self.device_type)

    @functools.cache  # noqa: B019
    def kept(self, mode: str = "none") -> int:
        """Bytes that a row keeps for the backward pass."""
        unet = set_gradient_checkpointing(self._unet(), mode).train()
        forward = trace(lambda rows: _ends_with(unet(*self._inputs(rows)).sample), self.device_type)
        return int(forward.per_row[-1])

    @functools.cached_property
    def sampling(self) -> Trace:
        """A denoising step of R rows, but for what `cached_bytes` counts."""
        unet = self._unet().eval()
        return trace(torch.no_grad()(lambda rows: unet(*self._inputs(rows))), self.device_type)

    @functools.cache  # noqa: B019
    def cached_bytes(self, rows: int) -> int:
        """What a rollout of R rows leaves in place for the next one: embeddings, their keys and values, and what
        the residual blocks add for each timestep."""
        unet = self._unet()
        tokens, width = self.embedding_shape
        values = rows * tokens * width
        if self.cached and not cache_problem(unet):
            cache = UNetCache(unet)
            values += rows * tokens * sum(projection.out_features for projection in cache.projections)
            values += (self.steps + 1) * sum(block.time_emb_proj.out_features for block in cache.blocks)
        return values * self.dtype.itemsize

    @functools.cache  # noqa: B019
    def decoding(self, tiled: bool = False) -> Trace:
        """The decoding of R images in one call of the VAE."""
        (self._vae.enable_tiling if tiled else self._vae.disable_tiling)()

        @torch.no_grad()
        def compute(images: int) -> None:
            self._vae.decode(torch.empty(images, *self.latent_shape, dtype=self.dtype, device="meta"))

        return trace(compute, self.device_type)

    @functools.cached_property
    def encoding(self) -> int:
        """Bytes of the encoding of as many prompts as are encoded at once."""

        @torch.no_grad()
        def compute(prompts: int) -> None:
            self._text_encoder(torch.empty(prompts, self.embedding_shape[0], dtype=torch.int64, device="meta"))

        return trace(compute, self.device_type).peak(ENCODED_AT_ONCE)


def _in_precision(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """`network.to(dtype)`, of which diffusers warns."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def _ends_with(output: torch.Tensor) -> None:
    """One more op while `output` and its graph are alive."""
    torch.empty(0, device=output.device)
