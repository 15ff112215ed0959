"""Whole pages of keys whose channels are sorted by importance and cut into runs (MixKVQ, Kitty)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.segments import Channels
from torch import Tensor

from ..buffer import Buffer
from .base import Packing
from .runs import PlainRun, QuantizedRun, Run, Sort

FOREVER = 2**30
"""Pages that the first order holds for, if it is never refreshed."""


class ChannelPages(Packing):
    """Pages in runs of channels; the order of channels is stored once, or once every so many pages.

    Args:
        runs: layout or width of every run, the most important channels first.
        page: tokens of a page.
        refresh: packed tokens after which channels are sorted anew; 0 is never.
        importance: of channels `[B, H_kv, D]`, given the tokens `[B, H_kv, n, D]` that are packed next.
        reserve: pages to make room for at first.
    """

    def __init__(
        self,
        name: str,
        runs: tuple[PageLayout | int, ...],
        page: int,
        refresh: int,
        importance: Sort,
        reserve: int = 0,
    ) -> None:
        self.unit = page
        self._pages = 0
        self._pages_per_order = refresh // page or FOREVER
        self._importance = importance
        self._orders = Buffer()
        self._runs: list[Run] = [
            PlainRun(run, reserve) if isinstance(run, int) else QuantizedRun(name, run, reserve) for run in runs
        ]

    @property
    def tokens(self) -> int:
        return self._pages * self.unit

    @property
    def view(self) -> Channels:
        return Channels(self._orders.view, self._pages_per_order, tuple(run.view for run in self._runs))

    def pack(self, states: Tensor) -> None:
        while states.shape[2]:
            used = self._pages % self._pages_per_order
            count = min(states.shape[2], (self._pages_per_order - used) * self.unit)
            some, states = states[:, :, :count], states[:, :, count:]
            if used == 0:
                order = self._importance(some).argsort(dim=-1, descending=True, stable=True)
                self._orders.append(order.to(torch.uint8)[:, :, None])
            self._pack_ordered(some)

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        self._pages = keep // self.unit
        rest = self.view.read(self.tokens, keep, dtype)
        for run in self._runs:
            run.truncate(self._pages)
        self._orders.truncate(-(-self._pages // self._pages_per_order))
        return rest

    def buffers(self) -> Iterator[Buffer]:
        yield self._orders
        for run in self._runs:
            yield from run.buffers()

    def _pack_ordered(self, states: Tensor) -> None:
        """Append tokens to which the latest order applies."""
        order = self._orders.view[:, :, -1].long()
        sorted_states = states.gather(-1, order[:, :, None].expand_as(states)).unflatten(2, (-1, self.unit))
        widths = [run.width for run in self._runs]
        for run, part in zip(self._runs, sorted_states.split(widths, dim=-1), strict=True):
            run.pack(part)
        self._pages += sorted_states.shape[2]
