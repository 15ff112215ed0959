"""The definition of attention over packed keys and values, in plain PyTorch.

Tiles of tokens are dequantized one at a time and merged by their running maximum and sum (online softmax, Milakov
and Gimelshein 2018), so the cache is never dequantized as a whole. Arithmetic is in float32, or float64 for float64
queries.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..segments import Segments

TOKENS_PER_TILE = 2048
QUERIES_PER_TILE = 512


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
    """Softmax attention; query head `h` reads KV head `h // (H / H_kv)`.

    Args:
        query: `[B, H, S, D]`, the last `S` of the `T` cached tokens.
        key, value: segments of `[B, H_kv, T, D]` and `[B, H_kv, T, D_v]`.
        scaling: factor on `q·k`.
        mask: broadcastable to `[B, H, S, T]`; boolean (True is attended) or added to the scores. None is causal.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: one logit a query head that takes part in the softmax and has no value, `[H]` (GPT-OSS).

    Returns:
        `[B, H, S, D_v]` in the query's dtype. A row that may attend to nothing is 0.

    Raises:
        ValueError: if heads or lengths do not fit together.
    """
    check(query, key, value)
    if query.shape[2] > QUERIES_PER_TILE:
        return _by_query_tiles(query, key, value, scaling, mask, softcap, sinks)
    batch, heads, length, _ = query.shape
    kv_heads, tokens = key.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.to(dtype).reshape(batch, kv_heads, -1, query.shape[-1]) * scaling

    maximum = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    output = rows.new_zeros((*rows.shape[:3], value.shape[-1]))
    if sinks is not None:
        per_row = sinks.to(dtype).view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, length, 1)
        maximum, total = per_row.reshape(maximum.shape), torch.ones_like(maximum)

    for start, stop in pairwise(_tile_edges(key, value)):
        scores = rows @ key.read(start, stop, dtype).transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores.view(batch, heads, length, -1), mask, start, stop, tokens).view_as(scores)
        peak = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        shift = torch.where(peak == -torch.inf, 0.0, peak)
        weights = (scores - shift).exp()
        decay = (maximum - shift).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        output = output * decay + weights @ value.read(start, stop, dtype)
        maximum = peak
    output = output / torch.where(total == 0, 1.0, total)
    return output.view(batch, heads, length, -1).to(query.dtype)


def check(query: Tensor, key: Segments, value: Segments) -> None:
    """Raise ValueError unless heads, sizes and lengths fit together."""
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"keys {list(key.shape)} and values {list(value.shape)} differ in batch, heads or tokens")
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        raise ValueError(f"queries {list(query.shape)} do not fit keys {list(key.shape)}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries but only {key.shape[2]} cached tokens")


def _tile_edges(key: Segments, value: Segments) -> list[int]:
    """Tile boundaries that fall on every segment's edge, so that no page is read twice."""
    tokens = key.shape[2]
    marks = sorted({0, *key.edges, *value.edges, tokens})
    edges = [0]
    for start, stop in pairwise(marks):
        edges += [*range(start + TOKENS_PER_TILE, stop, TOKENS_PER_TILE), stop]
    return edges


def _masked(scores: Tensor, mask: Tensor | None, start: int, stop: int, tokens: int) -> Tensor:
    """Scores `[B, H, S, stop - start]` with what may not be attended at -inf."""
    length = scores.shape[2]
    if mask is None:
        if length == 1:
            return scores
        last_seen = torch.arange(tokens - length, tokens, device=scores.device)[:, None]
        mask = torch.arange(start, stop, device=scores.device) <= last_seen
    else:
        mask = mask[..., start:stop]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _by_query_tiles(
    query: Tensor,
    key: Segments,
    value: Segments,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Long prompts: a bounded number of queries at a time, each tile with the causal mask of its own rows."""
    length, tokens = query.shape[2], key.shape[2]
    outputs = []
    for start in range(0, length, QUERIES_PER_TILE):
        stop = min(start + QUERIES_PER_TILE, length)
        if mask is None:
            last_seen = torch.arange(tokens - length + start, tokens - length + stop, device=query.device)
            rows = torch.arange(tokens, device=query.device) <= last_seen[:, None]
        else:
            rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
        tile = query[:, :, start:stop]
        outputs.append(attend(tile, key, value, scaling=scaling, mask=rows, softcap=softcap, sinks=sinks))
    return torch.cat(outputs, dim=2)
