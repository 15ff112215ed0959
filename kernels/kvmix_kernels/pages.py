"""Whole pages of tokens, oldest first: of one codec, or with their channels cut into runs of a codec each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import PageLayout
from .quantize.naive import dequantize


@dataclass(frozen=True)
class Packed:
    """Quantized pages.

    Attributes:
        layout: of every page.
        words: `[B, H_kv, pages, *layout.words_shape]` int16.
        scales: `[B, H_kv, pages, *layout.scales_shape]` in the scale dtype.
    """

    layout: PageLayout
    words: Tensor
    scales: Tensor

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.layout.page

    @property
    def pages(self) -> int:
        return self.words.shape[2]

    @property
    def tokens(self) -> int:
        return self.pages * self.page

    @property
    def width(self) -> int:
        """Channels."""
        return self.layout.head_dim

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Pages `[first, last)`, dequantized: `[B, H_kv, pages, page, D]`."""
        return dequantize(self.words[:, :, first:last], self.scales[:, :, first:last], self.layout, dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Touches only the pages they lie in."""
        return _tokens(self, start, stop, dtype)


@dataclass(frozen=True)
class Plain:
    """Pages of a run of key channels in full precision, laid out as packed ones are: channels, then tokens.

    Attributes:
        states: `[B, H_kv, pages, width, page]` in the model's dtype.
    """

    states: Tensor

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.states.shape[4]

    @property
    def pages(self) -> int:
        return self.states.shape[2]

    @property
    def width(self) -> int:
        """Channels."""
        return self.states.shape[3]

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Pages `[first, last)`: `[B, H_kv, pages, page, width]`."""
        return self.states[:, :, first:last].transpose(-1, -2).to(dtype)


@dataclass(frozen=True)
class Channels:
    """Pages of keys whose channels are sorted and cut into runs, each of its own precision (MixKVQ, Kitty).

    Attributes:
        order: `[B, H_kv, orders, D]` uint8; the channel at each place.
        pages_per_order: page `p` is sorted by order `p // pages_per_order`.
        runs: what holds the places, from the first on; their widths add up to `D`.
    """

    order: Tensor
    pages_per_order: int
    runs: tuple[Packed | Plain, ...]

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.runs[0].page

    @property
    def pages(self) -> int:
        return self.runs[0].pages

    @property
    def tokens(self) -> int:
        return self.pages * self.page

    @property
    def width(self) -> int:
        """Channels."""
        return sum(run.width for run in self.runs)

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Pages `[first, last)`, dequantized and in the order of channels: `[B, H_kv, pages, page, D]`."""
        places = torch.cat([run.select(first, last, dtype) for run in self.runs], dim=-1)
        of_page = torch.arange(first, last, device=places.device) // self.pages_per_order
        order = self.order.index_select(2, of_page).long()[:, :, :, None].expand_as(places)
        return torch.empty_like(places).scatter_(-1, order, places)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Touches only the pages they lie in."""
        return _tokens(self, start, stop, dtype)


def _tokens(pages: Packed | Channels, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    first, last = start // pages.page, -(-stop // pages.page)
    states = pages.select(first, last, dtype)
    return states.flatten(2, 3)[:, :, start - first * pages.page : stop - first * pages.page]
