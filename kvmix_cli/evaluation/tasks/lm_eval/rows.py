"""Rows of a batch enter a cache together, each from its own first token: nothing is ever padded before them.

Padding on the left would take the places of the sink, shift every page, and lie in the quantization groups of real
tokens. So the rows of a batch have the same number of tokens to prefill; what follows may differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ....cache.subject import attended
from ....decoding.feed import prefill

if TYPE_CHECKING:
    from transformers import Cache

    from ....cache.subject import Subject
    from ....models.loading import LoadedModel
    from .requests import Request


def enter(loaded: LoadedModel, subject: Subject, batch: Sequence[Request], reserve: int) -> Cache:
    """A fresh cache that holds every row's prefilled tokens; a context that several rows share is computed once."""
    cache = subject.cache(loaded.config, reserve=reserve)
    prefixes = [request.ids[: request.prefill] for request in batch]
    if not prefixes[0]:
        return cache
    distinct = list(dict.fromkeys(prefixes)) if subject.baseline is None else prefixes
    prefill(loaded, cache, torch.tensor(distinct, device=loaded.device))
    if len(distinct) < len(prefixes):
        where = {prefix: row for row, prefix in enumerate(distinct)}
        cache.reorder_cache(torch.tensor([where[prefix] for prefix in prefixes], device=loaded.device))
    return cache


def shares(cache: Cache, rows: int) -> dict[str, float]:
    """What attention has seen of a batch's cache, a row's equal part of it."""
    return {key: pairs / rows for key, pairs in attended(cache).items()}
