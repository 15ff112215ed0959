"""The definition of attention over packed keys and values, in plain PyTorch.

Tiles of tokens are dequantized one at a time and merged by their running maximum and sum (online softmax, Milakov
and Gimelshein 2018), so the cache is never dequantized as a whole. Arithmetic is in float32, or float64 for float64
queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..segments import Segments
from .parts import Part, check_tiers, parts_of

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
) -> tuple[Tensor, Tensor]:
    """Softmax attention; query head `h` reads KV head `h // (H / H_kv)`.

    Args:
        query: `[B, H, S, D]`, the last `S` of the `T` cached tokens.
        key, value: segments of `[B, H_kv, T, D]` and `[B, H_kv, T, D_v]`.
        scaling: factor on `q·k`.
        mask: broadcastable to `[B, H, S, T]`; boolean (True is attended) or added to the scores. None is causal.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: one logit a query head that takes part in the softmax and has no value, `[H]` (GPT-OSS).

    Returns:
        `[B, H, S, D_v]` in the query's dtype, and the logarithms of the sums of weights `[B, H, S]`, float32 or
        float64. A row that may attend to nothing is 0, its logarithm -inf.

    Raises:
        ValueError: if heads or lengths do not fit together.
    """
    check(query, key, value)
    parts, tiles = parts_of(query, key, value, mask), []
    for start in range(0, query.shape[2], QUERIES_PER_TILE):
        rows = query[:, :, start : start + QUERIES_PER_TILE]
        tiles.append(_attend_rows(rows, _rows_of(parts, query, start), scaling, softcap, sinks))
    outputs, logarithms = zip(*tiles, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(logarithms, dim=2)


def check(query: Tensor, key: Segments, value: Segments) -> None:
    """Raise ValueError unless heads, sizes and lengths fit together."""
    asked, keys, values = query.shape, key.shape, value.shape
    if keys[:3] != values[:3]:
        raise ValueError(f"keys {list(keys)} and values {list(values)} differ in batch, heads or tokens")
    if asked[0] != keys[0] or asked[1] % keys[1] or asked[3] != keys[3]:
        raise ValueError(f"queries {list(asked)} do not fit keys {list(keys)}")
    if asked[2] > keys[2]:
        raise ValueError(f"{asked[2]} queries but only {keys[2]} cached tokens")
    check_tiers(key, value)


def _attend_rows(
    query: Tensor, parts: Sequence[Part], scaling: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of a bounded number of queries; see `attend`."""
    batch, heads, length, _ = query.shape
    kv_heads, value_dim = parts[0].key.shape[1], parts[0].value.shape[-1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.to(dtype).reshape(batch, kv_heads, -1, query.shape[-1]) * scaling

    maximum = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    output = rows.new_zeros((*rows.shape[:3], value_dim))
    if sinks is not None:
        per_row = sinks.to(dtype).view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, length, 1)
        maximum, total = per_row.reshape(maximum.shape), torch.ones_like(maximum)

    for key, value, mask in parts:
        for start, stop in pairwise(_tile_edges(key, value)):
            scores = rows @ key.read(start, stop, dtype).transpose(-1, -2)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = _masked(scores.view(batch, heads, length, -1), mask, start, stop, key.shape[2]).view_as(scores)
            peak = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            shift = torch.where(peak == -torch.inf, 0.0, peak)
            weights = (scores - shift).exp()
            decay = (maximum - shift).exp()
            total = total * decay + weights.sum(-1, keepdim=True)
            output = output * decay + weights @ value.read(start, stop, dtype)
            maximum = peak
    output = output / torch.where(total == 0, 1.0, total)
    logarithms = (maximum + total.log()).view(batch, heads, length)
    return output.view(batch, heads, length, -1).to(query.dtype), logarithms


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
    elif mask.shape[-1] > 1:
        mask = mask[..., start:stop]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _rows_of(parts: Sequence[Part], query: Tensor, start: int) -> list[Part]:
    """The parts as a tile of the queries sees them: masks of its own rows, causal ones included."""
    length = query.shape[2]
    if length <= QUERIES_PER_TILE:
        return list(parts)
    stop = min(start + QUERIES_PER_TILE, length)
    tiles = []
    for part in parts:
        mask, tokens = part.mask, part.key.shape[2]
        if mask is None:
            last_seen = torch.arange(tokens - length + start, tokens - length + stop, device=query.device)
            mask = torch.arange(tokens, device=query.device) <= last_seen[:, None]
        elif mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        tiles.append(part._replace(mask=mask))
    return tiles
