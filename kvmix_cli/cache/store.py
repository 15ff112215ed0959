"""One layer's keys or values, from arrival to packed pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..plan import CacheSettings
from .buffer import Buffer
from .packing import Packing

ROLLBACK = 64
"""Tokens of the last forward that `crop` can take back without a trace: they are never packed before the next one."""


class Store:
    """Sink | packed tokens | tail of keys or of values, `[B, H_kv, T, D]`.

    Tokens arrive in the tail. What the window no longer keeps is packed when the *next* tokens arrive, whole units
    at a time, once. That is the state a forward of the paper's code attends to, and it lets a forward be taken back.
    Only a long prompt is packed at once, up to what the rule would pack if its last `ROLLBACK` tokens were undone.

    Args:
        packing: what holds tokens that leave the window, or None to keep everything in full precision.
        settings: sink and window.
        bits: width that the window goes by.
        reserve: tokens to make room for at the first append.
    """

    def __init__(
        self, packing: Packing | None, settings: CacheSettings, bits: int = FULL_PRECISION_BITS, reserve: int = 0
    ) -> None:
        self.packing = packing
        self.settings = settings
        self._bits = bits
        self._ahead = 0  # tokens packed before the window's rule asked for them
        self._settled = 0  # tokens packed under the rule when the last forward arrived
        self._fresh = 0  # tokens of the last forward that are still there
        self._waiting: Tensor | None = None  # a tail that is too long to be kept, until `pack_early`
        self._sink = Buffer(0 if packing is None else settings.sink)
        self._tail = Buffer(reserve if packing is None else 0)

    @property
    def sinks(self) -> int:
        return self._sink.length

    @property
    def packed_tokens(self) -> int:
        return 0 if self.packing is None else self.packing.tokens

    @property
    def tail_tokens(self) -> int:
        return self._tail.length if self._waiting is None else self._waiting.shape[2]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.sinks + self.packed_tokens + self.tail_tokens

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
        self.settle()
        seen = self.add(new)
        self.pack_early()
        return seen

    def settle(self) -> int:
        """Pack what the window stopped keeping after the last forward; returns how many tokens that are."""
        due = max(0, min(self._due(self._ahead + self._tail.length) - self._ahead, self._tail.length))
        self._settled, self._ahead = self._ahead + due, 0
        if due:
            self._pack(self._tail.view[:, :, :due])
            self._tail.drop_first(due)
        return due

    def add(self, new: Tensor) -> Segments:
        """Add tokens as `append` does, between `settle` and `pack_early`."""
        self._fresh = new.shape[2]
        rest = self._fill_sink(new.detach())
        if rest.shape[2] <= ROLLBACK or self._early(self._tail.length + rest.shape[2]) == 0:
            self._tail.append(rest)
        else:
            self._waiting = torch.cat([self._tail.view, rest], dim=2) if self._tail.length else rest
        return self.segments()

    def pack_early(self) -> int:
        """Pack a long prompt; returns how many tokens that are."""
        if self._waiting is None:
            return 0
        tail, self._waiting = self._waiting, None
        early = self._early(tail.shape[2])
        self._pack(tail[:, :, :early])
        self._ahead = early
        self._tail.truncate(0)
        self._tail.append(tail[:, :, early:])
        return early

    def segments(self) -> Segments:
        """What is held now, as views."""
        packed = self.packing.view if self.packing is not None and self.packed_tokens else None
        tail = self._tail.view if self._waiting is None else self._waiting
        return Segments(self._sink.view if self.sinks else None, packed, tail)  # type: ignore[arg-type]

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens.

        Exact for tokens that are still in full precision, among them the last `ROLLBACK` of the last forward. Of a
        unit that is cut, what is left goes back to the tail as the values it decodes to.
        """
        keep = max(0, self.length - count)
        self._fresh -= count
        kept_packed = max(0, keep - self.sinks)
        if kept_packed < self.packed_tokens:
            self._reopen(kept_packed)
        else:
            self._tail.truncate(kept_packed - self.packed_tokens)
            if self._fresh == 0:  # back before the last forward: the rule has been applied to this tail already
                self._ahead = self._settled
        self._sink.truncate(keep)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to everything held."""
        for buffer in self._buffers():
            buffer.apply(change)

    def _buffers(self) -> Iterator[Buffer]:
        yield from (self._sink, self._tail)
        if self.packing is not None:
            yield from self.packing.buffers()

    def _fill_sink(self, new: Tensor) -> Tensor:
        """Put the first tokens of all into the sink; returns the others."""
        room = 0 if self.packing is None else self.settings.sink - self.sinks
        if room <= 0 or self.packed_tokens or self._tail.length:
            return new
        self._sink.append(new[:, :, :room])
        return new[:, :, room:]

    def _due(self, tail: int) -> int:
        """Tokens of a tail of `tail` (as the rule counts it) that should be packed."""
        return 0 if self.packing is None else self.settings.window.due(tail, self._bits, self.packing.unit)

    def _early(self, tail: int) -> int:
        return self._due(max(0, tail - ROLLBACK))

    def _pack(self, tokens: Tensor) -> None:
        if self.packing is None:
            raise AssertionError("a store in full precision packs nothing")
        self.packing.pack(tokens)

    def _reopen(self, keep: int) -> None:
        """Cut the store inside its packed tokens: the rest of what was packed with the cut becomes the tail."""
        if self.packing is None:
            raise AssertionError("a store in full precision has nothing packed")
        before = self.packed_tokens
        rest = self.packing.reopen(keep, self._tail.view.dtype)
        self._ahead = max(0, self._ahead - (before - self.packed_tokens))
        self._tail.truncate(0)
        self._tail.append(rest)
