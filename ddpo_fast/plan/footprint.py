"""The sizes of a model's weights and the memory of each of its computations, from its config files alone.

Networks are built on PyTorch's `meta` device, where a tensor has a shape and a dtype but no values. They can be run
there: each op computes the shape of its output and allocates nothing. So no weights are read, no GPU is needed, and the
model may be larger than this machine's memory. live_bytes.py counts the bytes that the tensors would take.

Shapes: R rows of a network's batch, or images, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import T5EncoderModel

from ddpo_fast import sampler
from ddpo_fast.families import Family
from ddpo_fast.model_configs import ModelConfigs
from ddpo_fast.offload_frozen import bytes_by_blocks
from ddpo_fast.plan import meta_model
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
    """The shape of a LoRA: its rank, and the names of the layers that have one (None: the family's usual)."""

    rank: int = 4
    target_modules: Sequence[str] | None = None


class Footprint:
    """The sizes of a model in one kind of run. Each computation is traced at its first use, in a second or two.

    Args:
        configs: the model's.
        adapter: the LoRA that is trained, or None if all weights of the network are.
        dtype: what the networks compute in.
        device_type: 'cuda' or 'cpu', which decides which layers are fused and which kernels run.
        fused: the setting `fuse_unet`.
        steps: denoising steps.
        cached: the setting `sample_cache`.
        reward: the memory of the run's rewards.
        size: (height, width) of images in pixels; None for the model's own.
        quantized: the setting `quantize_frozen`.
        prompts: how many the run has, or None for as many as it draws.
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
        size: tuple[int | None, int | None] = (None, None),
        quantized: str = "none",
        prompts: int | None = None,
    ) -> None:
        self.configs, self.adapter, self.dtype, self.device_type = configs, adapter, dtype, device_type
        self.fused, self.steps, self.cached = fused, steps, cached
        self.reward = reward or RewardMemory()
        self.size, self.quantized, self.prompts = size, quantized, prompts
        self._frozen = meta_model.frozen_networks(configs, dtype)
        if quantized != "none":
            for encoder in self._frozen.values():
                if isinstance(encoder, T5EncoderModel):
                    quantize_linears(encoder, quantized, "meta", encoder.dtype)
        self._vae: Any = self._frozen["vae"]
        network = self._network()
        trained = [p for p in network.parameters() if p.requires_grad]
        self.trained_sizes = [p.numel() for p in trained]
        # bytes of the network's frozen weights, of the VAE, and of all text encoders; of these also the most that are
        # on the device at a time if they are kept elsewhere
        self.frozen_bytes = meta_model.bytes_of(network)
        self.vae_bytes = meta_model.bytes_of(self._vae)
        self.text_bytes = sum(map(meta_model.bytes_of, self._encoders.values()))
        self.passing_text_bytes = bytes_by_blocks(self._encoders.values())
        self.largest_block = meta_model.largest_block(network)

    @property
    def _encoders(self) -> dict[str, Any]:
        return {name: network for name, network in self._frozen.items() if name != "vae"}

    @property
    def name(self) -> str:
        """What the trained network is, for tables."""
        return "UNet" if self.configs.family.network == "unet" else "transformer"

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the precision that the networks compute in."""
        return self.dtype.itemsize

    @property
    def trained_weights(self) -> int:
        """The number of weights that are trained."""
        return sum(self.trained_sizes)

    @property
    def network_bytes(self) -> int:
        """Bytes of the weights that the network computes with."""
        return self.frozen_bytes + self.itemsize * self.trained_weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.configs.family.latent_shape_of(self.configs.parts, *self.size)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(L, D), with the rows of a pooled embedding."""
        return meta_model.embedding_shape(self.configs)

    @property
    def prompt_bytes(self) -> int:
        """Bytes of a prompt: its embedding, and its token ids for a CLIP, which are int64."""
        tokens, width = self.embedding_shape
        return self.itemsize * tokens * width + 8 * self.configs.parts["text_encoder"]["max_position_embeddings"]

    @property
    def negative_shape(self) -> tuple[int, int]:
        """(L, D) of the negative prompt's embedding, which a family that is not guided by rows has none of."""
        tokens, width = self.embedding_shape
        return (tokens if self.configs.family.guides_by_rows else 0), width

    @property
    def image_bytes(self) -> int:
        """Bytes of an image as the VAE gives it, three values for each pixel."""
        height, width = self.configs.family.image_size_of(self.configs.parts, *self.size)
        return self._vae.dtype.itemsize * 3 * height * width

    @property
    def decoded_at_once(self) -> int:
        """The number of images that the sampler gives to the VAE in one call."""
        _, height, width = self.latent_shape
        return max(1, sampler.DECODED_AT_ONCE // (height * width))

    def _network(self) -> Any:
        """The trained network on `meta`, with the layers and the attention that `placement.py` gives it."""
        network = meta_model.made(self.configs, self.configs.family.network)
        if self.adapter is not None:
            network.requires_grad_(False)
            targets = self.adapter.target_modules or self.configs.family.targets
            with torch.device("meta"):
                network.add_adapter(LoraConfig(r=self.adapter.rank, target_modules=list(targets)))
            if self.quantized != "none":
                quantize_linears(network, self.quantized, "meta", self.dtype)
        meta_model.in_precision(network, self.dtype)
        for module in network.modules():
            # the processor that `set_attention` chooses without xformers
            if hasattr(module, "set_processor") and is_plain(module):
                module.set_processor(SDPAProcessor())
        if self.fused:
            fuse_unet(network.to(memory_format=torch.channels_last), faster_layers(self.device_type))
        return network

    def _family(self, network: Any) -> Family:
        return meta_model.family_of_network(self.configs, network, self._frozen, self.steps, self.size)

    def _call(self, family: Family, rows: int) -> torch.Tensor:
        """The network's output [R, C, H, W]."""
        # made again in each call, as a trace compares calls op by op
        family.buffers.clear()
        return family.call(*self._inputs(rows))

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The network's inputs: latents [R, C, H, W], keys of steps [R] and embeddings [R, L, D]."""
        # stored latents are fp32, and the copy that the cast makes counts too
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        keys = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, *self.embedding_shape, dtype=self.dtype, device="meta")
        return latents.to(self.dtype), keys, embeds

    @functools.cache  # noqa: B019 (a footprint lives as long as its plan)
    def training(self, mode: str = "none", gradients: torch.dtype | None = None) -> Trace:
        """The forward and backward pass of a micro-batch of R rows.

        Args:
            mode: of `set_gradient_checkpointing`.
            gradients: None if the totals of gradients exist before the pass: each new gradient is then freed as soon as
                it has been added to its total, and the totals are not counted. Otherwise the dtype of the totals, which
                the pass creates: they are counted, and stay until the end.
        """
        network = set_gradient_checkpointing(self._network(), mode).train()
        family = self._family(network)
        # the totals of gradients, if the pass creates them
        kept: list[torch.Tensor] = []

        # as the hook of `MasterWeights` does
        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if gradients is not None:
                kept.append(parameter.grad.to(gradients))
            parameter.grad = None

        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(add)

        def compute(rows: int) -> None:
            output = self._call(family, rows)
            # `ppo_loss` computes the gradient with respect to the output without autograd, so backward starts there
            torch.autograd.backward(output, torch.empty_like(output))
            kept.clear()

        return trace(compute, self.device_type)

    @functools.cache  # noqa: B019
    def kept_per_row(self, mode: str = "none") -> int:
        """Bytes that each row of a training forward pass keeps for the backward pass."""
        family = self._family(set_gradient_checkpointing(self._network(), mode).train())

        def compute(rows: int) -> None:
            output = self._call(family, rows)
            # The count is taken after each op, when the temporary tensors of the UNet's last layer still exist. This op
            # on an empty tensor makes one more count, when only the output and its autograd graph exist.
            torch.empty(0, device=output.device)

        return int(trace(compute, self.device_type).per_row[-1])

    @functools.cached_property
    def sampling(self) -> Trace:
        """A denoising step of R rows, without the tensors that `cached_bytes` counts."""
        family = self._family(self._network().eval())
        return trace(torch.no_grad()(lambda rows: self._call(family, rows)), self.device_type)

    @functools.cache  # noqa: B019
    def cached_bytes(self, rows: int) -> int:
        """Bytes that a rollout of R rows keeps for all of its steps, and that the next rollout reuses.

        These are the prompts' embeddings and, with `sample_cache`, their keys and values in each cross-attention, and
        the projected time embedding of each residual block at each timestep (see unet/sampling_cache.py).
        """
        network = self._network()
        tokens, width = self.embedding_shape
        values = rows * tokens * width
        if self.cached and not cache_problem(network):
            cache = UNetCache(network)
            values += rows * tokens * sum(projection.out_features for projection in cache.projections)
            values += (self.steps + 1) * sum(block.time_emb_proj.out_features for block in cache.blocks)
        return values * self.dtype.itemsize

    @functools.cache  # noqa: B019
    def decoding(self, tiled: bool = False) -> Trace:
        """The decoding of R images in one call of the VAE."""
        (self._vae.enable_tiling if tiled else self._vae.disable_tiling)()

        @torch.no_grad()
        def compute(images: int) -> None:
            self._vae.decode(torch.empty(images, *self.latent_shape, dtype=self._vae.dtype, device="meta"))

        return trace(compute, self.device_type)

    @functools.cached_property
    def encoding(self) -> int:
        """The peak of encoding `ENCODED_AT_ONCE` prompts, the most that are encoded in one call, in bytes."""

        @torch.no_grad()
        def compute(prompts: int) -> None:
            for name, encoder in self._encoders.items():
                meta_model.encode(self.configs, name, encoder, prompts)

        return trace(compute, self.device_type).peak(ENCODED_AT_ONCE)
