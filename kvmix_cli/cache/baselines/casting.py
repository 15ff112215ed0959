"""A cache that stores keys and values in another dtype than the model's, and casts them back when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..mixed import CountingCache, unquantized_cache

FP8 = torch.float8_e4m3fn


class CastLayer(DynamicLayer):
    """Keys and values of one layer in the dtype `stored`.

    The first `update` returns what it was given, as every cache here does: a prompt attends to itself as it is.
    """

    def __init__(self, stored: torch.dtype) -> None:
        super().__init__()
        self.stored = stored

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values and return all of them in the dtype of the new ones."""
        first = self.get_seq_length() == 0
        keys, values = super().update(self._cast(key_states), self._cast(value_states), *args, **kwargs)
        if first:
            return key_states, value_states
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def _cast(self, states: Tensor) -> Tensor:
        """Return states in the stored dtype; numbers beyond its range become its largest, not NaN."""
        if self.stored == FP8:
            largest = torch.finfo(FP8).max
            states = states.clamp(-largest, largest)
        return states.to(self.stored)


class CastCache(CountingCache):
    """All layers that keep keys and values and nothing else in one dtype; the others keep their stock layer.

    8-bit numbers count as quantized, 16-bit ones do not.
    """

    def __init__(self, stored: torch.dtype, config: PreTrainedConfig) -> None:
        layers = unquantized_cache(config).layers
        super().__init__([CastLayer(stored) if type(layer) is DynamicLayer else layer for layer in layers])
        self._quantizes = stored.itemsize == 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all of them, `[B, H_kv, T, D]`."""
        layer = self.layers[layer_idx]
        packed = self._quantizes and isinstance(layer, CastLayer) and layer.get_seq_length() > 0
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.attended.add(key_states, keys, quantized=None if packed else 0)
        return keys, values
