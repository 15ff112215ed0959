"""Bytes of a cache, counted from the tensors that it holds: our layers, stock layers, and wrapped tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache

from .layer import MixedLayer


def cache_nbytes(cache: Cache) -> int:
    """Return the bytes in use by any transformers cache, quantized or not."""
    return sum(layer_nbytes(layer) for layer in cache.layers)


def layer_nbytes(layer: Any) -> int:
    """Return the bytes in use by one layer."""
    return layer.nbytes + layer.state_nbytes if isinstance(layer, MixedLayer) else stock_nbytes(layer)


def stock_nbytes(layer: Any) -> int:
    """Return the bytes of a stock layer's keys, values, codes, scales and zeros, without its counters."""
    tensors = _tensors(vars(layer))
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim > 0 or tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value.

    A wrapper's own `nbytes` counts its numbers unquantized, so the tensors inside are counted instead.
    """
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _tensors([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
