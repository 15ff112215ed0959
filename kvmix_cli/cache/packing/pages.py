"""Whole pages in the order of their tokens: the plain case."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.layout import Encoder, PageLayout
from kvmix_kernels.pages import Packed
from torch import Tensor

from ..archive import Archive
from ..buffer import Buffer
from .base import Packing
from .groups import QuantizedGroup


class PagePacking(Packing):
    """Pages in one layout.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        layout: of every page.
        reserve: pages to make room for at first.
        encoder: how scales and zeros are chosen.
    """

    def __init__(self, name: str, layout: PageLayout, reserve: int = 0, encoder: Encoder = "minmax") -> None:
        self.unit = layout.page
        self._pages = 0
        self._group = QuantizedGroup(name, layout, reserve, encoder)

    @property
    def tokens(self) -> int:
        return self._pages * self.unit

    @property
    def view(self) -> Packed:
        return self._group.view

    def pack(self, states: Tensor) -> None:
        pages = states.unflatten(2, (-1, self.unit))
        self._group.pack(pages)
        self._pages += pages.shape[2]

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        self._pages = keep // self.unit
        rest = self.view.read(self.tokens, keep, dtype)
        self._group.truncate(self._pages)
        return rest

    def select(self, places: Tensor) -> None:
        self._group.select(places)
        self._pages = places.shape[2]

    def exchange(self, archive: Archive) -> None:
        self._pages = archive.number("pages", self._pages)
        self._group.exchange(archive, self._pages)

    def buffers(self) -> Iterator[Buffer]:
        yield from self._group.buffers()
