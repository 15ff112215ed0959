"""What queries say about tokens: rows of attention weights, of a sample of a long prompt's queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RECENT, SPREAD = 0.05, 0.05
"""Shares of a prompt's queries that are looked at: the last ones, and ones spread over the rest (ZipCache, section 4.3,
which draws the latter at random)."""
FEWEST, MOST = 32, 64
"""Queries of either kind, at least and at most: what they cost stays a small part of a prompt of any length."""
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
        weights: `[B, H_kv, R, n]`, summed over the query heads of a group.
        visible: `[B, 1, R, n]`, 1 where a query could see a token.
    """

    weights: Tensor
    visible: Tensor

    def last(self, count: int) -> Rows:
        """Of the last `count` tokens only."""
        first = self.weights.shape[3] - count
        return Rows(self.weights[..., first:], self.visible[..., first:])


def probes(queries: int) -> tuple[list[int], list[float]]:
    """Which of a forward's queries to look at, and how many each of them stands for."""
    recent, spread = (min(max(round(share * queries), FEWEST), MOST) for share in (RECENT, SPREAD))
    rest = queries - recent
    if rest <= spread:
        return list(range(queries)), [1.0] * queries
    places = [(2 * i + 1) * rest // (2 * spread) for i in range(spread)]
    return [*places, *range(rest, queries)], [rest / spread] * spread + [1.0] * recent


def rows_of(attention: Attention, keys: Tensor, tokens: int, extrapolate: bool) -> Rows:
    """What the sampled queries of a call give to its last tokens.

    Args:
        keys: `[B, H_kv, n, D]`, the last `n` of the `tokens` cached tokens: all of them if the logarithms are unknown.
        extrapolate: rows that are spread over a prompt weigh as much as those that they stand for.
    """
    queries = attention.query.shape[2]
    chosen, stands_for = probes(queries)
    tiles = [
        _tile(attention, keys, tokens, torch.tensor(chosen[i : i + ROWS_AT_ONCE], device=keys.device))
        for i in range(0, len(chosen), ROWS_AT_ONCE)
    ]
    weights, visible = (torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True))
    if extrapolate:
        weights *= torch.tensor(stands_for, device=keys.device)[:, None]
    return Rows(weights, visible)


def _tile(attention: Attention, keys: Tensor, tokens: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and visibility of the given queries."""
    batch, heads, queries, _ = attention.query.shape
    kv_heads, count = keys.shape[1:3]
    query = attention.query.index_select(2, rows).float() * attention.scaling
    scores = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ keys.float().transpose(-1, -2)
    scores = scores.view(batch, heads, len(rows), count)
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    scores, visible = _masked(scores, attention.mask, rows, queries, tokens)
    if attention.logarithms is not None:
        total = attention.logarithms.index_select(2, rows).float()[..., None]
    else:
        total = scores.logsumexp(-1, keepdim=True)
        if attention.sinks is not None:
            total = torch.logaddexp(total, attention.sinks.float().view(1, -1, 1, 1))
    weights = (scores - total).exp_().nan_to_num_(0.0)  # a query that sees nothing
    return weights.unflatten(1, (kv_heads, -1)).sum(2), visible


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
