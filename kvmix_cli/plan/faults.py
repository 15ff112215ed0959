"""What in a plan does not fit its model, by the place in the file that says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .channels import ChannelPolicy
from .codec import TransformTensor
from .document.geometry import ModelInfo, coverage_faults
from .document.strict_yaml import Fault, reason
from .layers import LayerPlan
from .settings import CacheSettings


def model_faults(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault for everything that the heads of a model cannot have."""
    yield from _channel_faults(cache.channels, model)
    yield from _codec_faults(layers, cache, model)
    yield from _own_faults(layers, cache, model)


def early_faults(data: Any) -> list[Fault]:
    """Return what does not fit the model of a file, as far as it can be told beside the file's other faults."""
    layers, cache = data.get("layers"), data.get("cache")
    faults: list[Fault] = []
    try:
        info = ModelInfo.model_validate(data.get("model"))
        if isinstance(layers, dict) and all(type(layer) is int for layer in layers):
            faults += [(("layers", *at), message) for at, message in coverage_faults(info, layers)]
        if isinstance(cache, dict) and "channels" in cache:
            faults += _channel_faults(ChannelPolicy.model_validate(cache["channels"]), info)
    except ValueError:
        pass
    return faults


def _channel_faults(channels: ChannelPolicy | None, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault if the heads of a model cannot be cut into a policy's channel groups."""
    if channels is None:
        return
    try:
        for heads in model.geometries:
            channels.widths(heads.key_dim)
    except ValueError as error:
        yield ("cache", "channels"), f"cache.channels: {error}"


def _codec_faults(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault for transform codes that do not fit their layer, or whose basis is not stated."""
    for index in sorted(layers.keys() & set(model.quantizable)):
        heads = model.heads(index)
        for tensor, kind in layers[index].tensors:
            if isinstance(tensor, TransformTensor):
                at = ("layers", index, kind[0])
                for fault in tensor.faults(heads.kv_heads, heads.dim(kind)):
                    yield (*at, "widths"), f"{'.'.join(map(str, at))}: {fault}"
                if cache.transform is None:
                    yield (*at, "codec"), f"{'.'.join(map(str, at))}: a transform needs its basis in cache.transform"


def _own_faults(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault for what a layer, or a group of its heads, has of its own that does not fit cache or model."""
    for index in sorted(layers.keys() & set(model.quantizable)):
        layer, kv_heads = layers[index], model.heads(index).kv_heads
        faults = list(layer.head_faults(kv_heads))
        if layer.head_groups and cache.tokens is not None and cache.tokens.by_layer is not None:
            faults.append("layers that share out tokens as the prompt has it (by_layer) have no groups of heads")
        if layer.head_groups and cache.codecs is not None and cache.codecs.codebooks is not None:
            faults.append("codebooks are of all KV heads of a layer, which has no groups of heads then")
        yield from ((("layers", index, "head_groups"), f"layers.{index}.head_groups: {fault}") for fault in faults)
        for _, part in [] if faults else layer.parts(kv_heads):
            try:
                own = part.settings(cache)
                found = [*own.tokens.faults(cache.page), *own.budget_faults()] if own.tokens and part.tokens else []
            except ValueError as error:
                found = [reason(error)]
            yield from ((("layers", index, "tokens"), f"layers.{index}.tokens: {fault}") for fault in found)
