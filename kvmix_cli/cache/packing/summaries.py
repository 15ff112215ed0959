"""Pages of keys with a summary of each, by which a decoded token chooses the pages that it reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.pages import Coded, Packed
from kvmix_kernels.summaries import Summarized
from torch import Tensor

from ...codecs.clustering import nearest, refined
from ...plan.reading import ENTRIES, PARTS, SelectiveReading
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
        self._summary, self._books = Buffer(), Buffer()

    @property
    def tokens(self) -> int:
        return self._pages.tokens

    @property
    def view(self) -> Summarized:
        held, reading = self._pages.view, self._reading
        if not isinstance(held, (Packed, Coded)):
            raise AssertionError(f"{type(held).__name__} are no pages in the order of their tokens")
        count = reading.count(held.pages, held.page) if self._is_choosing else held.pages
        books = self._books.view if reading.is_coded else None
        return Summarized(held, self._summary.view, count, reading.sharing, books)

    def pack(self, states: Tensor) -> None:
        self._pages.pack(states)
        pages = states.unflatten(2, (-1, self.unit))
        if self._reading.is_coded:
            self._summary.append(self._codes(states).unflatten(2, (-1, self.unit)))
        elif self._reading.summary == "mean":
            self._summary.append(pages.mean(3, keepdim=True))
        else:
            self._summary.append(torch.stack([pages.amin(3), pages.amax(3)], dim=3))

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        rest = self._pages.reopen(keep, dtype)
        self._summary.truncate(self.tokens // self.unit)
        if not self.tokens:
            self._books.truncate(0)
        return rest

    def exchange(self, archive: Archive) -> None:
        self._pages.exchange(archive)
        pages, width = self.tokens // self.unit, archive.example.shape[3]
        if not self._reading.is_coded:
            archive.buffer("summary", self._summary, (*archive.rows, pages, self._reading.numbers, width))
            return
        archive.buffer("summary", self._summary, (*archive.rows, pages, self.unit, PARTS), torch.uint8)
        learned = PARTS if pages else 0
        archive.buffer("books", self._books, (*archive.rows, learned, ENTRIES, width // PARTS))

    def buffers(self) -> Iterator[Buffer]:
        yield from self._pages.buffers()
        yield from (self._summary, self._books)

    def _codes(self, keys: Tensor) -> Tensor:
        """Return the codes of keys `[B, H_kv, n, D]`, `[B, H_kv, n, PARTS]` uint8.

        Codebooks are learned from the keys that are packed first, those of a prompt: k-means, begun with evenly spaced
        ones (PQCache, arXiv 2407.12820, section 4.2). Later keys get the nearest entries.
        """
        clouds = keys.unflatten(-1, (PARTS, -1)).transpose(2, 3).float().flatten(0, 2)
        if not self._books.length:
            first = torch.linspace(0, clouds.shape[1] - 1, ENTRIES, device=keys.device).long()
            books = refined(clouds, torch.ones_like(clouds[..., 0]), clouds[:, first])
            self._books.append(books.unflatten(0, (*keys.shape[:2], PARTS)).to(keys.dtype))
        books = self._books.view.float().flatten(0, 2)
        codes: Tensor = nearest(clouds, books).unflatten(0, (*keys.shape[:2], PARTS)).mT.to(torch.uint8)
        return codes
