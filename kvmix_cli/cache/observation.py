"""Attention weights that tokens receive from queries, and their sums over forwards.

Token policies and the exact tokens of transform codes are chosen by them. Every decoded query is seen, and of a long
prompt a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .archive import Archive
from .statistics import LastRows, QuerySum, Reduction, combined, reduced

ROWS_AT_ONCE = 32
"""Queries whose weights are computed together; bounds the float32 temporaries."""
SINGLE_ROWS = 64
"""Queries of a forward that have a row each, where none is left out; those of a longer one are put into one row."""


@dataclass(frozen=True)
class QuerySample:
    """The queries of a long prompt that are looked at: the last ones, and some spread evenly over the rest.

    ZipCache takes 5 % and 5 %, the latter at random (section 4.3); a fixed number costs little at any length.

    Attributes:
        recent: queries at the end of a forward that are looked at.
        spread: queries before these, spread evenly; with 0 there are none, and the recent ones have a row each.
        every: all queries are looked at instead.
    """

    recent: int = 32
    spread: int = 32
    every: bool = False

    def of(self, queries: int) -> tuple[list[int], list[float]]:
        """Return the sample of a forward's queries, and the number of queries that each of them represents."""
        rest = queries - self.recent
        if self.every or rest <= self.spread:
            return list(range(queries)), [1.0] * queries
        spread = [(2 * i + 1) * rest // (2 * self.spread) for i in range(self.spread)]
        return [*spread, *range(rest, queries)], [rest / max(1, self.spread)] * self.spread + [1.0] * self.recent

    def is_reduced(self, queries: int) -> bool:
        """Return whether the sample of a forward is put into one row."""
        return queries > SINGLE_ROWS if self.every else 0 < self.spread < queries - self.recent


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function.

    Attributes:
        query: `[B, H, S, D]`, the last `S` of the `T` cached tokens.
        scaling: factor on `q·k`.
        mask: broadcastable to `[B, H, S, T]`, boolean or added to the scores; None is causal.
        softcap: scores become `softcap * tanh(score / softcap)`, or None.
        sink_logits: logits `[H]` that enter the softmax without a value, or None.
        logarithms: of the sums of weights `[B, H, S]`; None if they are not known.
    """

    query: Tensor
    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    logarithms: Tensor | None = None


@dataclass(frozen=True)
class WeightRows:
    """Attention weights that some queries give to some tokens.

    Attributes:
        weights: `[B, H_kv, R, n]`, reduced over the query heads of a group: one row for each query, or one for all.
        visible: `[B, 1, R, n]`, number of queries of a row that could see a token; None where it is not needed.
        is_sum: True if the one row is of many queries.
    """

    weights: Tensor
    visible: Tensor | None
    is_sum: bool

    def last(self, count: int) -> WeightRows:
        """Return the rows of the last `count` tokens only."""
        first = self.weights.shape[3] - count
        return WeightRows(
            self.weights[..., first:], None if self.visible is None else self.visible[..., first:], self.is_sum
        )


class TailAttention:
    """The attention that the tokens in the tail have received so far, each KV head's by itself.

    Args:
        sample: queries of a long prompt that are looked at.
        extrapolates: queries that are spread over a prompt weigh as much as those they represent. Otherwise the
            queries that could see each token are counted.
        reduce: what becomes of the weights of several queries.
        last: only so many of the last queries count; 0 for all.
        near: so many queries do not count for a token: its own, and the next ones after it.
    """

    def __init__(
        self,
        sample: QuerySample,
        extrapolates: bool = True,
        reduce: Reduction = "sum",
        last: int = 0,
        near: int = 0,
    ) -> None:
        self._sample = sample
        self._extrapolates = extrapolates
        self._reduce: Reduction = reduce
        self._last = last
        self._near = near
        self.forget()

    def forget(self) -> None:
        """Start without attention."""
        self._weights = LastRows(self._last, self._reduce) if self._last else QuerySum(self._reduce)
        self._observers = QuerySum()

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return self._weights.nbytes + self._observers.nbytes

    def learn(self, call: AttentionCall, keys: Tensor, tokens: int, tail: int) -> None:
        """Add the weights that a call's queries give to the tokens of the tail.

        Args:
            keys: `[B, H_kv, n, D]`, as in `weight_rows`.
            tokens: cached tokens, of which the last `tail` are in the tail.
        """
        rows = weight_rows(call, keys, tokens, self._extrapolates, self._sample, self._reduce, self._near).last(tail)
        self._weights.add(rows.weights, rows.is_sum)
        if rows.visible is not None:
            self._observers.add(rows.visible, rows.is_sum)

    def start(self, received: Tensor) -> None:
        """Start from attention `[B, H_kv, n]` that the tokens of the tail have received, and that stays."""
        self._weights.add(received[:, :, None], final=True)

    def received(self, count: int) -> Tensor | None:
        """Return the weights `[B, H_kv, count]` of the oldest tokens; None before there were queries."""
        return None if self._weights.total is None else self._weights.total[..., :count]

    @property
    def last_rows(self) -> Tensor | None:
        """Return the rows `[B, H_kv, R, n]` of the queries that count, if these are the last ones; None without any."""
        return self._weights.rows if isinstance(self._weights, LastRows) else None

    def rates(self, count: int) -> Tensor | None:
        """Return the weights `[B, H_kv, count]` of the oldest tokens, in the mean over queries that could see each.

        These are the queries of a token itself and of those after it, but for the near ones: 0 where there were no
        others. None before there were queries.
        """
        total = self._weights.total
        if total is None:
            return None
        seen = torch.arange(total.shape[2], total.shape[2] - count, -1, device=total.device) - self._near
        return total[..., :count] / seen.clamp(min=1)

    def observers(self, count: int) -> Tensor | None:
        """Return the number of queries `[B, 1, count]` that could see the oldest tokens; None if not counted."""
        return None if self._observers.total is None else self._observers.total[..., :count]

    def forget_oldest(self, count: int) -> None:
        """Forget the oldest `count` tokens, which have left the tail."""
        if count:
            self._weights.narrow(count)
            self._observers.narrow(count)

    def crop(self, count: int, tail: int, reopened: bool) -> None:
        """Take the last `count` tokens back, so that `tail` are left.

        Args:
            count: number of tokens, which were queries as well.
            tail: tokens left in the tail.
            reopened: some of these have come back from pages; all then start without attention.
        """
        if reopened:
            self.forget()
        for part in (self._weights, self._observers):
            part.take_back(count)
            part.narrow(0, tail)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        self._weights.apply(change)
        self._observers.apply(change)

    def exchange(self, archive: Archive) -> None:
        """Give the attention to an archive, or take it from one."""
        self._weights.exchange(archive.part("weights"))
        self._observers.exchange(archive.part("observers"))


def weight_rows(
    call: AttentionCall,
    keys: Tensor,
    tokens: int,
    extrapolate: bool,
    sample: QuerySample,
    reduce: Reduction = "sum",
    near: int = 0,
) -> WeightRows:
    """Return the weights that a call's queries give to its last tokens; of a long prompt, a sample's in one row.

    Args:
        keys: `[B, H_kv, n, D]`, the last `n` of the `tokens` cached tokens: all of them if the logarithms are unknown.
        extrapolate: queries that are spread over a prompt weigh as much as those they represent. Otherwise the
            queries that could see each token are counted.
        sample: queries of a long prompt that are looked at.
        reduce: what becomes of the weights of a group's query heads, and of queries that share a row.
        near: weights are 0 for so many tokens that are nearest to a query, its own among them.
    """
    queries = call.query.shape[2]
    chosen, represented = sample.of(queries)
    if not sample.is_reduced(queries):
        rows = None if len(chosen) == queries else torch.tensor(chosen, device=keys.device)
        weights, visible = _tile(call, keys, tokens, rows, not extrapolate, near)
        return WeightRows(reduced(weights, reduce), visible, is_sum=False)
    parts = torch.tensor(chosen, device=keys.device).split(ROWS_AT_ONCE)
    factors = torch.tensor(represented if extrapolate else [1.0] * len(chosen), device=keys.device).split(ROWS_AT_ONCE)
    total: Tensor | None = None
    counts: Tensor | None = None
    for part, factor in zip(parts, factors, strict=True):
        weights, visible = _tile(call, keys, tokens, part, not extrapolate, near)
        row = _one_row(weights, factor, reduce)
        total = row if total is None else combined(total, row, reduce)
        if visible is not None:
            seen = visible.sum(2, keepdim=True)
            counts = seen if counts is None else counts + seen
    if total is None:
        raise AssertionError("a forward has queries")
    return WeightRows(total, counts, is_sum=True)


def head_weights(call: AttentionCall, keys: Tensor, sample: QuerySample) -> tuple[Tensor, Tensor]:
    """Return the weights `[B, H, R, n]` of a sample of a prompt's queries, and which tokens they see, `[B, 1, R, n]`.

    Args:
        keys: `[B, H_kv, n, D]` of all tokens.
        sample: queries that are looked at.
    """
    rows = torch.tensor(sample.of(call.query.shape[2])[0], device=keys.device)
    weights, visible = _tile(call, keys, keys.shape[2], rows, True, 0)
    if visible is None:
        raise AssertionError("what is seen has been counted")
    return weights.flatten(1, 2), visible


def _one_row(weights: Tensor, factors: Tensor, reduce: Reduction) -> Tensor:
    """Return weights `[B, H_kv, G, R, n]` as one row `[B, H_kv, 1, n]`; a sum is weighted."""
    if reduce == "max":
        return weights.flatten(2, 3).amax(2, keepdim=True)
    every = factors.repeat(weights.shape[2]).expand(*weights.shape[:2], 1, -1)
    return every @ weights.flatten(2, 3)


def visible_at(call: AttentionCall, tokens: Tensor) -> Tensor | None:
    """Return a call's mask for `tokens` `[B, H_kv, N]`, none newer than a query; None if all are seen."""
    mask = call.mask
    if mask is None:
        return None if call.query.shape[2] == 1 else call.query.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if mask.shape[3] == 1:
        return mask
    index = tokens.repeat_interleave(call.query.shape[1] // tokens.shape[1], dim=1)[:, :, None]
    columns = mask.expand(*index.shape[:2], *mask.shape[2:])
    return columns.gather(3, index.expand(-1, -1, columns.shape[2], -1))


def _tile(
    call: AttentionCall, keys: Tensor, tokens: int, rows: Tensor | None, count: bool, near: int
) -> tuple[Tensor, Tensor | None]:
    """Return weights `[B, H_kv, G, R, n]` of the given queries, or all, and if `count`, visibility `[B, 1, R, n]`."""
    batch, kv_heads, length = keys.shape[:3]
    query = _at(call.query, rows).float() * call.scaling
    scores = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ keys.float().transpose(-1, -2)
    scores = scores.view(*query.shape[:3], length)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = _seen(call, tokens, length, rows)
    if seen is not None:
        scores = scores.masked_fill_(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    if call.logarithms is not None:
        weights = scores.sub_(_at(call.logarithms, rows).float()[..., None]).exp_()
    elif call.sink_logits is not None:
        logits = call.sink_logits.float().view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if call.mask is not None:
        weights = weights.nan_to_num_(0.0)  # queries that see nothing
    if near:
        weights = weights * _is_far(call, tokens, length, rows, near)
    return weights.unflatten(1, (kv_heads, -1)), _counted(seen, scores) if count else None


def _is_far(call: AttentionCall, tokens: int, count: int, rows: Tensor | None, near: int) -> Tensor:
    """Return whether each query is at least `near` tokens after each of the last `count` tokens, `[R, n]`."""
    device, queries = call.query.device, call.query.shape[2]
    places = torch.arange(tokens - queries, tokens, device=device) if rows is None else tokens - queries + rows
    return torch.arange(tokens - count, tokens, device=device) <= places[:, None] - near


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return rows of the third axis; all of them for None."""
    return x if rows is None else x.index_select(2, rows)


def _seen(call: AttentionCall, tokens: int, count: int, rows: Tensor | None) -> Tensor | None:
    """Return the mask `[B or 1, H or 1, R or 1, n or 1]` of the last `count` tokens; None if all are seen."""
    mask, queries = call.mask, call.query.shape[2]
    if mask is None:
        if queries == 1:
            return None
        device = call.query.device
        last = torch.arange(tokens - queries, tokens, device=device) if rows is None else tokens - queries + rows
        return (torch.arange(tokens - count, tokens, device=device) <= last[:, None])[None, None]
    mask = mask if mask.shape[2] == 1 else _at(mask, rows)
    return mask if mask.shape[3] == 1 else mask[..., tokens - count :]


def _counted(seen: Tensor | None, scores: Tensor) -> Tensor:
    """Return 1 where a score `[B, H, R, n]` is of a visible token, else 0: `[B, 1, R, n]`."""
    batch, _, rows, count = scores.shape
    if seen is None:
        return scores.new_ones(batch, 1, rows, count)
    visible = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min
    return visible[:, :1].float().expand(batch, 1, rows, count)
