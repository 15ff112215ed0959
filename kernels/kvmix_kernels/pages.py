"""Types of whole pages of tokens: codes, transform codes, or sorted channels of several widths.

    Packed            codes, all in one layout
    Channels          keys, their channels sorted and cut into runs of one width each
      Packed, Plain   one run of channels: codes, or full precision
    Coded             transform codes, a few of their tokens exact

All of them are views of memory that the cache owns, and none ever copies it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import PageLayout
from .quantize.naive import dequantize
from .transform import TransformBasis
from .transform.naive import decode


class TokenPages(ABC):
    """Whole pages of tokens of every KV head, oldest first."""

    @property
    @abstractmethod
    def page(self) -> int:
        """Tokens in a page."""

    @property
    @abstractmethod
    def pages(self) -> int:
        """Number of pages."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of channels."""

    @abstractmethod
    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return pages `[first, last)`, dequantized: `[B, H_kv, pages, page, width]`."""

    @cached_property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.pages * self.page

    @property
    def kept(self) -> int:
        """Tokens that can be attended to: all of them."""
        return self.tokens

    @property
    def quantized(self) -> int:
        """Tokens that are read in quantized form: all of them."""
        return self.tokens

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, width]`; read only their pages."""
        first, last = start // self.page, -(-stop // self.page)
        states = self.select(first, last, dtype)
        return states.flatten(2, 3)[:, :, start - first * self.page : stop - first * self.page]


@dataclass(frozen=True, eq=False)
class Packed(TokenPages):
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
        return self.layout.page

    @property
    def pages(self) -> int:
        return self.words.shape[2]

    @property
    def width(self) -> int:
        return self.layout.head_dim

    @property
    def runs(self) -> tuple[Packed | Plain, ...]:
        """The only run of channels."""
        return (self,)

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return dequantize(self.words[:, :, first:last], self.scales[:, :, first:last], self.layout, dtype)


@dataclass(frozen=True, eq=False)
class Plain(TokenPages):
    """Pages of a run of key channels in full precision, laid out as packed keys are: channels, then tokens.

    Attributes:
        states: `[B, H_kv, pages, width, page]` in the model's dtype.
    """

    states: Tensor

    @property
    def page(self) -> int:
        return self.states.shape[4]

    @property
    def pages(self) -> int:
        return self.states.shape[2]

    @property
    def width(self) -> int:
        return self.states.shape[3]

    @property
    def quantized(self) -> int:
        """Tokens that are read in quantized form: none."""
        return 0

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.states[:, :, first:last].transpose(-1, -2).to(dtype)


@dataclass(frozen=True, eq=False)
class Channels(TokenPages):
    """Pages of keys whose channels are sorted and cut into runs, each of its own precision (MixKVQ, Kitty).

    Attributes:
        order: `[B, H_kv, orders, D]` uint8; the channel at each place.
        pages_per_order: page `p` is sorted by order `p // pages_per_order`.
        runs: what is stored at the places, from the first on; their widths add up to `D`.
    """

    order: Tensor
    pages_per_order: int
    runs: tuple[Packed | Plain, ...]

    @property
    def page(self) -> int:
        return self.runs[0].page

    @property
    def pages(self) -> int:
        return self.runs[0].pages

    @property
    def width(self) -> int:
        return sum(run.width for run in self.runs)

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        places = torch.cat([run.select(first, last, dtype) for run in self.runs], dim=-1)
        of_page = torch.arange(first, last, device=places.device) // self.pages_per_order
        order = self.order.index_select(2, of_page).long()[:, :, :, None].expand_as(places)
        return torch.empty_like(places).scatter_(-1, order, places)


@dataclass(frozen=True, eq=False)
class Coded(TokenPages):
    """Pages of transform codes, of which a few tokens are exact: kept as the model gave them.

    Attributes:
        basis: directions, widths and frames of this layer's keys, or values.
        codes: `[B, 1, pages, page_bytes]` uint8, see `transform_layout`; those of exact tokens count for nothing.
        scales: `[B, H_kv, pages, page]` float16, of values; None for keys.
        places: `[B, H_kv, N]` int32, positions of the exact tokens among those of all pages, ascending, shared by keys
            and values; those below 0 stand for no token. None if there are none.
        exact: `[B, H_kv, N, D]` in the model's dtype, finite.
    """

    basis: TransformBasis
    codes: Tensor
    scales: Tensor | None = None
    places: Tensor | None = None
    exact: Tensor | None = None

    @property
    def page(self) -> int:
        return self.basis.layout.page

    @property
    def pages(self) -> int:
        return self.codes.shape[2]

    @property
    def width(self) -> int:
        return self.basis.layout.head_dim

    @property
    def quantized(self) -> int:
        """Tokens that are read in quantized form: all but the exact ones."""
        return self.tokens - (0 if self.places is None else self.places.shape[2])

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        scales = None if self.scales is None else self.scales[:, :, first:last]
        states = decode(self.codes[:, :, first:last], scales, self.basis, first, dtype)
        if self.places is None or self.exact is None:
            return states
        tokens, start = (last - first) * self.page, first * self.page
        inside = (self.places >= start) & (self.places < start + tokens)
        places = torch.where(inside, self.places.long() - start, tokens)  # others go to a row that is cut off
        rows = pad(states.flatten(2, 3), (0, 0, 0, 1))
        rows.scatter_(2, places[..., None].expand_as(self.exact), self.exact.to(dtype))
        return rows[:, :, :tokens].reshape(states.shape)
