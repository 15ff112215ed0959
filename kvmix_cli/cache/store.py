"""One layer's keys or values, from arrival to packed pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import dequantize, quantize
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..errors import QuantizationError
from ..plan import CacheSettings
from .buffer import Buffer

ROLLBACK = 64
"""Tokens of the last forward that `crop` can take back without a trace: they are never packed before the next one."""
PAGES_AT_ONCE = 32
"""Pages that are quantized together; bounds the float32 temporaries of a long prompt."""


class Store:
    """Sink | packed pages | tail of keys or of values, `[B, H_kv, T, D]`.

    Tokens arrive in the tail. What the window no longer keeps is packed when the *next* tokens arrive, whole pages
    at a time, once. That is the state a forward of the paper's code attends to, and it lets a forward be taken back.
    Only a long prompt is packed at once, up to what the rule would pack if its last `ROLLBACK` tokens were undone.

    Args:
        name: for errors, e.g. `layer 3 keys`.
        layout: of a page, or None to keep everything in full precision.
        settings: page, sink and window.
        reserve: tokens to make room for at the first append.
    """

    def __init__(self, name: str, layout: PageLayout | None, settings: CacheSettings, reserve: int = 0) -> None:
        self.name = name
        self.layout = layout
        self.settings = settings
        self._ahead = 0  # tokens packed before the window's rule asked for them
        self._settled = 0  # tokens packed under the rule when the last forward arrived
        self._fresh = 0  # tokens of the last forward that are still there
        sinks = 0 if layout is None else settings.sink
        pages = 0 if layout is None else max(0, reserve - sinks) // settings.page
        self._sink = Buffer(sinks)
        self._words = Buffer(pages)
        self._scales = Buffer(pages)
        self._tail = Buffer(reserve if layout is None else 0)

    @property
    def sinks(self) -> int:
        return self._sink.length

    @property
    def packed_tokens(self) -> int:
        return self._words.length * self.settings.page

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.sinks + self.packed_tokens + self._tail.length

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def allocated_bytes(self) -> int:
        """Bytes held, with the room to grow."""
        return sum(buffer.allocated_bytes for buffer in self._buffers())

    def append(self, new: Tensor) -> Segments:
        """Add `new` `[B, H_kv, S, D]` and return everything as this forward must see it: `new` in full precision.

        Raises:
            QuantizationError: if what has to be packed is NaN, infinite, or beyond the scale's range.
        """
        self._settle()
        self._fresh = new.shape[2]
        rest = self._fill_sink(new)
        early = self._early(self._tail.length + rest.shape[2]) if rest.shape[2] > ROLLBACK else 0
        if early == 0:
            self._tail.append(rest)
            return self._segments(self._tail.view)
        tail = torch.cat([self._tail.view, rest], dim=2) if self._tail.length else rest
        seen = self._segments(tail)
        self._pack(tail[:, :, :early])
        self._ahead = early
        self._tail.truncate(0)
        self._tail.append(tail[:, :, early:])
        return seen

    def segments(self) -> Segments:
        """What is held now, as views."""
        return self._segments(self._tail.view)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens.

        Exact for tokens that are still in full precision, among them the last `ROLLBACK` of the last forward. A page
        that is cut goes back to the tail as the values it decodes to.
        """
        keep = max(0, self.length - count)
        self._fresh -= count
        pages_kept = max(0, keep - self.sinks) // self.settings.page
        if pages_kept < self._words.length:
            self._reopen(pages_kept, keep)
        else:
            self._tail.truncate(max(0, keep - self.sinks - self.packed_tokens))
            if self._fresh == 0:  # back before the last forward: the rule has been applied to this tail already
                self._ahead = self._settled
        self._sink.truncate(keep)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to everything held."""
        for buffer in self._buffers():
            buffer.apply(change)

    def _buffers(self) -> Iterator[Buffer]:
        yield from (self._sink, self._words, self._scales, self._tail)

    def _segments(self, tail: Tensor) -> Segments:
        packed = None
        if self.layout is not None and self._words.length:
            packed = Packed(self.layout, self._words.view, self._scales.view)
        return Segments(self._sink.view if self.sinks else None, packed, tail)

    def _fill_sink(self, new: Tensor) -> Tensor:
        """Put the first tokens of all into the sink; returns the others."""
        room = 0 if self.layout is None else self.settings.sink - self.sinks
        if room <= 0 or self.packed_tokens or self._tail.length:
            return new
        self._sink.append(new[:, :, :room])
        return new[:, :, room:]

    def _due(self, tail: int) -> int:
        """Tokens of a tail of `tail` (as the rule counts it) that should be packed."""
        if self.layout is None:
            return 0
        return self.settings.window.due(tail, self.layout.bits, self.settings.page)

    def _early(self, tail: int) -> int:
        return self._due(max(0, tail - ROLLBACK))

    def _settle(self) -> None:
        """Pack what the window stopped keeping after the last forward."""
        due = max(0, min(self._due(self._ahead + self._tail.length) - self._ahead, self._tail.length))
        self._settled, self._ahead = self._ahead + due, 0
        if due:
            self._pack(self._tail.view[:, :, :due])
            self._tail.drop_first(due)

    def _pack(self, tokens: Tensor) -> None:
        """Quantize whole pages `[B, H_kv, n * page, D]` and append them."""
        if self.layout is None:
            raise AssertionError("a store in full precision packs nothing")
        pages = tokens.unflatten(2, (-1, self.settings.page))
        for some in pages.split(PAGES_AT_ONCE, dim=2):
            words, scales = quantize(some, self.layout)
            if not torch.isfinite(scales).all():
                raise QuantizationError(self._complaint(some))
            self._words.append(words)
            self._scales.append(scales)

    def _complaint(self, pages: Tensor) -> str:
        if torch.isfinite(pages).all():
            return (
                f"{self.name}: values up to {pages.abs().max().item():.3g} do not fit {self.settings.scale_dtype} "
                "scales; set `scale_dtype: bfloat16` in the plan's cache section"
            )
        return (
            f"{self.name}: NaN or Inf among the values to quantize; the model itself has overflowed, try another dtype"
        )

    def _reopen(self, pages_kept: int, keep: int) -> None:
        """Cut the store inside its packed pages: the rest of the cut page becomes the tail."""
        if self.layout is None:
            raise AssertionError("a store in full precision has no pages")
        cut = slice(pages_kept, pages_kept + 1)
        page = dequantize(self._words.view[:, :, cut], self._scales.view[:, :, cut], self.layout)
        dropped = self.packed_tokens - pages_kept * self.settings.page
        self._words.truncate(pages_kept)
        self._scales.truncate(pages_kept)
        self._ahead = max(0, self._ahead - dropped)
        remaining = max(0, keep - self.sinks - self.packed_tokens)
        self._tail.truncate(0)
        self._tail.append(page.flatten(2, 3)[:, :, :remaining].to(self._tail.view.dtype))
