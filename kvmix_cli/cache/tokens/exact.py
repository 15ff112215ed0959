"""The tokens that stay exact beside transform codes, chosen over all pages whenever pages are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from kvmix_kernels.layout import Kind
from kvmix_kernels.transform_layout import exact_count
from torch import Tensor

from ..archive import Archive
from ..buffer import lasting
from ..observation import AttentionCall, QuerySample, TailAttention, visible_at, weight_rows
from ..statistics import RunningMean

SAMPLE = QuerySample(recent=32, spread=96)
"""Queries of a prompt that are looked at."""
HORIZON = 256
"""Queries that the attention of an exact token is a mean over; a token in the default window has been seen by as many
when its page is packed."""
NEAR = 64
"""Queries next to a token that say nothing of those far away, which will read its codes; of a shorter window, half."""
UNSEEN = 1e-9
"""Attention of a token that no query has looked at: among such tokens, and only among them, the error decides."""


class ExactTokens:
    """One layer's exact tokens: of all pages, those with the largest attention a query times error in the metric.

    All tokens have codes, so that a token may stop being exact; one that has stopped, or never was, stays coded. How
    many there are depends on the number of pages alone (`exact_count`), so that bytes are known in advance. Attention
    is the mean over the queries far enough after a token until it was packed, and goes on with later ones while it is
    exact. Without attention, as of a model that shows no queries, the error alone decides.

    Args:
        count: exact tokens of each KV head, for each page.
        example: keys or values `[B, H_kv, any, D]`, for their rows and their device.
        chooser: keys, whose errors decide, or values, where keys have no codes.
        near: queries next to a token whose attention to it does not count.

    Attributes:
        attention: that the tokens in the tail have received.
        pages: pages that exact tokens have been chosen of.
        places: `[B, H_kv, N]` int32, as in `Coded`.
    """

    def __init__(self, count: int, example: Tensor, chooser: Kind = "key", near: int = NEAR) -> None:
        nothing = torch.zeros(*example.shape[:2], 0, dtype=torch.float32, device=example.device)
        self.count = count
        self.attention = TailAttention(SAMPLE, near=near)
        self.pages = 0
        self.places = nothing.int()
        self._chooser = chooser
        self._rates = RunningMean(HORIZON, nothing)
        self._errors = nothing  # -inf where there is no token
        self._states: dict[Kind, Tensor] = {}  # [B, H_kv, N, D]
        self._chosen = nothing.long()  # [B, H_kv, N], of those before and the new tokens, while pages are packed

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        held = (self.places, self._errors, *self._states.values())
        return self.attention.nbytes + self._rates.nbytes + sum(part.nbytes for part in held)

    def of(self, kind: Kind) -> Tensor | None:
        """Return the exact keys, or values, `[B, H_kv, N, D]`; None if none are held."""
        return self._states.get(kind)

    def learn(self, call: AttentionCall, sinks: int) -> None:
        """Let a call's queries, which have met the stored keys, say how much attention exact tokens receive now.

        Args:
            call: queries, and the logarithms of their sums of weights.
            sinks: tokens before the pages.
        """
        keys = self._states.get("key")
        if keys is None or call.logarithms is None or not keys.shape[2]:
            return
        call = replace(call, mask=visible_at(call, self.places.clamp(min=0).long() + sinks))
        rows = weight_rows(call, keys, keys.shape[2], True, SAMPLE)
        self._rates.add(rows.weights, call.query.shape[2] if rows.is_sum else 1)

    @lasting
    def add(self, kind: Kind, states: Tensor, errors: Tensor) -> None:
        """Choose again, of those that are exact and of the tokens of the next pages; then keep what was chosen.

        Args:
            kind: keys or values; those that choose come first.
            states: `[B, H_kv, pages * page, D]`, the oldest tokens of the tail.
            errors: `[B, H_kv, pages, page]`, squared error of each in the metric.
        """
        if kind == self._chooser:
            self._choose(errors)
        self._states[kind] = _rows_of_both(self._states.get(kind), states, self._chosen)

    def _choose(self, errors: Tensor) -> None:
        pages, page = errors.shape[2:]
        errors = errors.flatten(2).float()
        rates = self.attention.rates(errors.shape[2])
        rates = torch.zeros_like(errors) if rates is None or rates.shape != errors.shape else rates
        places = torch.arange(self.pages * page, (self.pages + pages) * page, dtype=torch.int32, device=errors.device)
        places = torch.cat([self.places, places.expand_as(errors)], dim=2)
        errors = torch.cat([self._errors, errors], dim=2)
        rates = torch.cat([self._rates.mean, rates], dim=2)
        self.pages += pages
        best = (errors * (rates + UNSEEN)).topk(exact_count(self.count, self.pages, page), dim=2).indices
        self._chosen = best.sort(dim=2).values  # in the order of places: those before are, and no new one is older
        self.places, self._errors = places.gather(2, self._chosen), errors.gather(2, self._chosen)
        self._rates.start(rates.gather(2, self._chosen))

    def forget_oldest(self, count: int) -> None:
        """Forget what the choice of the oldest `count` tokens needed, which have left the tail."""
        if count:
            self._chosen = self._chosen.new_empty(*self.places.shape[:2], 0)
            self.attention.forget_oldest(count)

    def crop(self, count: int, tail: int, pages: int, page: int) -> None:
        """Take the last `count` tokens back.

        Of the pages that stay, what is exact stays so, even if it is more than they account for.

        Args:
            count: number of tokens, which were queries as well.
            tail: tokens left in the tail.
            pages: pages of `page` tokens that are left.
        """
        reopened = pages < self.pages
        self.attention.crop(count, tail, reopened)
        self._rates.take_back(count)
        if reopened:
            self._truncate(pages, page)

    @lasting
    def _truncate(self, pages: int, page: int) -> None:
        places, order = self.places.masked_fill(self.places >= pages * page, -1).sort(dim=2)
        kept = max(exact_count(self.count, pages, page), int((places >= 0).sum(2).max()))
        self.places, order = places[:, :, places.shape[2] - kept :], order[:, :, places.shape[2] - kept :]
        self._errors = self._errors.gather(2, order).masked_fill(self.places < 0, -torch.inf)
        self._rates.start(self._rates.mean.gather(2, order))
        self._states = {kind: _rows(states, order) for kind, states in self._states.items()}
        self.pages = pages

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        self.attention.apply(change)
        self._rates.apply(change)
        self.places, self._errors = change(self.places), change(self._errors)
        self._states = {kind: change(states) for kind, states in self._states.items()}

    def exchange(self, archive: Archive, examples: Mapping[Kind, Tensor], pages: int, page: int) -> None:
        """Give everything held to an archive, or take it from one.

        Args:
            examples: keys or values `[B, H_kv, 0, D]`, of those that are coded.
            pages: pages that are packed, of `page` tokens each.
        """
        self.attention.exchange(archive.part("attention"))
        self.pages = pages
        if not pages:
            return
        places = archive.array("places", self.places, (*archive.rows, None), torch.int32)
        if places.numel() and not -1 <= int(places.min()) <= int(places.max()) < pages * page:
            raise archive.fault("places", f"has places up to {int(places.max())}; expected -1 to {pages * page - 1}")
        if bool((places.diff(dim=2) < 0).any()):
            raise archive.fault("places", "is not in ascending order")
        self.places, shape = places, places.shape
        self._errors = archive.array("errors", self._errors, shape, torch.float32)
        self._rates.exchange(archive.part("rates"), shape)
        for kind, example in examples.items():
            held = self._states.get(kind)
            self._states[kind] = archive.array(kind, held, (*shape, example.shape[3]), example.dtype)


def _rows_of_both(held: Tensor | None, new: Tensor, index: Tensor) -> Tensor:
    """Return rows of `held` and `new` `[B, H_kv, n, D]`, one after the other, without putting them together."""
    before = 0 if held is None else held.shape[2]
    if held is None or before == 0:
        return _rows(new, index)
    old, fresh = _rows(held, index.clamp(max=before - 1)), _rows(new, (index - before).clamp(min=0))
    return torch.where((index < before)[..., None], old, fresh)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(2, index[..., None].expand(*index.shape, states.shape[3]))
