"""What a stock layer of transformers holds, whatever its kind: sliding keys, recurrent states, an indexer's keys.

These layers describe nothing by themselves, so their attributes are kept as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .archive import Archive

PLAIN = (bool, int, float, str, type(None))


def exchange_stock(layer: Any, archive: Archive) -> None:
    """Give all attributes of a stock layer to an archive, or set those of an empty one of the same kind.

    Raises:
        CacheError: for an attribute that a file cannot hold, or that such a layer does not have.
    """
    held = vars(layer)
    for name in archive.fact("attributes", sorted(held)):
        if name not in held and hasattr(type(layer), name):
            raise archive.fault(name, f"is no attribute that a {type(layer).__name__} keeps")
        value = _exchanged(archive, name, held.get(name))
        if archive.is_reading:
            setattr(layer, name, value)


def stock_cut(layer: Any, tokens: int, held: int) -> int:
    """Return the longest length, at most `tokens`, that a stock layer with `held` tokens can be cropped to; or 0."""
    is_full = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
    return tokens if tokens == held or (layer.is_croppable and not is_full) else 0


def _exchanged(archive: Archive, name: str, value: Any) -> Any:
    """Give an attribute, or return the file's."""
    kind = archive.fact(f"{name}.kind", _kind(value))
    if kind == "plain":
        return archive.fact(name, value)
    if kind == "tensor":
        return archive.tensor(name, value, None, None)
    if kind == "dtype":
        return archive.dtype(name, value)
    if kind == "device":
        return archive.example.device if archive.is_reading else value
    if kind == "dict":
        keys = archive.fact(f"{name}.keys", list(value) if isinstance(value, dict) else [])
        return {key: _exchanged(archive.part(name), f"{key}", (value or {}).get(key)) for key in keys}
    if kind == "configuration" and isinstance(value, PreTrainedConfig):
        return value
    raise archive.fault(name, f"is of type {type(value).__name__}, which no file holds")


def _kind(value: Any) -> str:
    kinds = {Tensor: "tensor", torch.dtype: "dtype", torch.device: "device", dict: "dict"}
    kinds |= {PreTrainedConfig: "configuration"} | dict.fromkeys(PLAIN, "plain")
    return next((kind for of, kind in kinds.items() if isinstance(value, of)), "unknown")
