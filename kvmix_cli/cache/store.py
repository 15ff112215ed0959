"""One layer's keys or values, from their arrival in the tail to packed pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..plan import CacheSettings
from .archive import Archive
from .buffer import Buffer
from .packing import Packing

ROLLBACK = 64
"""Tokens of the last forward that `crop` can take back without a trace: they are never packed before the next one."""


class Store:
    """Sink | packed tokens | tail of keys or of values, `[B, H_kv, T, D]`.

    Tokens arrive in the tail. Those that the window no longer keeps are packed when the *next* tokens arrive, whole
    units at a time, once. The KVmix paper's code attends to the same state, and it lets a forward be taken back.
    Only a long prompt is packed at once, up to what the rule would pack if its last `ROLLBACK` tokens were undone.

    Args:
        packing: storage of tokens that leave the window, or None to keep everything in full precision.
        settings: sink and window.
        bits: width that decides the window's size.
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
        self._is_finished = False  # what the next forward packs first was packed ahead of it
        self._changes = 0
        self._waiting: Tensor | None = None  # a tail that is too long to be kept, until `pack_early`
        self._sink = Buffer(0 if packing is None else settings.sink)
        self._tail = Buffer(reserve if packing is None else 0)
        self._segments: Segments | None = None

    @property
    def rows(self) -> tuple[int, int, int] | None:
        """Return `B`, `H_kv` and `D` of the tokens; None before the first."""
        if self._waiting is None and not self._tail.has_shape:
            return None
        batch, heads, _, width = (self._tail.view if self._waiting is None else self._waiting).shape
        return batch, heads, width

    @property
    def sinks(self) -> int:
        """Return the number of tokens in the sink."""
        return self._sink.length

    @property
    def packed_tokens(self) -> int:
        """Return the number of packed tokens."""
        return 0 if self.packing is None else self.packing.tokens

    @property
    def tail_tokens(self) -> int:
        """Return the number of tokens in the tail."""
        return self._tail.length if self._waiting is None else self._waiting.shape[2]

    @property
    def length(self) -> int:
        """Return the number of tokens held."""
        return self.sinks + self.packed_tokens + self.tail_tokens

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return sum(buffer.allocated_bytes for buffer in self._buffers())

    @property
    def due(self) -> int:
        """Return how many tokens `settle` packs."""
        if self._is_finished:
            return 0
        return max(0, min(self._due(self._ahead + self._tail.length) - self._ahead, self._tail.length))

    def settle(self) -> int:
        """Pack what the window stopped keeping after the last forward, and return how many tokens that is.

        Raises:
            QuantizationError: if some of it is NaN, infinite, or beyond the scale's range.
        """
        if self._is_finished:
            return 0
        due = self.due
        if due:
            self._pack(self._tail.view[:, :, :due])
            self._tail.drop_first(due)
        self._settled, self._ahead = self._ahead + due, 0
        self._changes += 1
        return due

    def add(self, new: Tensor) -> Segments:
        """Add `new` `[B, H_kv, S, D]` and return all tokens as this forward must see them: `new` in full precision.

        A forward calls `settle` before and `pack_early` after it.
        """
        self._changes += 1
        self._is_finished = False
        self._fresh = new.shape[2]
        rest = self._fill_sink(new.detach())
        if rest.shape[2] <= ROLLBACK or self._early(self._tail.length + rest.shape[2]) == 0:
            self._tail.append(rest)
        else:
            self._waiting = torch.cat([self._tail.view, rest], dim=2) if self._tail.length else rest
        return self.segments()

    def pack_early(self) -> int:
        """Pack most of a long prompt, and return how many tokens that is. Raises QuantizationError as `settle` does."""
        if self._waiting is None:
            return 0
        early = self._early(self._waiting.shape[2])
        self._pack(self._waiting[:, :, :early])
        tail, self._waiting, self._ahead = self._waiting, None, early
        self._changes += 1
        self._tail.truncate(0)
        self._tail.append(tail[:, :, early:])
        self._segments = None  # they have the whole prompt in full precision
        return early

    def finish(self) -> int:
        """Pack what the next forward would pack first, and return how many tokens that is.

        What is packed can no longer be taken back without a trace.
        """
        due = self.settle()
        self._settled = self._fresh = 0
        self._is_finished = True  # a window that is a share of the tail would pack more each time it is asked
        return due

    def segments(self) -> Segments:
        """Return what is held now, as views: one object until one of them changes."""
        sink = self._sink.view if self.sinks else None
        packed = self.packing.view if self.packing is not None and self.packed_tokens else None
        tail = self._tail.view if self._waiting is None else self._waiting
        held = self._segments
        if held is None or held.sink is not sink or held.packed is not packed or held.tail is not tail:
            held = self._segments = Segments(sink, packed, tail)  # type: ignore[arg-type]
        return held

    def is_unchanged(self) -> Callable[[], bool]:
        """Return a function that says whether the store is still as it is now."""
        changes = self._changes
        return lambda: self._changes == changes

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens.

        Exact for tokens that are still in full precision, among them the last `ROLLBACK` of the last forward. Of a
        unit that is cut, the rest goes back to the tail as the values it decodes to.

        Raises:
            PlanError: if some of the rest has been evicted; nothing is forgotten then.
        """
        keep = max(0, self.length - count)
        kept_packed = max(0, keep - self.sinks)
        if kept_packed < self.packed_tokens:
            self._reopen(kept_packed)
            self._fresh -= count
        else:
            self._tail.truncate(kept_packed - self.packed_tokens)
            self._fresh -= count
            if self._fresh == 0:  # back before the last forward: the rule has been applied to this tail already
                self._ahead = self._settled
        self._sink.truncate(keep)
        self._changes += 1

    def cut(self, tokens: int) -> int:
        """Return the longest length, at most `tokens`, that `crop` can go back to without decoding a packed token."""
        inside = tokens - self.sinks
        if inside >= self.packed_tokens:
            return tokens
        kept = 0 if self.packing is None else self.packing.cut(inside)
        return self.sinks + kept if kept > 0 else 0

    def exchange(self, archive: Archive) -> None:
        """Give what a finished store holds to an archive, or take it from one, empty as this store is then."""
        self._is_finished = True
        states = (*archive.rows, None, archive.example.shape[3])
        archive.buffer("sink", self._sink, states)
        archive.buffer("tail", self._tail, states)
        if self.packing is not None:
            self.packing.exchange(archive.part("packed"))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to everything held."""
        self._changes += 1
        if self._waiting is not None:
            self._waiting = change(self._waiting)
        for buffer in self._buffers():
            buffer.apply(change)

    def _buffers(self) -> Iterator[Buffer]:
        yield from (self._sink, self._tail)
        if self.packing is not None:
            yield from self.packing.buffers()

    def _fill_sink(self, new: Tensor) -> Tensor:
        """Put the very first tokens into the sink, and return the others."""
        room = 0 if self.packing is None else self.settings.sink - self.sinks
        if room <= 0 or self.packed_tokens or self._tail.length:
            return new
        self._sink.append(new[:, :, :room])
        return new[:, :, room:]

    def _due(self, tail: int) -> int:
        """Return how many tokens of a tail of `tail`, as the rule counts it, should be packed."""
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
