"""What queries say about tokens: rows of attention weights, of a sample of a long prompt's queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RECENT = SPREAD = 32
"""Queries of a prompt that are looked at: the last ones, and as many spread evenly over the rest. ZipCache takes 5 %
and 5 %, the latter at random (section 4.3); a fixed number costs little at any length."""
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Attention:
    """One call of the attention function.

    Attributes:
        query: `[B, H, S, D]`, the last `S` of the `T` cached tokens.
        mask: as `attend` takes it.
        logarithms: of the sums of weights `[B, H, S]`; None if they are not known.
        sinks: logits `[H]` that take part in the softmax, or None.
    """

    query: Tensor
    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    logarithms: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """What some queries give to some tokens.

    Attributes:
        weights: `[B, H_kv, R, n]`, summed over the query heads of a group: a row a query, or one for all of them.
        visible: `[B, 1, R, n]`, the queries of a row that could see a token.
        is_sum: whether the one row is of many queries.
    """

    weights: Tensor
    visible: Tensor
    is_sum: bool

    def last(self, count: int) -> Rows:
        """Of the last `count` tokens only."""
        first = self.weights.shape[3] - count
        return Rows(self.weights[..., first:], self.visible[..., first:], self.is_sum)


def probes(queries: int) -> tuple[list[int], list[float]]:
    """Which of a forward's queries to look at, and how many each of them stands for."""
    rest = queries - RECENT
    if rest <= SPREAD:
        return list(range(queries)), [1.0] * queries
    spread = [(2 * i + 1) * rest // (2 * SPREAD) for i in range(SPREAD)]
    return [*spread, *range(rest, queries)], [rest / SPREAD] * SPREAD + [1.0] * RECENT


def rows_of(attention: Attention, keys: Tensor, tokens: int, extrapolate: bool) -> Rows:
    """What a call's queries give to its last tokens; of a long prompt, a sample of them together.

    Args:
        keys: `[B, H_kv, n, D]`, the last `n` of the `tokens` cached tokens: all of them if the logarithms are unknown.
        extrapolate: rows that are spread over a prompt weigh as much as those that they stand for.
    """
    queries = attention.query.shape[2]
    chosen, stands_for = probes(queries)
    rows = torch.tensor(chosen, device=keys.device)
    tiles = [_tile(attention, keys, tokens, part) for part in rows.split(ROWS_AT_ONCE)]
    is_sum = len(chosen) < queries
    if is_sum:
        factors = torch.tensor(stands_for if extrapolate else [1.0] * len(chosen), device=keys.device)
        tiles = [
            (_summed(weights, part), visible.sum(2, keepdim=True))
            for (weights, visible), part in zip(tiles, factors.split(ROWS_AT_ONCE), strict=True)
        ]
        weights, visible = (sum(parts[1:], start=parts[0]) for parts in zip(*tiles, strict=True))
    else:
        weights, visible = (torch.cat(parts, dim=-2) for parts in zip(*tiles, strict=True))
        weights = weights.sum(2)
    return Rows(weights, visible, is_sum)


def _summed(weights: Tensor, factors: Tensor) -> Tensor:
    """Weights `[B, H_kv, G, R, n]` as one row `[B, H_kv, 1, n]`."""
    every = factors.repeat(weights.shape[2]).expand(*weights.shape[:2], 1, -1)
    return every @ weights.flatten(2, 3)


def _tile(attention: Attention, keys: Tensor, tokens: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[B, H_kv, G, R, n]` and visibility `[B, 1, R, n]` of the given queries."""
    batch, heads, queries, _ = attention.query.shape
    kv_heads, count = keys.shape[1:3]
    query = attention.query.index_select(2, rows).float() * attention.scaling
    scores = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ keys.float().transpose(-1, -2)
    scores = scores.view(batch, heads, len(rows), count)
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    scores, visible = _masked(scores, attention.mask, rows, queries, tokens)
    if attention.logarithms is not None:
        weights = scores.sub_(attention.logarithms.index_select(2, rows).float()[..., None]).exp_()
    elif attention.sinks is not None:
        logits = attention.sinks.float().view(1, -1, 1, 1).expand(batch, -1, len(rows), 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if attention.mask is not None:
        weights = weights.masked_fill_(visible.amax(-1, keepdim=True) == 0, 0.0)  # queries that see nothing
    return weights.unflatten(1, (kv_heads, -1)), visible


def _masked(scores: Tensor, mask: Tensor | None, rows: Tensor, queries: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Scores with what may not be attended at -inf, and `[B, 1, R, n]` of what may."""
    count = scores.shape[3]
    if mask is None:
        places = torch.arange(tokens - count, tokens, device=scores.device)
        seen = places <= (tokens - queries + rows)[:, None]
        return scores.masked_fill_(~seen, -torch.inf), seen.float().expand(len(scores), 1, -1, -1)
    mask = mask if mask.shape[-2] == 1 else mask.index_select(2, rows)
    mask = mask if mask.shape[-1] == 1 else mask[..., tokens - count :]
    if mask.dtype == torch.bool:
        seen, scores = mask, scores.masked_fill_(~mask, -torch.inf)
    else:
        lowest = torch.finfo(mask.dtype).min
        seen, scores = mask > lowest, scores + mask
    return scores, seen[:, :1].float().expand(len(scores), 1, len(rows), count)
