"""K and V projections: the weights that make the keys and values of every decoder layer.

Most models have a module for each. Some fuse them with Q into one weight, in one of two arrangements of its output
features, each in blocks of `head_dim`:

    concatenated    [all query heads | all key heads | all value heads]                 Phi-3, MPT, GPT-2, ...
    grouped         one group a KV head: [its query heads | its key | its value]        GPT-NeoX, BLOOM, Falcon, ...

CodeGen has four parts, one for each core it was trained on, of [query heads | value heads | key heads]. JetMoE fuses
keys and values alone, [all key heads | all value heads].

Multi-head latent attention has one weight for what it caches, `[latent | rotary part]`, its key and its value here.

Falcon's three variants are all grouped: a group has all query heads (multi-query), one (plain) or several. The same
name has both arrangements in different families (`query_key_value`), so model types are listed.

A weight may be packed into 4 or 8 bits by one of many libraries. All of them keep it in a module with `in_features` and
`out_features`; what the packed tensors are called, and whether there is a `weight`, differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ProjectionError
from ..plan import HeadGeometry, ModelInfo

PAIRS = (("k_proj", "v_proj"), ("key_proj", "value_proj"), ("key", "value"), ("wk", "wv"), ("Wk", "Wv"))
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "W_pack", "wqkv", "qkv")
KEYS_AND_VALUES = "kv_proj"
"""A fused weight without queries (JetMoE)."""
CONCATENATED = frozenset({"dbrx", "gpt2", "mpt", "phi3", "phi4_multimodal"})
LATENT = ("kv_a_proj_with_mqa",)
PARTS = {"codegen": 4}
"""Parts of a weight that each have queries, values and keys, in this order."""
GROUPED = frozenset({"bloom", "falcon", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "persimmon"})


@dataclass(frozen=True, eq=False)
class Projection:
    """The weight, or the part of a fused weight, that makes one layer's keys or values.

    Attributes:
        name: of the weight in the model.
        module: the module that has the weight.
        weight: the whole parameter, `[out, in]`, or `[in, out]` in a `Conv1D`; None for a packed one.
        features: indices of its output features, None for all.
        axis: the output axis of the weight; 0 for a packed one.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter | None
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
        ProjectionError: if they are not found, or are offloaded to where no gradient is computed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_layers(model, info)
    found = {index: _find(layers[index], index, model, info, names) for index in info.quantizable}
    for index, pair in found.items():
        for projection in pair:
            if any(weight.is_meta for weight in projection.module.parameters()):
                raise ProjectionError(
                    f"layer {index} of {info.id} is offloaded ({projection.name}), so its gradient cannot be taken: "
                    "profile where the whole model fits"
                )
    return found


def packed_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the linear modules whose weights are packed, so that no gradient of theirs exists."""
    return [module for module in model.modules() if _is_linear(module) and _dense(module) is None]


def decoder_layers(model: PreTrainedModel, info: ModelInfo) -> Sequence[nn.Module]:
    """Return the decoder layers in order, or where these have several attentions each (LongCat), the attentions.

    An encoder of images inside the model may be as deep (GIT); its layers do not say which they are in a cache.

    Raises:
        ProjectionError: if there are not as many as the cache has layers.
    """
    stacks = [
        module
        for root in (model.get_decoder(), model)
        for module in root.modules()
        if isinstance(module, nn.ModuleList) and len(module) == info.layers
    ]
    if stacks:
        cached = [stack for stack in stacks if any(map(_has_index, stack.modules()))]
        return list((cached or stacks)[0])
    indexed = {module.layer_idx: module for module in model.modules() if _has_index(module) and _is_innermost(module)}
    if sorted(indexed) == list(range(info.layers)):
        return [indexed[index] for index in range(info.layers)]
    raise ProjectionError(
        f"cannot find the layers of {info.id}: looked for a ModuleList of {info.layers} modules, or as many with a "
        "layer_idx of their own"
    )


def _has_index(module: nn.Module) -> bool:
    """Return whether a module says which layer it is in a cache."""
    return isinstance(getattr(module, "layer_idx", None), int)


def _is_innermost(module: nn.Module) -> bool:
    """Return whether no module inside this one says which layer it is."""
    return not any(map(_has_index, (part for part in module.modules() if part is not module)))


def _find(
    layer: nn.Module, index: int, model: PreTrainedModel, info: ModelInfo, names: dict[int, str]
) -> LayerProjections:
    for module in layer.modules():
        for k_name, v_name in PAIRS:
            k, v = _child(module, k_name), _child(module, v_name)
            if k is not None and v is None and getattr(module, v_name, k) is None:
                v = k  # Gemma 4: values are made of the keys' projection
            if k is not None and v is not None:
                return LayerProjections(_projection(k, names), _projection(v, names))
        for name in LATENT:
            latent = _child(module, name)
            if latent is not None and _features(latent) == info.heads(index).token_elements:
                return _latent(_projection(latent, names), info.heads(index))
        both = _child(module, KEYS_AND_VALUES)
        if both is not None and _features(both) == info.heads(index).token_elements:
            return _halves(_projection(both, names))
        for name in FUSED:
            fused = _child(module, name)
            if fused is not None:
                return _split(_projection(fused, names), model, info)
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    linear = sorted({name.split(".")[-1] for name, module in layer.named_modules() if _is_linear(module)})
    raise ProjectionError(
        f"cannot find the K and V projections of {info.id} in layer {index} ({type(layer).__name__}): looked for "
        f"{pairs} or a fused {', '.join(FUSED)}; it has {', '.join(linear) or 'no matrices'}"
    )


def _child(module: nn.Module, name: str) -> nn.Module | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Module) and _is_linear(child) else None


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module has a matrix, packed or not."""
    has_sizes = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return has_sizes or _dense(module) is not None


def _dense(module: nn.Module) -> nn.Parameter | None:
    """Return the matrix of a module; None if it has none, or it is packed."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    # A quantizer has a class of its own for packed tensors, or packs several numbers into an integer.
    is_foreign = not isinstance(weight.data, DTensor) and type(weight.data) is not Tensor
    is_packed = is_foreign or not weight.is_floating_point() or weight.itemsize < 2
    return None if is_packed else weight


def _projection(module: nn.Module, names: dict[int, str]) -> Projection:
    return Projection(f"{names[id(module)]}.weight", module, _dense(module), axis=int(isinstance(module, Conv1D)))


def _features(module: nn.Module) -> int:
    """Return the number of output features of a linear module."""
    weight, sizes = _dense(module), cast(Any, module)
    return int(sizes.out_features if weight is None else weight.shape[int(isinstance(module, Conv1D))])


def _device(module: nn.Module) -> torch.device:
    return next(iter((*module.parameters(), *module.buffers()))).device


def _latent(whole: Projection, heads: HeadGeometry) -> LayerProjections:
    """Return the latent, which is cached as a key, and the rotary part, cached as a value."""
    features = torch.arange(heads.token_elements, device=_device(whole.module))
    key, value = features.split((heads.key_dim, heads.value_dim))
    return LayerProjections(replace(whole, features=key), replace(whole, features=value))


def _halves(whole: Projection) -> LayerProjections:
    """Return the two halves of a weight that has keys and values alone."""
    features = torch.arange(_features(whole.module), device=_device(whole.module))
    key, value = features.chunk(2)
    return LayerProjections(replace(whole, features=key), replace(whole, features=value))


def _split(whole: Projection, model: PreTrainedModel, info: ModelInfo) -> LayerProjections:
    """Return the parts of a fused weight. Raises ProjectionError if its arrangement is not known."""
    config = model.config.get_text_config(decoder=True)
    size = _features(whole.module)
    blocks, rest = divmod(size, info.head_dim)
    kv_heads, odd = divmod(blocks - config.num_attention_heads, 2)
    known = config.model_type in CONCATENATED | GROUPED | PARTS.keys()
    if not known or rest or odd or kv_heads < 1 or config.num_attention_heads % kv_heads:
        raise ProjectionError(
            f"cannot tell K and V apart in {whole.name} of {size} features of {info.id}: the arrangement is known for "
            f"{', '.join(sorted(CONCATENATED | GROUPED | PARTS.keys()))}, and this is {config.model_type}"
        )
    if parts := PARTS.get(config.model_type):
        by_part = torch.arange(size, device=_device(whole.module)).view(parts, 3, -1)
        return LayerProjections(*(replace(whole, features=by_part[:, place].flatten()) for place in (2, 1)))
    split = _concatenated if config.model_type in CONCATENATED else _grouped
    features = torch.arange(size, device=_device(whole.module)).view(blocks, info.head_dim)
    k, v = split(features, kv_heads)
    return LayerProjections(*(replace(whole, features=part.flatten()) for part in (k, v)))


def _concatenated(features: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    return features[-2 * kv_heads : -kv_heads], features[-kv_heads:]


def _grouped(features: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    groups = torch.unflatten(features, 0, (kv_heads, -1))
    return groups[:, -2], groups[:, -1]
