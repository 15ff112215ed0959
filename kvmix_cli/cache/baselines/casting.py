"""Caches that store keys and values as other engines do: in a smaller dtype, or rounded as their formats round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ...errors import EvaluationError
from ...plan.engines.formats import EngineFormat
from ..mixed import CountingCache, unquantized_cache
from .rounding import FP8, Rounding, rounding, to_fp8

FormatPair = tuple[EngineFormat, EngineFormat]
"""Formats of a layer's keys and of its values."""


class RoundedLayer(DynamicLayer):
    """Keys and values of one layer, changed when they are stored.

    The first `update` returns what it was given, as every cache here does: a prompt attends to itself as it is.

    Args:
        keys: function that returns what is kept of new keys.
        values: the same for values.
        quantizes: what is kept counts as quantized.
    """

    def __init__(self, keys: Rounding, values: Rounding, *, quantizes: bool) -> None:
        super().__init__()
        self.keep_keys, self.keep_values, self.quantizes = keys, values, quantizes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values and return all of them in the dtype of the new ones."""
        first = self.get_seq_length() == 0
        keys, values = super().update(self.keep_keys(key_states), self.keep_values(value_states), *args, **kwargs)
        if first:
            return key_states, value_states
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class CastLayer(RoundedLayer):
    """Keys and values of one layer in the dtype `stored`; 8-bit numbers count as quantized, 16-bit ones do not."""

    def __init__(self, stored: torch.dtype) -> None:
        cast = partial(_cast, stored=stored)
        super().__init__(cast, cast, quantizes=stored.itemsize == 1)


def _cast(states: Tensor, stored: torch.dtype) -> Tensor:
    """Return states in the stored dtype; numbers beyond fp8's range become its largest, not NaN."""
    return to_fp8(states) if stored == FP8 else states.to(stored)


class RoundedCache(CountingCache):
    """Some layers whose keys and values are changed when they are stored, among stock layers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all of them, `[B, H_kv, T, D]`."""
        layer = self.layers[layer_idx]
        packed = isinstance(layer, RoundedLayer) and layer.quantizes and layer.get_seq_length() > 0
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.attended.add(key_states, keys, quantized=None if packed else 0)
        return keys, values


class CastCache(RoundedCache):
    """All layers that keep keys and values and nothing else in one dtype; the others keep their stock layer."""

    def __init__(self, stored: torch.dtype, config: PreTrainedConfig) -> None:
        layers = unquantized_cache(config).layers
        super().__init__([CastLayer(stored) if type(layer) is DynamicLayer else layer for layer in layers])


class EngineCache(RoundedCache):
    """Layers in the formats of another engine; those that are not named, and in full precision, are stock layers.

    What is kept is what the engine would read back, in float32: it saves no memory.

    Args:
        formats: by layer.

    Raises:
        EvaluationError: for a layer that keeps more than keys and values, or only some of them.
    """

    def __init__(self, formats: Mapping[int, FormatPair], config: PreTrainedConfig) -> None:
        layers = unquantized_cache(config).layers
        for index, (k, v) in formats.items():
            if k.is_full and v.is_full:
                continue
            if type(layers[index]) is not DynamicLayer:
                kind = type(layers[index]).__name__
                raise EvaluationError(f"layer {index} is a {kind}, whose storage elsewhere is not simulated")
            layers[index] = RoundedLayer(rounding(k), rounding(v), quantizes=True)
        super().__init__(layers)
