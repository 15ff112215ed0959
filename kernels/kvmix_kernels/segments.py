"""Types of everything that attention reads: one layer's keys or values as sink | packed tokens | tail.

    Segments            sink | packed tokens | tail, the only type that attention takes
      Packed            whole pages of codes, all in one layout
      Channels          whole pages of keys, their channels sorted and cut into runs of one width each
        Packed, Plain   one run of channels: codes, or full precision
      Coded             whole pages of transform codes, a few of their tokens exact
      Tiers             tokens sorted by importance into tiers of one width each, or evicted
        Packed, Channels, Tensor   the tokens of one tier
      KeptTokens        a bounded number of tokens, in any order, all others evicted
      PooledTokens      another number of tokens in each KV head (`pooled.py`)

All of them are views of memory that the cache owns, and none ever copies it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import PageLayout
from .quantize.naive import dequantize
from .transform import TransformBasis
from .transform.naive import decode

EVICTED: Final = 255
"""The tier of evicted tokens: they keep their position, and nothing attends to them."""


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


class SortedTokens(ABC):
    """Tokens that were sorted by importance: held in one form or several, or dropped.

    Every KV head holds as many tokens in each form as every other, but tokens of its own.

    Attributes:
        held: the tokens of each form; a tensor `[B, H_kv, n, D]` is full precision.
    """

    held: tuple[Packed | Channels | Tensor, ...]

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens, those that were dropped included."""

    @abstractmethod
    def places(self, form: int) -> Tensor:
        """Return the positions of a form's tokens, in its order, `[B, H_kv, n]`, counted after the sinks."""

    @property
    def kept(self) -> int:
        """Tokens of every KV head that can be attended to."""
        return sum(count(held) for held in self.held)

    @property
    def quantized(self) -> int:
        """Tokens of every KV head that are read in quantized form."""
        return sum(held.tokens for held in self.held if not isinstance(held, Tensor))

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Reads all tokens.

        Raises:
            ValueError: if any token has been evicted.
        """
        if (evicted := self.tokens - self.kept) > 0:
            words = f"{evicted} of {self.tokens} tokens have been evicted"
            raise ValueError(f"{words}; only a cache that keeps all of its tokens can be read as one tensor")
        states = [x.to(dtype) if isinstance(x, Tensor) else x.read(0, x.tokens, dtype) for x in self.held]
        sorted_states = torch.cat(states, dim=2)
        places = torch.cat([self.places(form) for form in range(len(self.held))], dim=2).long()
        whole = torch.empty_like(sorted_states)
        return whole.scatter_(2, places[..., None].expand_as(whole), sorted_states)[:, :, start:stop]


@dataclass(frozen=True)
class Tiers(SortedTokens):
    """Tokens in tiers.

    Attributes:
        tier: `[B, H_kv, T]` uint8, the tier of each token, or `EVICTED`.
        held: the tokens of each tier in the order of their positions.
        log_weight: of the last tier, the logarithm of the number of tokens that each token counts for.
    """

    tier: Tensor
    held: tuple[Packed | Channels | Tensor, ...]
    log_weight: float = 0.0

    @property
    def tokens(self) -> int:
        return self.tier.shape[2]

    def places(self, form: int) -> Tensor:
        """Return the positions of a tier's tokens (or of those evicted), `[B, H_kv, n]`, counted after the sinks."""
        elsewhere = (self.tier != form).byte()  # sorted, not selected: a GPU then need not say how many there are
        there = self.tokens - self.kept if form == EVICTED else count(self.held[form])
        return elsewhere.argsort(stable=True)[..., :there]


@dataclass(frozen=True)
class KeptTokens(SortedTokens):
    """A bounded number of tokens of all that there were, in one form, in any order.

    Attributes:
        positions: `[B, H_kv, n]` int32, of each token that is held, counted after the sinks.
        held: the tokens, one form.
        total: number of tokens that there were.
    """

    positions: Tensor
    held: tuple[Packed | Channels | Tensor, ...]
    total: int

    @property
    def tokens(self) -> int:
        return self.total

    def places(self, form: int) -> Tensor:
        return self.positions.long()


def count(held: TokenPages | Tensor) -> int:
    """Return the number of tokens in a tier."""
    return held.shape[2] if isinstance(held, Tensor) else held.tokens


@dataclass(frozen=True)
class Segments:
    """Keys or values in the order of their tokens.

    Attributes:
        sink: `[B, H_kv, sinks, D]`, or None.
        packed: the tokens after the sinks, or None.
        tail: `[B, H_kv, tokens, D]`, the most recent tokens.
    """

    sink: Tensor | None
    packed: TokenPages | SortedTokens | None
    tail: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        """`[B, H_kv, T, D]`, as if it were one tensor."""
        batch, heads, tail, width = self.tail.shape
        return torch.Size((batch, heads, self.sinks + self.packed_tokens + tail, width))

    @property
    def sinks(self) -> int:
        """Number of sink tokens."""
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_tokens(self) -> int:
        """Number of tokens between sinks and tail."""
        return 0 if self.packed is None else self.packed.tokens

    @property
    def edges(self) -> tuple[int, int]:
        """First and last-plus-one packed token."""
        return self.sinks, self.sinks + self.packed_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens that can be attended to: all but those that a token policy has evicted."""
        return self.shape[2] - (0 if self.packed is None else self.packed.tokens - self.packed.kept)

    @property
    def quantized_tokens(self) -> int:
        """Tokens that are read in quantized form."""
        return 0 if self.packed is None else self.packed.quantized

    @property
    def runs(self) -> tuple[Packed | Plain, ...]:
        """Runs of channels in which the pages are stored, none where there is no page.

        Raises:
            AssertionError: for sorted tokens, transform codes and chosen pages, which have none.
        """
        if self.packed is not None and not isinstance(self.packed, (Packed, Channels)):
            raise AssertionError(f"{type(self.packed).__name__} have no runs of channels that all tokens share")
        return () if self.packed is None or self.packed.pages == 0 else self.packed.runs

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)` in `dtype`, dequantized where they are packed: `[B, H_kv, stop - start, D]`."""
        first, last = self.edges
        parts = []
        if self.sink is not None and start < first:
            parts.append(self.sink[:, :, start:stop].to(dtype))
        if self.packed is not None and start < last and stop > first:
            parts.append(self.packed.read(max(start, first) - first, min(stop, last) - first, dtype))
        if stop > last or not parts:
            parts.append(self.tail[:, :, max(0, start - last) : stop - last].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def dequantize(self) -> Tensor:
        """Return one plain tensor `[B, H_kv, T, D]` in the tail's dtype, which costs the memory that the cache saves.

        Raises:
            ValueError: if any token has been evicted.
        """
        return self.read(0, self.shape[2], self.tail.dtype)
