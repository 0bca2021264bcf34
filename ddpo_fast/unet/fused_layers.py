"""Makes a diffusers UNet compute the same function with fewer and cheaper kernels.

Fusing changes the class of a module to a subclass with another `forward`; parameters, buffers, hooks and names stay.
The subclasses are defined at the top level of this module, so a fused UNet can be copied, pickled and saved like any
other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from peft.tuners import lora
from torch import nn

from ddpo_fast.ops.backend import OPS
from ddpo_fast.ops.geglu import geglu
from ddpo_fast.unet.attention import SDPAProcessor, is_plain
from ddpo_fast.unet.convolutions import (
    FrozenConv2d,
    fits_conv,
    images_of,
    is_bare,
    is_patched,
    is_pointwise,
    project,
    rows_of,
)
from ddpo_fast.unet.group_norms import FusedGroupNorm, GroupNormSiLU, SkippedSiLU, norm_and_skip
from ddpo_fast.unet.joint_attention import JointProcessor
from ddpo_fast.unet.linear_layers import FusedLinear, FusedLoraLinear
from ddpo_fast.unet.modulated_blocks import (
    FusedFluxSingleTransformerBlock,
    FusedFluxTransformerBlock,
    FusedJointTransformerBlock,
    has_layer_norms,
)
from ddpo_fast.unet.residual_blocks import FusedResnetBlock2D
from ddpo_fast.unet.residual_sums import ImageSum, add_product_, later_bias
from ddpo_fast.unet.shared_halves import UNSHARED, share_halves, with_rows_of
from ddpo_fast.unet.time_embedding import project_apart, project_together
from ddpo_fast.unet.transformer_blocks import FusedBasicTransformerBlock, fits_block, without_bias
from ddpo_fast.unet.up_blocks import FusedCrossAttnUpBlock2D, FusedUpBlock2D, FusedUpsample2D


class FusedTransformer2DModel(Transformer2DModel):
    """The transformer of images with its 1x1 convolutions as linear layers of the tokens.

    diffusers makes the tokens contiguous images for the convolution; channels_last needs no copy.
    """

    def reads_sums(self) -> bool:
        """Whether its input may be an `ImageSum`."""
        return is_bare(self, FusedTransformer2DModel) and is_bare(self.norm, FusedGroupNorm) and self._projects_rows()

    def detached_bias(self, x: torch.Tensor) -> torch.Tensor | None:
        """The bias of `proj_in` if the first norm after it sums the gradient that its kernel makes, for that of the
        bias. `x` is the layer's input or output."""
        return later_bias(self.proj_in, x) if self._projects_rows() else None

    def _operate_on_continuous_inputs(self, hidden_states: Any) -> tuple[torch.Tensor, Any]:
        """The tokens, and the residual: diffusers hands both on to `_get_output_for_continuous_inputs`.

        The residual is images, or rows that `proj_out` may add to.
        """
        if not self._projects_rows():
            return super()._operate_on_continuous_inputs(hidden_states)
        like = hidden_states.hidden if isinstance(hidden_states, ImageSum) else hidden_states
        later = later_bias(self.proj_out, like) if is_bare(self.norm, FusedGroupNorm) else None
        normed, residual = norm_and_skip(self.norm, hidden_states, later)
        rows, first = rows_of(normed), self.transformer_blocks[0]
        before = first.bias_before(rows) if isinstance(first, FusedBasicTransformerBlock) else None
        if before is not None:
            return F.linear(rows, self.proj_in.weight.flatten(1), before.detach()), residual
        return self._project(self.proj_in, rows), residual

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: Any,
    ) -> torch.Tensor:
        if not self._projects_rows():
            residual = with_rows_of(hidden_states, residual)
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, len(hidden_states), height, width, inner_dim
            )
        if inner_dim.ndim == 2:
            same = len(inner_dim) == len(hidden_states) * height * width
            rows = inner_dim if same else torch.cat([inner_dim, inner_dim])
            return images_of(add_product_(rows, self.proj_out, hidden_states), height, width)
        # the sum has the memory format of its first operand
        return with_rows_of(hidden_states, inner_dim) + images_of(
            self._project(self.proj_out, hidden_states), height, width
        )

    def _projects_rows(self) -> bool:
        return self.use_linear_projection or (is_pointwise(self.proj_in) and is_pointwise(self.proj_out))

    def _project(self, layer: Any, rows: torch.Tensor) -> torch.Tensor:
        return layer(rows) if self.use_linear_projection else project(layer, rows)


class FusedRMSNorm(RMSNorm):
    """An RMS norm that PyTorch computes in one kernel on a GPU, with one rounding; diffusers composes it of eight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.dim, self.weight, self.eps)


class FusedGEGLU(GEGLU):
    """A GEGLU whose gate and product are one kernel, which on a GPU adds the projection's bias too."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return geglu(*without_bias(self.proj, hidden_states))


def _are_plain(norm: Any, activation: Any) -> bool:
    unchanged = type(norm) is nn.GroupNorm and type(activation) is nn.SiLU
    return unchanged and norm.affine and not is_patched(norm) and not is_patched(activation)


def _fits_resnet(block: ResnetBlock2D) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and all(_are_plain(norm, block.nonlinearity) for norm in (block.norm1, block.norm2))
    )


def _fits_upsample(layer: Upsample2D) -> bool:
    plain = layer.norm is None and layer.interpolate and not layer.use_conv_transpose
    return plain and layer.use_conv and layer.name == "conv"


# for each class, its fused version and which modules it fits
FUSED: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], bool]]] = {
    ResnetBlock2D: (FusedResnetBlock2D, _fits_resnet),
    Transformer2DModel: (FusedTransformer2DModel, lambda transformer: transformer.is_input_continuous),
    UpBlock2D: (FusedUpBlock2D, lambda _: True),
    CrossAttnUpBlock2D: (FusedCrossAttnUpBlock2D, lambda _: True),
    BasicTransformerBlock: (FusedBasicTransformerBlock, fits_block),
    JointTransformerBlock: (FusedJointTransformerBlock, has_layer_norms),
    FluxTransformerBlock: (FusedFluxTransformerBlock, has_layer_norms),
    FluxSingleTransformerBlock: (FusedFluxSingleTransformerBlock, has_layer_norms),
    nn.GroupNorm: (FusedGroupNorm, lambda norm: norm.affine),
    RMSNorm: (FusedRMSNorm, lambda norm: norm.weight is not None and norm.bias is None),
    Upsample2D: (FusedUpsample2D, _fits_upsample),
    GEGLU: (FusedGEGLU, lambda _: True),
    nn.Conv2d: (FrozenConv2d, fits_conv),
    nn.Linear: (FusedLinear, lambda _: True),
    lora.Linear: (FusedLoraLinear, lambda _: True),
}
# for each fused version, the class that it replaced
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    **{fused: plain for plain, (fused, _) in FUSED.items()},
    **UNSHARED,
    GroupNormSiLU: nn.GroupNorm,
    SkippedSiLU: nn.SiLU,
}
# blocks in which each transformer reads the images of the residual block before it
CROSS_BLOCKS = (CrossAttnDownBlock2D, CrossAttnUpBlock2D, UNetMidBlock2DCrossAttn)
# what `fuse_unet` changes: these, and a UNet as a whole (`share_halves`)
FUSIBLE = frozenset((*FUSED, UNet2DConditionModel))


def faster_layers(device: torch.device | str) -> frozenset[type[nn.Module]]:
    """The classes of layers whose fused version is faster on a device.

    On a CPU, the fused group norm and GEGLU save time by their C++. Where it does not run (`ddpo-fast info` says why),
    they would save memory but take longer, and so would the blocks that consist of them. On a GPU, PyTorch's linear
    layers are already the fastest.
    """
    if torch.device(device).type != "cpu":
        return FUSIBLE - {nn.Linear}
    always = frozenset((nn.Linear, lora.Linear, nn.Conv2d, UNet2DConditionModel))
    by_kernels = frozenset((nn.GroupNorm, GEGLU, ResnetBlock2D, Transformer2DModel))
    compiled = all(OPS[name].backend("cpu", torch.float32) == "csrc" for name in ("groupnorm_silu", "geglu"))
    return always | by_kernels if compiled else always


def fuse_unet(unet: Any, layers: Collection[type[nn.Module]] = FUSIBLE) -> Any:
    """Fuses layers of a diffusers UNet or transformer in place and returns it; it computes the same up to rounding.

    Group norms compute the SiLU that follows them and the concatenation before them, layer norms the sum before them.
    GEGLU, linear layers with an adapter and the three projections of a self-attention become one op each, convolutions
    with frozen weights do not save their input, 1x1 convolutions around transformers are linear layers, biases of a
    residual block are added with the time embedding and the shortcut, RMS norms are one kernel, and divisions by 1 are
    left out. A module that has no fitting version stays as it is. Layers that are fused already do not change, so this
    function can be called again after an adapter was added.

    Args:
        layers: the classes to fuse, of those in `FUSIBLE`. With `UNet2DConditionModel`, the rows of guidance share what
            they have in common (`shared_halves.py`).
    """
    # a transformer has no such layers
    last_norm = getattr(unet, "conv_norm_out", None)
    if nn.GroupNorm in layers and last_norm is not None and _are_plain(last_norm, unet.conv_act):
        unet.conv_norm_out.__class__, unet.conv_act.__class__ = GroupNormSiLU, SkippedSiLU
    # `modules` yields parents before children. So the norms of a residual block become `GroupNormSiLU` before the loop
    # visits them; visited earlier, they would become `FusedGroupNorm`, without the SiLU.
    for module in unet.modules():
        fused, fits = FUSED.get(type(module), (None, None)) if type(module) in layers else (None, None)
        if fused is not None and fits is not None and not is_patched(module) and fits(module):
            module.__class__ = fused
        if isinstance(module, FusedResnetBlock2D):
            module.norm1.__class__ = module.norm2.__class__ = GroupNormSiLU
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and is_plain(module):
            module.set_processor(SDPAProcessor())
        if isinstance(module, FusedJointTransformerBlock):
            for attention in (module.attn, module.attn2):
                if attention is not None and type(attention.processor) is JointAttnProcessor2_0:
                    attention.set_processor(JointProcessor())
    for module in unet.modules():
        if isinstance(module, FusedTransformer2DModel):
            first = module.transformer_blocks[0]
            if type(first) is FusedBasicTransformerBlock:
                first.first_of = (module,)
        if PLAIN.get(type(module), type(module)) in CROSS_BLOCKS:
            # a last residual block has no transformer after it
            for resnet, transformer in zip(module.resnets, module.attentions, strict=False):
                if type(resnet) is FusedResnetBlock2D and type(transformer) is FusedTransformer2DModel:
                    resnet.followed_by = module, transformer
    for block, after in pairwise(getattr(unet, "up_blocks", ())):
        if all(type(each) in (FusedUpBlock2D, FusedCrossAttnUpBlock2D) for each in (block, after)):
            block.read_by = (after,)
    if UNet2DConditionModel in layers:
        project_together(share_halves(unet), FusedResnetBlock2D, FusedBasicTransformerBlock)
    return unet


def unfuse_unet(unet: Any) -> Any:
    """Undoes `fuse_unet` in place and returns the UNet. Kernels that `set_attention` chose stay."""
    project_apart(unet)
    for module in unet.modules():
        for name in ("followed_by", "first_of", "read_by"):
            vars(module).pop(name, None)
        module.__class__ = PLAIN.get(type(module), type(module))
        if isinstance(module, Attention):
            processor: Any = module.processor
            if type(processor) is SDPAProcessor and processor.kernel is None:
                plain: Any = AttnProcessor2_0()
                module.set_processor(plain)
            if type(processor) is JointProcessor:
                module.set_processor(JointAttnProcessor2_0())
    return unet
