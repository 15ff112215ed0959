"""The tokens that stay exact beside transform codes, chosen over all pages whenever pages are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from kvmix_kernels.layout import Kind
from torch import Tensor

from .archive import Archive
from .buffer import lasting
from .observation import QuerySample, TailAttention

SAMPLE = QuerySample(recent=64, spread=256)
"""Queries of a prompt that are looked at. Of 900 in SmolLM2-135M, 2 nominal bits, 1 and 2 exact tokens of a page: .0085
and .0069 nats a token; all of them .0086 and .0067, 64 in all .0094 and .0077."""
UNSEEN = 1e-9
"""Attention of a token that no query has looked at: among such tokens, and only among them, the error decides."""


class ExactTokens:
    """One layer's exact tokens: those with the largest attention received times error in the metric, of all pages.

    All tokens have codes, so that a token may stop being exact; one that has stopped, or never was, stays coded. Every
    KV head has `count` exact tokens for each page, wherever they are, so that bytes are known in advance. Without
    attention, as of a model that shows no queries, the error alone decides.

    Args:
        count: exact tokens of each KV head, in the mean over pages.
        chooser: keys, whose errors decide, or values, where keys have no codes.

    Attributes:
        attention: that the tokens in the tail have received.
        pages: pages that exact tokens have been chosen of.
        places: `[B, H_kv, count * pages]` int32, as in `Coded`; None before the first page.
    """

    def __init__(self, count: int, chooser: Kind = "key") -> None:
        self.count = count
        self.attention = TailAttention(SAMPLE)
        self.pages = 0
        self.places: Tensor | None = None
        self._chooser = chooser
        self._scores: Tensor | None = None  # [B, H_kv, N] float32; -inf where there is no token
        self._states: dict[Kind, Tensor] = {}  # [B, H_kv, N, D]
        self._chosen: Tensor | None = None  # [B, H_kv, N], of those before and the new tokens, while pages are packed

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        held = (self.places, self._scores, *self._states.values())
        return self.attention.nbytes + sum(part.nbytes for part in held if part is not None)

    def of(self, kind: Kind) -> Tensor | None:
        """Return the exact keys, or values, `[B, H_kv, N, D]`; None if none are held."""
        return self._states.get(kind)

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
        if self._chosen is None:
            raise AssertionError("nothing has been chosen of these pages")
        self._states[kind] = _rows_of_both(self._states.get(kind), states, self._chosen)

    def _choose(self, errors: Tensor) -> None:
        pages, page = errors.shape[2:]
        scores = self._scores_of(errors.flatten(2))
        places = torch.arange(self.pages * page, (self.pages + pages) * page, dtype=torch.int32, device=scores.device)
        places = places.expand_as(scores)
        if self._scores is not None and self.places is not None:
            scores = torch.cat([self._scores, scores], dim=2)
            places = torch.cat([self.places, places], dim=2)
        self.pages += pages
        # Both parts are in the order of their places, and no token comes before any.
        self._chosen = scores.topk(self.count * self.pages, dim=2).indices.sort(dim=2).values
        self.places, self._scores = places.gather(2, self._chosen), scores.gather(2, self._chosen)

    def forget_oldest(self, count: int) -> None:
        """Forget what the choice of the oldest `count` tokens needed, which have left the tail."""
        self._chosen = None
        self.attention.forget_oldest(count)

    @lasting
    def truncate(self, pages: int, page: int) -> None:
        """Forget what is after the first `pages`. What is exact in these stays so, even if it is more than `count`."""
        if self.places is None or self._scores is None or pages >= self.pages:
            return
        gone = self.places >= pages * page
        places, scores = self.places.masked_fill(gone, -1), self._scores.masked_fill(gone, -torch.inf)
        places, order = places.sort(dim=2)
        first = places.shape[2] - max(self.count * pages, int((places >= 0).sum(2).max()))
        self.places, order, self.pages = places[:, :, first:], order[:, :, first:], pages
        self._scores = scores.gather(2, order)
        self._states = {kind: _rows(states, order) for kind, states in self._states.items()}

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        self.attention.apply(change)
        self.places, self._scores = (part if part is None else change(part) for part in (self.places, self._scores))
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
        self._scores = archive.array("scores", self._scores, shape, torch.float32)
        for kind, example in examples.items():
            held = self._states.get(kind)
            self._states[kind] = archive.array(kind, held, (*shape, example.shape[3]), example.dtype)

    def _scores_of(self, errors: Tensor) -> Tensor:
        """Return what tokens with these errors `[B, H_kv, T]`, the oldest of the tail, are chosen by."""
        received = self.attention.received(errors.shape[2])
        if received is None or received.shape[2] != errors.shape[2]:
            return errors * UNSEEN
        return errors * (received + UNSEEN)


def _rows_of_both(held: Tensor | None, new: Tensor, index: Tensor) -> Tensor:
    """Return rows of `held` and `new` `[B, H_kv, n, D]`, one after the other, without putting them together."""
    before = 0 if held is None else held.shape[2]
    if held is None or before == 0:
        return _rows(new, index)
    old, fresh = _rows(held, index.clamp(max=before - 1)), _rows(new, (index - before).clamp(min=0))
    return torch.where((index < before)[..., None], old, fresh)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(2, index[..., None].expand(*index.shape, states.shape[3]))
