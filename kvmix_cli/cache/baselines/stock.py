"""transformers' own quantized cache, with a count of what its queries read."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import QuantizedCache

from ..mixed import Attended


class StockQuantizedCache(QuantizedCache):
    """`QuantizedCache`, unchanged in all that it does.

    At a flush it quantizes everything again, what had been quantized before included, and every step dequantizes all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attended = Attended()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; returns all of them, `[B, H_kv, T, D]`."""
        quantized = _quantized_tokens(self.layers[layer_idx])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.attended.add(key_states, keys, quantized)
        return keys, values


def _quantized_tokens(layer: Any) -> int | None:
    """Tokens of those held that the next query reads in quantized form; None for those of the query itself as well."""
    held: int = layer.get_seq_length()
    if held == 0:
        return 0
    if not hasattr(layer, "residual_length"):  # fp8 appends what is new and then reads everything back
        return None
    return held - (layer.keys.shape[-2] if layer.keys.dim() == 4 else 0)
