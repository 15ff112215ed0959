"""Files of codebooks as tensors, each made once for a device and shared by all caches of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..codecs.vectors import LearnedVectors
from ..plan import CacheSettings, HeadGeometry
from ..plan.tensor_files import open_codebooks
from ..plan.tensors.basis import TensorName
from ..plan.tensors.codebooks import Codebooks
from ..plan.tensors.moments import Rope
from .buffer import lasting
from .rotary import turned

TENSORS = 512
"""Keys or values of a layer whose codebooks are kept in memory."""
Turn = Callable[[Tensor, int], Tensor]
"""A function of pages of keys `[B, H_kv, n, page, D]` and the number of the first of them, to pages."""


def books_of(cache: CacheSettings, index: int, codec: LearnedVectors, kv_heads: int, device: torch.device) -> Tensor:
    """Return the codebooks of one layer's keys or values, `[H_kv, D / span, 2^(bits * span), span]` float32.

    Args:
        cache: settings with the file and its checksum.
        index: of the layer.
        codec: without its codebooks.
        kv_heads: KV heads of the layer.
        device: of the tensor.

    Raises:
        PlanError: if the file cannot be used, or does not fit.
    """
    if cache.codecs is None:
        raise AssertionError("learned codecs are those of the plan")
    path, file = open_codebooks(cache.codecs)
    heads = HeadGeometry(kv_heads=kv_heads, key_dim=codec.head_dim, value_dim=codec.head_dim)
    kind: TensorName = "k" if codec.kind == "key" else "v"
    file.tensor(path, index, kind, codec.bits, heads)
    return _books(file, index, kind, codec.bits, device)


def turns_of(cache: CacheSettings, index: int) -> tuple[Turn, Turn] | None:
    """Return the turns of a layer's keys back to position 0, before they are coded, and forth again; None for none.

    Positions are those of the cache, of which pages follow the sinks. Raises PlanError if the file cannot be used.
    """
    if cache.codecs is None or cache.codecs.codebooks is None:
        return None
    rope = open_codebooks(cache.codecs)[1].rope.get(index)
    if rope is None:
        return None

    def back(pages: Tensor, first: int) -> Tensor:
        return _turned(pages, rope, cache.sink, first, -1)

    def forth(pages: Tensor, first: int) -> Tensor:
        return _turned(pages, rope, cache.sink, first, 1)

    return back, forth


def _turned(pages: Tensor, rope: Rope, sink: int, first: int, sign: int) -> Tensor:
    """Return pages turned by the positions of their tokens, forth for a `sign` of 1 and back for one of -1."""
    count, page = pages.shape[2:4]
    positions = sink + first * page + torch.arange(count * page, device=pages.device)
    states: Tensor = turned(pages.flatten(2, 3), rope, sign * positions).unflatten(2, (count, page))
    return states


@lru_cache(maxsize=TENSORS)
@lasting
def _books(file: Codebooks, index: int, kind: TensorName, bits: int, device: torch.device) -> Tensor:
    return torch.from_numpy(file.layers[index][kind][bits]).to(device, torch.float32)
