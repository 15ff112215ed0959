"""Pages of keys with a summary of each, by which a decoded token chooses the pages that it reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.pages import Coded, Packed
from kvmix_kernels.summaries import Summarized
from torch import Tensor

from ...plan.reading import SelectiveReading
from ..archive import Archive
from ..buffer import Buffer
from .base import Packing


class SummaryPacking(Packing):
    """Pages in another storage, whose keys are summarized as they are packed, before anything is rounded.

    Args:
        pages: storage of the pages.
        reading: the summary, and how much is read.
        is_choosing: False if all pages are read.
    """

    def __init__(self, pages: Packing, reading: SelectiveReading, is_choosing: bool) -> None:
        self.unit = pages.unit
        self._pages = pages
        self._reading = reading
        self._is_choosing = is_choosing
        self._summary = Buffer()

    @property
    def tokens(self) -> int:
        return self._pages.tokens

    @property
    def view(self) -> Summarized:
        held, reading = self._pages.view, self._reading
        if not isinstance(held, (Packed, Coded)):
            raise AssertionError(f"{type(held).__name__} are no pages in the order of their tokens")
        count = reading.count(held.pages, held.page) if self._is_choosing else held.pages
        return Summarized(held, self._summary.view, count, reading.sharing)

    def pack(self, states: Tensor) -> None:
        self._pages.pack(states)
        pages = states.unflatten(2, (-1, self.unit))
        if self._reading.summary == "mean":
            self._summary.append(pages.mean(3, keepdim=True))
        else:
            self._summary.append(torch.stack([pages.amin(3), pages.amax(3)], dim=3))

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        rest = self._pages.reopen(keep, dtype)
        self._summary.truncate(self.tokens // self.unit)
        return rest

    def exchange(self, archive: Archive) -> None:
        self._pages.exchange(archive)
        shape = (*archive.rows, self.tokens // self.unit, self._reading.numbers, archive.example.shape[3])
        archive.buffer("summary", self._summary, shape)

    def buffers(self) -> Iterator[Buffer]:
        yield from self._pages.buffers()
        yield self._summary
