"""Whole pages of keys whose channels are ordered by importance and cut into channel groups (MixKVQ, Kitty)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kvmix_kernels.layout import Encoder, PageLayout
from kvmix_kernels.pages import Channels
from torch import Tensor

from ..archive import Archive
from ..buffer import Buffer
from .base import Packing
from .groups import ChannelGroup, FullGroup, QuantizedGroup

FOREVER = 2**30
"""Pages that the first order holds for, if it is never refreshed."""


class ChannelPacking(Packing):
    """Pages in channel groups; the order of channels is stored once, or once every so many pages.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        groups: layout or, in full precision, width of every group, the most important channels first.
        page: tokens of a page.
        refresh: packed tokens after which channels are ordered again; 0 is never.
        importance: importance `[B, H_kv, D]` of channels, given the tokens `[B, H_kv, n, D]` that are packed next.
        reserve: pages to make room for at first.
        encoder: how scales and zeros are chosen.
    """

    def __init__(
        self,
        name: str,
        groups: tuple[PageLayout | int, ...],
        page: int,
        refresh: int,
        importance: Callable[[Tensor], Tensor],
        reserve: int = 0,
        encoder: Encoder = "minmax",
    ) -> None:
        self.unit = page
        self._pages = 0
        self._pages_per_order = refresh // page or FOREVER
        self._importance = importance
        self._orders = Buffer()
        self._groups: list[ChannelGroup] = [
            FullGroup(group, reserve) if isinstance(group, int) else QuantizedGroup(name, group, reserve, encoder)
            for group in groups
        ]

    @property
    def tokens(self) -> int:
        return self._pages * self.unit

    @property
    def view(self) -> Channels:
        return Channels(self._orders.view, self._pages_per_order, tuple(group.view for group in self._groups))

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
        for group in self._groups:
            group.truncate(self._pages)
        self._orders.truncate(-(-self._pages // self._pages_per_order))
        return rest

    def select(self, places: Tensor) -> None:
        for group in self._groups:
            group.select(places)
        self._pages = places.shape[2]

    def exchange(self, archive: Archive) -> None:
        self._pages = archive.number("pages", self._pages)
        channels, orders = archive.example.shape[3], -(-self._pages // self._pages_per_order)
        archive.buffer("orders", self._orders, (*archive.rows, orders, channels), torch.uint8, below=channels)
        for number, group in enumerate(self._groups):
            group.exchange(archive.part(f"{number}"), self._pages)

    def buffers(self) -> Iterator[Buffer]:
        yield self._orders
        for group in self._groups:
            yield from group.buffers()

    def _pack_ordered(self, states: Tensor) -> None:
        """Append tokens whose channels have the latest order."""
        order = self._orders.view[:, :, -1].long()
        ordered = states.gather(-1, order[:, :, None].expand_as(states)).unflatten(2, (-1, self.unit))
        widths = [group.width for group in self._groups]
        for group, part in zip(self._groups, ordered.split(widths, dim=-1), strict=True):
            group.pack(part)
        self._pages += ordered.shape[2]
