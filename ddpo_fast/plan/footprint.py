"""The sizes of a model's weights and the memory of each of its computations, from its config files alone.

Networks are built on PyTorch's `meta` device, where a tensor has a shape and a dtype but no values. They can be run
there: each op computes the shape of its output and allocates nothing. So no weights are read, no GPU is needed, and the
model may be larger than this machine's memory. live_bytes.py counts the bytes that the tensors would take.

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
from ddpo_fast.plan.reward_memory import RewardMemory
from ddpo_fast.prompt_embeddings import ENCODED_AT_ONCE
from ddpo_fast.quantize_frozen import quantize_linears
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
    """The sizes of a model in one kind of run. Each computation is traced at its first use, in a second or two.

    Args:
        configs: the model's.
        adapter: the LoRA that is trained, or None if all weights of the UNet are.
        dtype: what the networks compute in.
        device_type: 'cuda' or 'cpu', which decides which layers are fused and which kernels run.
        fused: the setting `fuse_unet`.
        steps: denoising steps.
        cached: the setting `sample_cache`.
        reward: the memory of the run's rewards.
        quantized: the setting `quantize_frozen`.
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
        reward: RewardMemory | None = None,
        quantized: str = "none",
    ) -> None:
        self.configs, self.adapter, self.dtype, self.device_type = configs, adapter, dtype, device_type
        self.fused, self.steps, self.cached = fused, steps, cached
        self.reward, self.quantized = reward or RewardMemory(), quantized
        with torch.device("meta"):
            self._vae: Any = AutoencoderKL.from_config(configs.vae)
            self._text_encoder: Any = CLIPTextModel(CLIPTextConfig(**configs.text_encoder))
        for frozen in (self._vae, self._text_encoder):
            _in_precision(frozen.eval().requires_grad_(False), dtype)
        unet = self._unet()
        trained = [p for p in unet.parameters() if p.requires_grad]
        self.trained_sizes = [p.numel() for p in trained]
        frozen_tensors = [*(p for p in unet.parameters() if not p.requires_grad), *unet.buffers()]
        # of the UNet's frozen weights, in the precision that the networks compute in unless they are quantized
        self.frozen_bytes = sum(tensor.nbytes for tensor in frozen_tensors)
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
    def unet_bytes(self) -> int:
        """Bytes of the weights that the UNet computes with."""
        return self.frozen_bytes + self.itemsize * self.trained_weights

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
        """The UNet on `meta`, with the fused layers and the attention that `placement.py` gives it."""
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(self.configs.unet)
            if self.adapter is not None:
                unet.requires_grad_(False)
                unet.add_adapter(LoraConfig(r=self.adapter.rank, target_modules=list(self.adapter.target_modules)))
            if self.adapter is not None and self.quantized != "none":
                quantize_linears(unet, self.quantized, "meta", self.dtype)
        _in_precision(unet, self.dtype)
        for module in unet.modules():
            # the processor that `set_attention` chooses without xformers
            if hasattr(module, "set_processor") and is_plain(module):
                module.set_processor(SDPAProcessor())
        if self.fused:
            fuse_unet(unet.to(memory_format=torch.channels_last), faster_layers(self.device_type))
        return unet

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The UNet's inputs: latents [R, C, H, W], timesteps [R] and embeddings [R, L, D]."""
        # stored latents are fp32, and the copy that the cast makes counts too
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        timesteps = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, *self.embedding_shape, dtype=self.dtype, device="meta")
        return latents.to(self.dtype), timesteps, embeds

    @functools.cache  # noqa: B019 (a footprint lives as long as its plan)
    def training(self, mode: str = "none", gradients: torch.dtype | None = None) -> Trace:
        """The forward and backward pass of a micro-batch of R rows.

        Args:
            mode: of `set_gradient_checkpointing`.
            gradients: None if the totals of gradients exist before the pass: each new gradient is then freed as soon as
                it has been added to its total, and the totals are not counted. Otherwise the dtype of the totals, which
                the pass creates: they are counted, and stay until the end.
        """
        unet = set_gradient_checkpointing(self._unet(), mode).train()
        # the totals of gradients, if the pass creates them
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
            # `ppo_loss` computes the gradient with respect to the output without autograd, so backward starts there
            torch.autograd.backward(output, torch.empty_like(output))
            kept.clear()

        return trace(compute, self.device_type)

    @functools.cache  # noqa: B019
    def kept_per_row(self, mode: str = "none") -> int:
        """Bytes that each row of a training forward pass keeps for the backward pass."""
        unet = set_gradient_checkpointing(self._unet(), mode).train()

        def compute(rows: int) -> None:
            output = unet(*self._inputs(rows)).sample
            # The count is taken after each op, when the temporary tensors of the UNet's last layer still exist. This op
            # on an empty tensor makes one more count, when only the output and its autograd graph exist.
            torch.empty(0, device=output.device)

        return int(trace(compute, self.device_type).per_row[-1])

    @functools.cached_property
    def sampling(self) -> Trace:
        """A denoising step of R rows, without the tensors that `cached_bytes` counts."""
        unet = self._unet().eval()
        return trace(torch.no_grad()(lambda rows: unet(*self._inputs(rows))), self.device_type)

    @functools.cache  # noqa: B019
    def cached_bytes(self, rows: int) -> int:
        """Bytes that a rollout of R rows keeps for all of its steps, and that the next rollout reuses.

        These are the prompts' embeddings and, with `sample_cache`, their keys and values in each cross-attention, and
        the projected time embedding of each residual block at each timestep (see unet/sampling_cache.py).
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
        """The peak of encoding `ENCODED_AT_ONCE` prompts, the most that are encoded in one call, in bytes."""

        @torch.no_grad()
        def compute(prompts: int) -> None:
            self._text_encoder(torch.empty(prompts, self.embedding_shape[0], dtype=torch.int64, device="meta"))

        return trace(compute, self.device_type).peak(ENCODED_AT_ONCE)


def _in_precision(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts a network's parameters without `network.to(dtype)`, for which diffusers prints a warning."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
