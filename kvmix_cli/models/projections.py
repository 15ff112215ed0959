"""K and V projections: the weights that make the keys and values of every decoder layer.

Most models have a module for each. Some fuse them with Q into one weight, in one of two arrangements of its output
features, each in blocks of `head_dim`:

    concatenated    [all query heads | all key heads | all value heads]                 Phi-3, MPT, GPT-2, ...
    grouped         one group a KV head: [its query heads | its key | its value]        GPT-NeoX, BLOOM, Falcon, ...

Multi-head latent attention has one weight for what it caches, `[latent | rotary part]`, its key and its value here.

Falcon's three variants are all grouped: a group has all query heads (multi-query), one (plain) or several. The same
name has both arrangements in different families (`query_key_value`), so model types are listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ProjectionError
from ..plan import ModelInfo

PAIRS = (("k_proj", "v_proj"), ("key_proj", "value_proj"), ("key", "value"), ("wk", "wv"), ("Wk", "Wv"))
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "W_pack", "wqkv", "qkv")
CONCATENATED = frozenset({"dbrx", "gpt2", "mpt", "phi3", "phi4_multimodal"})
LATENT = ("kv_a_proj_with_mqa",)
GROUPED = frozenset({"bloom", "falcon", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "persimmon"})


@dataclass(frozen=True, eq=False)
class Projection:
    """The weight, or the part of a fused weight, that makes one layer's keys or values.

    Attributes:
        name: of the parameter in the model.
        weight: the whole parameter, `[out, in]`, or `[in, out]` in a `Conv1D`.
        features: indices of its output features, None for all.
        axis: the output axis of the weight.
    """

    name: str
    weight: nn.Parameter
    features: Tensor | None = None
    axis: int = 0

    def part(self, gradient: Tensor) -> Tensor:
        """Return the part of a tensor, shaped like the weight, that belongs to this projection."""
        return gradient if self.features is None else gradient.index_select(self.axis, self.features)

    def heads(self, gradient: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        """Return the same part, cut into heads."""
        part = self.part(gradient)
        heads: tuple[Tensor, ...] = part.tensor_split(part.shape[self.axis] // head_dim, dim=self.axis)
        return heads


class LayerProjections(NamedTuple):
    """Both projections of one layer."""

    k: Projection
    v: Projection


def find_projections(model: PreTrainedModel, info: ModelInfo) -> dict[int, LayerProjections]:
    """Return the K and V projections of every layer that can be quantized.

    Raises:
        ProjectionError: if they are not found, or their weights cannot have gradients.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = decoder_layers(model, info)
    found = {index: _find(layers[index], index, model, info, names) for index in info.quantizable}
    for index, pair in found.items():
        for projection in pair:
            _require_differentiable(projection, index, info)
    return found


def decoder_layers(model: PreTrainedModel, info: ModelInfo) -> nn.ModuleList:
    """Return the stack of decoder layers. Raises ProjectionError if there is none of the model's depth."""
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == info.layers:
            return module
    raise ProjectionError(f"cannot find the layers of {info.id}: looked for a ModuleList of {info.layers} modules")


def _find(
    layer: nn.Module, index: int, model: PreTrainedModel, info: ModelInfo, names: dict[int, str]
) -> LayerProjections:
    for module in layer.modules():
        for k_name, v_name in PAIRS:
            k, v = _weight(module, k_name), _weight(module, v_name)
            if k is not None and v is None and getattr(module, v_name, k) is None:
                v = k  # Gemma 4: values are made of the keys' projection
            if k is not None and v is not None:
                return LayerProjections(Projection(names[id(k)], k), Projection(names[id(v)], v))
        for name in LATENT:
            latent = _weight(module, name)
            heads = info.heads(index)
            if latent is not None and latent.shape[0] == heads.token_elements:
                parts = torch.arange(latent.shape[0], device=latent.device).split((heads.key_dim, heads.value_dim))
                return LayerProjections(*(Projection(names[id(latent)], latent, part) for part in parts))
        for name in FUSED:
            fused = _weight(module, name)
            if fused is not None:
                axis = 1 if isinstance(getattr(module, name), Conv1D) else 0
                return _split(names[id(fused)], fused, axis, model, info)
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    linear = sorted({name.split(".")[-1] for name, module in layer.named_modules() if _weight(module) is not None})
    raise ProjectionError(
        f"cannot find the K and V projections of {info.id} in layer {index} ({type(layer).__name__}): looked for "
        f"{pairs} or a fused {', '.join(FUSED)}; it has {', '.join(linear) or 'no matrices'}"
    )


def _weight(module: nn.Module, child: str = "") -> nn.Parameter | None:
    """Return the matrix of a module, or of its named child; None if there is none."""
    owner = getattr(module, child, None) if child else module
    weight = getattr(owner, "weight", None) if isinstance(owner, nn.Module) else None
    return weight if isinstance(weight, nn.Parameter) and weight.ndim == 2 else None


def _split(name: str, weight: nn.Parameter, axis: int, model: PreTrainedModel, info: ModelInfo) -> LayerProjections:
    """Return the parts of a fused weight. Raises ProjectionError if its arrangement is not known."""
    config = model.config.get_text_config(decoder=True)
    blocks, rest = divmod(weight.shape[axis], info.head_dim)
    kv_heads, odd = divmod(blocks - config.num_attention_heads, 2)
    known = config.model_type in CONCATENATED | GROUPED
    if not known or rest or odd or kv_heads < 1 or config.num_attention_heads % kv_heads:
        raise ProjectionError(
            f"cannot tell K and V apart in {name} {list(weight.shape)} of {info.id}: the arrangement is known for "
            f"{', '.join(sorted(CONCATENATED | GROUPED))}, and this is {config.model_type}"
        )
    split = _concatenated if config.model_type in CONCATENATED else _grouped
    features = torch.arange(weight.shape[axis], device=weight.device).view(blocks, info.head_dim)
    k, v = split(features, kv_heads)
    return LayerProjections(*(Projection(name, weight, part.flatten(), axis) for part in (k, v)))


def _concatenated(features: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    return features[-2 * kv_heads : -kv_heads], features[-kv_heads:]


def _grouped(features: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    groups = torch.unflatten(features, 0, (kv_heads, -1))
    return groups[:, -2], groups[:, -1]


def _require_differentiable(projection: Projection, index: int, info: ModelInfo) -> None:
    weight = projection.weight
    if weight.is_meta:
        raise ProjectionError(
            f"layer {index} of {info.id} is offloaded ({projection.name}), so its gradient cannot be taken: "
            "profile where the whole model fits"
        )
    is_packed = type(weight.data) is not Tensor  # a quantizer's own class, such as torchao's
    if is_packed or not weight.is_floating_point() or weight.itemsize < 2:
        stored = type(weight.data).__name__ if is_packed else weight.dtype
        raise ProjectionError(
            f"{projection.name} of {info.id} is stored as {stored}, which has no gradient: "
            "profile the checkpoint without weight quantization; its plan fits both"
        )
