"""Whole pages as a page codec stores them, in the order of their tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from kvmix_kernels.encoded import CodecPages
from kvmix_kernels.vector_pages import VectorPages
from torch import Tensor

from ...codecs import PageCodec
from ...codecs.vectors import LearnedVectors, Vectors
from ...errors import PlanError, QuantizationError
from ..archive import Archive
from ..buffer import Buffer
from ..codebooks import Turn
from .base import Packing
from .groups import NOT_FINITE, PAGES_AT_ONCE


def pages_of(codec: PageCodec, parts: Mapping[str, Tensor], turn: Turn | None = None) -> CodecPages:
    """Return stored pages as attention reads them: those of vectors with their codebooks.

    Args:
        codec: of the pages.
        parts: `[B, H_kv, pages, *shape]` each.
        turn: function from decoded pages and the number of the first of them to what is read; None for the same.
    """
    if isinstance(codec, Vectors) and type(codec) in (Vectors, LearnedVectors):  # a user's own may decode otherwise
        return VectorPages(parts, codec.decode, codec.page, codec.head_dim, turn, books=codec.by_channel)
    return CodecPages(parts, codec.decode, codec.page, codec.head_dim, turn)


class CodecPacking(Packing):
    """Pages of one codec.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        codec: of every page.
        reserve: pages to make room for at first.
        turns: turns of pages before they are encoded, and of decoded ones, each given the number of the first page;
            None for none.
    """

    def __init__(self, name: str, codec: PageCodec, reserve: int = 0, turns: tuple[Turn, Turn] | None = None) -> None:
        self.unit = codec.page
        self._name = name
        self._codec = codec
        self._back = None if turns is None else turns[0]
        self._forth = None if turns is None else turns[1]
        self._parts = {part: Buffer(reserve) for part in codec.parts}
        self._pages = 0
        self._held: CodecPages | None = None

    @property
    def tokens(self) -> int:
        return self._pages * self.unit

    @property
    def view(self) -> CodecPages:
        parts, held = {name: buffer.view for name, buffer in self._parts.items()}, self._held
        if held is None or any(held.parts[name] is not part for name, part in parts.items()):
            held = self._held = pages_of(self._codec, parts, self._forth)
        return held

    def pack(self, states: Tensor) -> None:
        pages = states.unflatten(2, (-1, self.unit))
        firsts = range(self._pages, self._pages + pages.shape[2], PAGES_AT_ONCE)
        parts_of = zip(firsts, pages.split(PAGES_AT_ONCE, dim=2), strict=True)
        made = [self._encoded(self._turned_back(some.float(), first)) for first, some in parts_of]
        for parts in made:
            for name, part in parts.items():
                self._parts[name].append(part)
        self._pages += pages.shape[2]

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        self._pages = keep // self.unit
        rest = self.view.read(self.tokens, keep, dtype)
        for buffer in self.buffers():
            buffer.truncate(self._pages)
        return rest

    def select(self, places: Tensor) -> None:
        for buffer in self.buffers():
            buffer.select(places)
        self._pages = places.shape[2]

    def exchange(self, archive: Archive) -> None:
        if (table := self._codec.constant) is not None:
            why = "the table of its codec is another one here; make the cache again on this machine"
            archive.same("table", zlib.crc32(table.cpu().contiguous().numpy().tobytes()), why)
        self._pages = archive.number("pages", self._pages)
        for name, part in self._codec.parts.items():
            dtype = getattr(torch, part.dtype)
            archive.buffer(name, self._parts[name], (*archive.rows, self._pages, *part.shape), dtype)

    def buffers(self) -> Iterator[Buffer]:
        yield from self._parts.values()

    def _turned_back(self, pages: Tensor, first: int) -> Tensor:
        return pages if self._back is None else self._back(pages, first)

    def _encoded(self, pages: Tensor) -> Mapping[str, Tensor]:
        """Return the parts of pages `[B, H_kv, n, page, head_dim]`, checked: a codec may be the user's own."""
        if not torch.isfinite(pages).all():
            raise QuantizationError(f"{self._name}: {NOT_FINITE}")
        parts = self._codec.encode(pages)
        expected = {
            name: (getattr(torch, part.dtype), [*pages.shape[:3], *part.shape])
            for name, part in self._codec.parts.items()
        }
        got = {name: (part.dtype, list(part.shape)) for name, part in parts.items()}
        if got != expected:
            raise PlanError(
                f"{self._name}: codec {type(self._codec).__name__} returned {got}; its parts are {expected}"
            )
        if not all(torch.isfinite(part).all() for part in parts.values() if part.is_floating_point()):
            raise QuantizationError(
                f"{self._name}: values up to {pages.abs().max().item():.3g} do not fit {self._codec.scale_dtype} "
                "scales; set `scale_dtype: bfloat16` in the plan's cache section"
            )
        return parts
