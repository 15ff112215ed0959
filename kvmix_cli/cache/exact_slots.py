"""The tokens of each page that stay exact beside transform codes, chosen once, when the page is packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .archive import Archive
from .buffer import Buffer
from .observation import QuerySample, TailAttention

SAMPLE = QuerySample(recent=64, spread=256)
"""Queries of a prompt that are looked at. Of 900 in SmolLM2-135M, 2 nominal bits, 1 and 2 exact tokens of a page: .0085
and .0069 nats a token; all of them .0086 and .0067, 64 in all .0094 and .0077."""
UNSEEN = 1e-9
"""Attention of a token that no query has looked at: among such tokens, and only among them, the error decides."""


class ExactSlots:
    """The choice of one layer's exact tokens: those with the largest attention received times error in the metric.

    Without attention, as of a model that shows no queries, the error alone decides.

    Args:
        count: exact tokens of a page and KV head.

    Attributes:
        attention: that the tokens in the tail have received.
        slots: `[B, H_kv, pages, count]` int16, places of the exact tokens in their pages.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.attention = TailAttention(SAMPLE)
        self.slots = Buffer()

    def choose(self, errors: Tensor, first: int) -> None:
        """Choose the exact tokens of the next pages.

        Args:
            errors: `[B, H_kv, pages, page]`, squared error of each token in the metric.
            first: place of the first of these pages in the tail, in pages.
        """
        pages, page = errors.shape[2:]
        received = self.attention.received((first + pages) * page)
        if received is not None and received.shape[2] == (first + pages) * page:
            errors = errors * (received[..., first * page :].unflatten(2, (pages, page)) + UNSEEN)
        places = errors.topk(self.count, dim=-1).indices
        self.slots.append(places.sort(dim=-1).values.to(torch.int16))

    def of_pages(self, first: int, count: int) -> Tensor:
        """Return the places `[B, H_kv, count, exact]` int64 of pages from the first on."""
        return self.slots.view[:, :, first : first + count].long()

    def exchange(self, archive: Archive, pages: int, page: int) -> None:
        """Give the places in all `pages` of `page` tokens to an archive, and the attention received, or take them."""
        archive.buffer("slots", self.slots, (*archive.rows, pages, self.count), torch.int16, below=page)
        self.attention.exchange(archive.part("attention"))
