"""Definition of attention over packed keys and values, in plain PyTorch.

Tiles of tokens are dequantized one at a time and merged by their running maximum and sum (online softmax, Milakov
and Gimelshein 2018), so the cache is never dequantized as a whole. Arithmetic is in float32, or float64 for float64
queries.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .parts import Part, parts_of
from .problem import AttentionProblem

TOKENS_PER_TILE = 2048
QUERIES_PER_TILE = 512


def attend(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Return output and logarithms of the sums of weights, as `AttentionProblem` describes them."""
    parts, tiles = parts_of(problem), []
    for start in range(0, problem.queries, QUERIES_PER_TILE):
        stop = min(start + QUERIES_PER_TILE, problem.queries)
        rows = [_of_queries(part, problem, start, stop) for part in parts]
        tiles.append(_attend_rows(problem, rows, problem.query[:, :, start:stop]))
    outputs, logarithms = zip(*tiles, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(logarithms, dim=2)


def _attend_rows(problem: AttentionProblem, parts: list[Part], query: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with a bounded number of the problem's queries, whose masks the parts have."""
    batch, heads, length, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.to(dtype).reshape(batch, problem.kv_heads, -1, query.shape[-1]) * problem.scaling

    maximum = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    output = rows.new_zeros((*rows.shape[:3], problem.value_dim))
    if problem.sink_logits is not None:
        per_row = problem.sink_logits.to(dtype).view(1, problem.kv_heads, -1, 1, 1).expand(batch, -1, -1, length, 1)
        maximum, total = per_row.reshape(maximum.shape), torch.ones_like(maximum)

    for part in parts:
        for start, stop in pairwise(_tile_edges(part)):
            scores = rows @ part.key.read(start, stop, dtype).transpose(-1, -2)
            if problem.softcap is not None:
                scores = problem.softcap * torch.tanh(scores / problem.softcap)
            scores = _masked(scores.view(batch, heads, length, -1), part, start, stop).view_as(scores)
            peak = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            shift = torch.where(peak == -torch.inf, 0.0, peak)
            weights = (scores - shift).exp()
            decay = (maximum - shift).exp()
            total = total * decay + weights.sum(-1, keepdim=True)
            output = output * decay + weights @ part.value.read(start, stop, dtype)
            maximum = peak
    output = output / torch.where(total == 0, 1.0, total)
    logarithms = (maximum + total.log()).view(batch, heads, length)
    return output.view(batch, heads, length, -1).to(query.dtype), logarithms


def _tile_edges(part: Part) -> list[int]:
    """Return tile boundaries that fall on every segment's edge, so that no page is read twice."""
    marks = sorted({0, *part.key.edges, *part.value.edges, part.tokens})
    edges = [0]
    for start, stop in pairwise(marks):
        edges += [*range(start + TOKENS_PER_TILE, stop, TOKENS_PER_TILE), stop]
    return edges


def _masked(scores: Tensor, part: Part, start: int, stop: int) -> Tensor:
    """Return scores `[B, H, S, stop - start]` with -inf where the mask forbids attention."""
    length, mask = scores.shape[2], part.mask
    if mask is None:
        if length == 1:
            return scores
        mask = _causal(part.tokens - length, part.tokens, start, stop, scores.device)
    elif mask.shape[-1] > 1:
        mask = mask[..., start:stop]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _of_queries(part: Part, problem: AttentionProblem, start: int, stop: int) -> Part:
    """Return the part with the mask of queries `[start, stop)`, whose own tokens need not be the last ones."""
    if (start, stop) == (0, problem.queries):
        return part
    mask = part.mask
    if mask is None:
        first = part.tokens - problem.queries
        mask = _causal(first + start, first + stop, 0, part.tokens, problem.query.device)
    elif mask.shape[-2] > 1:
        mask = mask[..., start:stop, :]
    return replace(part, mask=mask)


def _causal(first: int, last: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Return the boolean mask of the queries at positions `[first, last)` over tokens `[start, stop)`."""
    return torch.arange(start, stop, device=device) <= torch.arange(first, last, device=device)[:, None]
