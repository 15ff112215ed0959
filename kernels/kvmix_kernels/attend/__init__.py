"""Attention of queries over sink | packed pages | tail.

`naive` is the definition, `cpu` the native path, `triton` that of GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..fallback import warn_once
from ..native import library
from ..segments import Segments
from . import cpu, naive

__all__ = ["attend", "attend_lse"]


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
    """Softmax attention over packed keys and values: the first result of `attend_lse`."""
    return attend_lse(query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)[0]


def attend_lse(
    query: Tensor,
    key: Segments,
    value: Segments,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithms of its sums of weights; see `naive.attend` for arguments, results and errors.

    On a CPU the native path is the faster one, packed or not, at any number of queries (bench/results.csv, op
    `attend-rows`).
    """
    naive.check(query, key, value)
    possible = query.dtype != torch.float64 and not _is_differentiated(query, key, value)
    if possible and gpu.is_usable(query.device):
        from . import triton

        reason = triton.unsupported(query, key, value)
        if reason is not None:
            warn_once(f"attention over {reason} has no GPU kernel; falling back to slow PyTorch")
        elif triton.is_trusted(query, key, value, mask, softcap):
            return triton.attend(query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)
    native = library() if possible and query.device.type == "cpu" else None
    if native is not None and cpu.supports(query, key, value):
        return cpu.attend(native, query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)
    if native is not None:
        warn_once(f"attention over {cpu.describe(key, value)} has no CPU kernel; falling back to slow PyTorch")
    return naive.attend(query, key, value, scaling=scaling, mask=mask, softcap=softcap, sinks=sinks)


def _is_differentiated(query: Tensor, key: Segments, value: Segments) -> bool:
    """Whether autograd must see the arithmetic, which it cannot inside a kernel."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, key.tail, value.tail))
