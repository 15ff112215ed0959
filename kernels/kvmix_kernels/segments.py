"""One layer's keys or values as attention reads them: sink | packed pages | tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import PageLayout
from .quantize.naive import dequantize


@dataclass(frozen=True)
class Packed:
    """Whole pages of quantized tokens, oldest first.

    Attributes:
        layout: of every page.
        words: `[B, H_kv, pages, *layout.words_shape]` int16.
        scales: `[B, H_kv, pages, *layout.scales_shape]` in the scale dtype.
    """

    layout: PageLayout
    words: Tensor
    scales: Tensor

    @property
    def pages(self) -> int:
        return self.words.shape[2]

    @property
    def tokens(self) -> int:
        return self.pages * self.layout.page

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Touches only the pages they lie in."""
        page = self.layout.page
        first, last = start // page, -(-stop // page)
        pages = dequantize(self.words[:, :, first:last], self.scales[:, :, first:last], self.layout, dtype)
        return pages.flatten(2, 3)[:, :, start - first * page : stop - first * page]


@dataclass(frozen=True)
class Segments:
    """Keys or values in the order of their tokens; views, never copies.

    Attributes:
        sink: `[B, H_kv, sinks, D]`, or None.
        packed: the quantized pages after the sinks, or None.
        tail: `[B, H_kv, tokens, D]`, the most recent tokens.
    """

    sink: Tensor | None
    packed: Packed | None
    tail: Tensor

    @property
    def shape(self) -> torch.Size:
        """`[B, H_kv, T, D]`, as if it were one tensor."""
        batch, heads, tail, width = self.tail.shape
        return torch.Size((batch, heads, self.sinks + self.packed_tokens + tail, width))

    @property
    def sinks(self) -> int:
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_tokens(self) -> int:
        return 0 if self.packed is None else self.packed.tokens

    @property
    def edges(self) -> tuple[int, int]:
        """First and last-plus-one packed token."""
        return self.sinks, self.sinks + self.packed_tokens

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)` in `dtype`, dequantized where they are packed: `[B, H_kv, stop - start, D]`."""
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
        """All of it as one plain tensor `[B, H_kv, T, D]` in the tail's dtype; costs what the cache is made to save."""
        return self.read(0, self.shape[2], self.tail.dtype)
