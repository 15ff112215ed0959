"""Types of pages of which a query reads some: all pages with a summary of each, and those that were chosen by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .pages import Coded, Packed, TokenPages

Sharing = Literal["max", "sum", "layer"]
"""Query heads that choose together: those of a KV head, by their largest weight or the sum of all, or the layer's."""


@dataclass(frozen=True, eq=False)
class Summarized(TokenPages):
    """Pages of keys with a summary of each, from which one query tells the pages that it reads.

    Attributes:
        held: the pages.
        summary: `[B, H_kv, pages, 1, D]`, the mean of each page's keys as they are stored, or `[B, H_kv, pages, 2, D]`,
            the smallest and the largest number of each channel, or `[B, H_kv, pages, page, P]` uint8, the codes of the
            `P` parts of each key.
        count: pages that a query reads.
        sharing: query heads that choose together.
        books: `[B, H_kv, P, entries, D / P]`, what the codes stand for; None for other summaries.
    """

    held: Packed | Coded
    summary: Tensor
    count: int
    sharing: Sharing = "max"
    books: Tensor | None = None

    @property
    def page(self) -> int:
        return self.held.page

    @property
    def pages(self) -> int:
        return self.held.pages

    @property
    def width(self) -> int:
        return self.held.width

    @property
    def quantized(self) -> int:
        """Tokens that are read in quantized form by queries that read all pages."""
        return self.held.quantized

    def unread(self, queries: int) -> int:
        """Return the tokens that a forward of so many queries does not read; several queries read all of them."""
        return max(0, self.pages - self.count) * self.page if queries == 1 else 0

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.held.select(first, last, dtype)


@dataclass(frozen=True, eq=False)
class ChosenPages(TokenPages):
    """Some pages of every KV head, as many as of every other, in the order of their tokens.

    Attributes:
        held: all pages.
        numbers: `[B, H_kv, n]` int32, ascending: which of them they are.
    """

    held: Packed | Coded
    numbers: Tensor

    @property
    def page(self) -> int:
        return self.held.page

    @property
    def pages(self) -> int:
        return self.numbers.shape[2]

    @property
    def width(self) -> int:
        return self.held.width

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        numbers = self.numbers[:, :, first:last].long()
        if isinstance(self.held, Packed):
            return _gathered(self.held, numbers).select(0, last - first, dtype)
        shape = (*numbers.shape, self.page, self.width)
        states = torch.empty(shape, dtype=dtype, device=numbers.device)
        for number in numbers.unique().tolist():  # a page of transform codes has all KV heads in it
            page = self.held.select(number, number + 1, dtype).expand(-1, -1, shape[2], -1, -1)
            states = torch.where((numbers == number)[..., None, None], page, states)
        return states

    def gathered(self) -> Packed | ChosenPages:
        """Return a copy of the chosen pages alone; transform codes stay, since a page of them has all heads in it."""
        return _gathered(self.held, self.numbers.long()) if isinstance(self.held, Packed) else self


def _gathered(held: Packed, numbers: Tensor) -> Packed:
    batch, head = (torch.arange(size, device=numbers.device) for size in numbers.shape[:2])
    at = batch[:, None, None], head[:, None], numbers
    return replace(held, words=held.words[at], scales=held.scales[at])
