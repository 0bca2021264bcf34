"""Small UNets of the kinds that diffusers has, what they are called with, and what comes out."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from op_checks import DEVICE
from peft import LoraConfig

from ddpo_fast.tiny_sd import MODEL

SD15 = {
    "block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (4, 8, 16),
    "use_linear_projection": True,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
KINDS = ("bundled", "sd15", "sdxl")


def make_unet(kind: str, lora: bool = False, dtype: torch.dtype = torch.float32, **settings) -> UNet2DConditionModel:
    """A UNet in training mode; with `lora` frozen and with a trained adapter."""
    torch.manual_seed(0)
    if kind == "bundled":
        unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32)
    else:
        unet = UNet2DConditionModel(**{**(SD15 if kind == "sd15" else SDXL), "sample_size": 8, **settings})
    if lora:
        add_adapter(unet)
    return unet.to(DEVICE, dtype).train()


def add_adapter(unet: UNet2DConditionModel, name: str = "default", **settings) -> None:
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings), name)
    for parameter_name, parameter in unet.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)


def inputs_of(unet: UNet2DConditionModel, dtype: torch.dtype | None = None) -> dict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype or unet.dtype)

    added = {"text_embeds": draw(2, 16), "time_ids": draw(2, 6)}
    return {
        "sample": draw(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700], device=DEVICE),
        "encoder_hidden_states": draw(2, 7, unet.config.cross_attention_dim),
        "added_cond_kwargs": added if unet.config.addition_embed_type else None,
    }


def predict(unet: UNet2DConditionModel, **others) -> torch.Tensor:
    return unet(**{**inputs_of(unet), **others}).sample


def trained_parameters(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def output_and_gradients(unet: UNet2DConditionModel, **others) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = predict(unet, **others)
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=torch.float64).view_as(output)
    parameters = trained_parameters(unet)
    gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()))
    return output, dict(zip(parameters, gradients, strict=True))


def guided(unet: UNet2DConditionModel, images: int = 2) -> tuple[tuple, tuple]:
    """(N latents, N timesteps, embeddings of 2N rows), and the same with 2N rows of each."""
    given = inputs_of(unet)
    latents, timesteps = given["sample"][:images], given["timestep"][:images]
    embeds = torch.cat([given["encoder_hidden_states"].flip(0)[:images], given["encoder_hidden_states"][:images]])
    return (latents, timesteps, embeds), (latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds)


def guided_loss(unet: UNet2DConditionModel, row) -> tuple[torch.Tensor, torch.Tensor]:
    output = unet(*row).sample
    return output, (torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=DEVICE) * output.flatten()).sum()


def guided_gradients(unet: UNet2DConditionModel, row) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output, loss = guided_loss(unet, row)
    trained = trained_parameters(unet)
    return output, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_gradients_add_up(unet: UNet2DConditionModel) -> None:
    """Two calls of an fp64 UNet leave twice the gradients of one."""
    row, _ = guided(unet)
    _, gradients = guided_gradients(unet, row)
    for _ in range(2):
        guided_loss(unet, row)[1].backward()
    summed = {name: parameter.grad for name, parameter in trained_parameters(unet).items()}
    torch.testing.assert_close(summed, {name: 2 * grad for name, grad in gradients.items()}, rtol=1e-9, atol=1e-10)
