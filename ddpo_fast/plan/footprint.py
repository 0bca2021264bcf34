"""The sizes of a model's weights and the memory of each of its computations, from its config files alone.

Networks are built on PyTorch's `meta` device, where a tensor has a shape and a dtype but no values. They can be run
there: each op computes the shape of its output and allocates nothing. So no weights are read, no GPU is needed, and a
model that is larger than this machine's memory can be planned for. live_bytes.py counts the tensors meanwhile.

Shapes: R rows of a UNet's batch, or images, C H W latent, L tokens, D width of the text embedding.
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
    """The shape of a LoRA: its rank, and the names of the UNet's layers that have one."""

    rank: int = 4
    target_modules: Sequence[str] = ("to_k", "to_q", "to_v", "to_out.0")


class Footprint:
    """The sizes of a model in one kind of run. A computation is traced when it is first asked for: a second or two.

    Args:
        configs: the model's.
        adapter: the LoRA that is trained, or None if all weights of the UNet are.
        dtype: what the networks compute in.
        device_type: 'cuda' or 'cpu': decides which layers are fused and which kernels run.
        fused: the setting `fuse_unet`.
        steps: denoising steps.
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
    def itemsize(self) -> int:
        """Bytes of a value in the precision that the networks compute in."""
        return self.dtype.itemsize

    @property
    def trained_weights(self) -> int:
        """The number of weights that are trained."""
        return sum(self.trained_sizes)

    @property
    def frozen_weights(self) -> int:
        """The number of the UNet's weights that are not trained."""
        return self.unet_weights - self.trained_weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.configs.latent_shape

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(L, D)."""
        return self.configs.text_encoder["max_position_embeddings"], self.configs.unet["cross_attention_dim"]

    @property
    def pixels(self) -> int:
        """The number of values of an image, three for each pixel."""
        height, width = self.configs.image_size
        return 3 * height * width

    @property
    def decoded_at_once(self) -> int:
        """The number of images that the sampler gives to the VAE in one call."""
        _, height, width = self.latent_shape
        return max(1, sampler.DECODED_AT_ONCE // (height * width))

    def _unet(self) -> Any:
        """The UNet on `meta`, with the layers that the trainer's `place_networks` would give it."""
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(self.configs.unet)
            if self.adapter is not None:
                unet.requires_grad_(False)
                unet.add_adapter(LoraConfig(r=self.adapter.rank, target_modules=list(self.adapter.target_modules)))
        _in_precision(unet, self.dtype)
        for module in unet.modules():
            # what `set_attention` does without xformers
            if hasattr(module, "set_processor") and is_plain(module):
                module.set_processor(SDPAProcessor())
        if self.fused:
            fuse_unet(unet.to(memory_format=torch.channels_last), faster_layers(self.device_type))
        return unet

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The UNet's inputs: latents [R, C, H, W], timesteps [R] and embeddings [R, L, D]."""
        # the latents that are stored are fp32, and the cast is one of the ops that count
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        timesteps = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, *self.embedding_shape, dtype=self.dtype, device="meta")
        return latents.to(self.dtype), timesteps, embeds

    @functools.cache  # noqa: B019 (a footprint lives as long as its plan)
    def training(self, mode: str = "none", gradients: torch.dtype | None = None) -> Trace:
        """The forward and backward pass of a micro-batch of R rows.

        Args:
            mode: of `set_gradient_checkpointing`.
            gradients: None if gradients exist before the pass: each new one is then freed as soon as it has been added
                to its total, which is not counted. Otherwise the pass makes the gradients, in this dtype: they are
                counted, and stay until the end.
        """
        unet = set_gradient_checkpointing(self._unet(), mode).train()
        # what a pass without earlier gradients keeps
        kept: list[torch.Tensor] = []

        # as the hook of `MasterWeights` does
        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if gradients is not None:
                kept.append(parameter.grad.to(gradients))
            parameter.grad = None

        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(add)

        def compute(rows: int) -> None:
            output = unet(*self._inputs(rows)).sample
            # the loss's gradient for the output is computed by an op of ours, without autograd
            torch.autograd.backward(output, torch.empty_like(output))
            kept.clear()

        return trace(compute, self.device_type)

    @functools.cache  # noqa: B019
    def kept_per_row(self, mode: str = "none") -> int:
        """Bytes that each row of a training forward pass keeps for the backward pass."""
        unet = set_gradient_checkpointing(self._unet(), mode).train()

        def compute(rows: int) -> None:
            output = unet(*self._inputs(rows)).sample
            # The count is taken after each op, and within the last one its temporary tensors are still alive. One more
            # op, of an empty tensor, takes it while nothing is alive but the output and its graph.
            torch.empty(0, device=output.device)

        return int(trace(compute, self.device_type).per_row[-1])

    @functools.cached_property
    def sampling(self) -> Trace:
        """A denoising step of R rows, without what `cached_bytes` counts."""
        unet = self._unet().eval()
        return trace(torch.no_grad()(lambda rows: unet(*self._inputs(rows))), self.device_type)

    @functools.cache  # noqa: B019
    def cached_bytes(self, rows: int) -> int:
        """Bytes that a rollout of R rows keeps for all of its steps, and that the next rollout reuses.

        These are the prompts' embeddings and, with `sample_cache`, their keys and values in each cross-attention, and
        for each timestep what each residual block adds to its activations (see unet/sampling_cache.py).
        """
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
        """The peak of encoding as many prompts as are encoded at once, in bytes."""

        @torch.no_grad()
        def compute(prompts: int) -> None:
            self._text_encoder(torch.empty(prompts, self.embedding_shape[0], dtype=torch.int64, device="meta"))

        return trace(compute, self.device_type).peak(ENCODED_AT_ONCE)


def _in_precision(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts a network's parameters, as `network.to(dtype)`, for which diffusers prints a warning."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
