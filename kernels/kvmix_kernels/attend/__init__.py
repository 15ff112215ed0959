"""Attention of queries over sink | packed pages | tail: `naive` is the definition, `cpu` the native path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fallback import warn_once
from ..native import library
from ..segments import Segments
from . import cpu, naive

MOST_NATIVE_ROWS = 64
"""Query rows of a KV head up to which the native path is used. Longer chunks are left to matrix products on dequantized
tiles: there are enough rows to pay for the dequantization (bench/results.csv, op `attend-rows`)."""

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Segments,
    value: Segments,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention over packed keys and values; see `naive.attend` for arguments, result and errors."""
    naive.check(query, key, value)
    rows = query.shape[2] * query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and query.dtype != torch.float64 and rows <= MOST_NATIVE_ROWS:
        native = library()
        if native is not None and cpu.supports(query, key, value):
            return cpu.attend(native, query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)
        if native is not None:
            warn_once(f"attention over {cpu.describe(key, value)} has no CPU kernel; falling back to slow PyTorch")
    return naive.attend(query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)
