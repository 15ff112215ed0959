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
        visible: `[B, 1, R, n]`, the queries of a row that could see a token; None where nobody asked.
        is_sum: whether the one row is of many queries.
    """

    weights: Tensor
    visible: Tensor | None
    is_sum: bool

    def last(self, count: int) -> Rows:
        """Of the last `count` tokens only."""
        first = self.weights.shape[3] - count
        return Rows(self.weights[..., first:], None if self.visible is None else self.visible[..., first:], self.is_sum)


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
    if len(chosen) == queries:
        tiles = [_tile(attention, keys, tokens, None, not extrapolate)]
        return Rows(tiles[0][0].sum(2), tiles[0][1], is_sum=False)
    rows = torch.tensor(chosen, device=keys.device).split(ROWS_AT_ONCE)
    factors = torch.tensor(stands_for if extrapolate else [1.0] * len(chosen), device=keys.device).split(ROWS_AT_ONCE)
    tiles = [_tile(attention, keys, tokens, part, not extrapolate) for part in rows]
    total = torch.stack([_summed(weights, part) for (weights, _), part in zip(tiles, factors, strict=True)]).sum(0)
    visible = [visible.sum(2, keepdim=True) for _, visible in tiles if visible is not None]
    return Rows(total, torch.stack(visible).sum(0) if visible else None, is_sum=True)


def _summed(weights: Tensor, factors: Tensor) -> Tensor:
    """Weights `[B, H_kv, G, R, n]` as one row `[B, H_kv, 1, n]`."""
    every = factors.repeat(weights.shape[2]).expand(*weights.shape[:2], 1, -1)
    return every @ weights.flatten(2, 3)


def _tile(
    attention: Attention, keys: Tensor, tokens: int, rows: Tensor | None, count: bool
) -> tuple[Tensor, Tensor | None]:
    """Weights `[B, H_kv, G, R, n]` of the given queries, or of all, and if asked for, visibility `[B, 1, R, n]`."""
    batch, kv_heads, length = keys.shape[:3]
    query = _at(attention.query, rows).float() * attention.scaling
    scores = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ keys.float().transpose(-1, -2)
    scores = scores.view(*query.shape[:3], length)
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    seen = _seen(attention, tokens, length, rows)
    if seen is not None:
        scores = scores.masked_fill_(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    if attention.logarithms is not None:
        weights = scores.sub_(_at(attention.logarithms, rows).float()[..., None]).exp_()
    elif attention.sinks is not None:
        logits = attention.sinks.float().view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if attention.mask is not None:
        weights = weights.nan_to_num_(0.0)  # queries that see nothing
    return weights.unflatten(1, (kv_heads, -1)), _counted(seen, scores) if count else None


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of the third axis; all, if none are named."""
    return x if rows is None else x.index_select(2, rows)


def _seen(attention: Attention, tokens: int, count: int, rows: Tensor | None) -> Tensor | None:
    """The mask `[B or 1, H or 1, R or 1, n or 1]` of the last `count` tokens; None if they are all seen."""
    mask, queries = attention.mask, attention.query.shape[2]
    if mask is None:
        if queries == 1:
            return None
        device = attention.query.device
        last = torch.arange(tokens - queries, tokens, device=device) if rows is None else tokens - queries + rows
        return (torch.arange(tokens - count, tokens, device=device) <= last[:, None])[None, None]
    mask = mask if mask.shape[2] == 1 else _at(mask, rows)
    return mask if mask.shape[3] == 1 else mask[..., tokens - count :]


def _counted(seen: Tensor | None, scores: Tensor) -> Tensor:
    """What of the scores `[B, H, R, n]` is of a token that is seen, `[B, 1, R, n]`."""
    batch, _, rows, count = scores.shape
    if seen is None:
        return scores.new_ones(batch, 1, rows, count)
    visible = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min
    return visible[:, :1].float().expand(batch, 1, rows, count)
