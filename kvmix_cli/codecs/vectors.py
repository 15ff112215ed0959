"""Vector codes: a few channels of a token coded together, by a codebook.

One codebook is universal, of the normal distribution, as of NSNQuant (arXiv 2505.18231) and HIGGS, and of no model:
keys and values must be rotated, which makes their channels nearly normal. Or every group of channels has one of its own
that was learned from calibration text, as of CQ (arXiv 2405.03917).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Final

import torch
from torch import Tensor

from . import clustering
from .base import PageCodec, StoredPart
from .levels import gaussian_levels
from .packed import pack, unpack

SPANS: Final = {1: 8, 2: 4, 3: 2, 4: 2, 8: 1}
"""Channels that are coded together, by width: a code has 8 bits, at 3 bits 6."""
LEARNED_BITS: Final = (1, 2, 3, 4)
"""Widths of learned codebooks."""
SAMPLES, LLOYD_STEPS = 2**14, 16
"""Of the clustering that makes a codebook, from a fixed seed."""
AT_ONCE: Final = 2**12
"""Vectors whose distances to all of a codebook are held together."""


class Vectors(PageCodec):
    """Codes of neighbouring channels, 4 x 8 bits at a width of 2, times one scale a token. `b + 16 / D` stored bits.

    The scale is fitted by least squares to the codes of the token divided by its root mean square.
    """

    def check(self) -> None:
        super().check()
        if self.head_dim % self.span:
            raise ValueError(f"vectors of {self.span} channels do not divide heads of {self.head_dim}")

    @property
    def span(self) -> int:
        """Return the channels that are coded together."""
        return SPANS[self.bits]

    @cached_property
    def by_channel(self) -> Tensor:
        """Return the codebooks with their entries along the last axis, `[1 or H_kv, 1 or D / span, span, entries]`."""
        book = self.constant
        by_entry = book if book.ndim > 2 else book[None, None]
        return by_entry.mT.contiguous()

    @property
    def parts(self) -> Mapping[str, StoredPart]:
        return {"codes": StoredPart((self.code_bytes,)), "scales": StoredPart((self.page,), self.scale_dtype)}

    @property
    def constant(self) -> Tensor:
        return gaussian_codebook(self.span, self.bits * self.span)

    def encode(self, pages: Tensor) -> Mapping[str, Tensor]:
        book = self.constant.to(pages.device)
        start = pages.square().mean(-1, keepdim=True).sqrt()
        unit = pages / torch.where(start == 0, 1.0, start)
        codes = nearest(unit.reshape(-1, self.span), book)
        chosen = book[codes].view_as(pages)
        scale = (pages * chosen).sum(-1) / chosen.square().sum(-1)
        codes = codes.view(*pages.shape[:-2], -1)
        return {"codes": pack(codes, self.bits * self.span), "scales": scale.to(getattr(torch, self.scale_dtype))}

    @classmethod
    def learned(cls) -> type[LearnedVectors]:
        return LearnedVectors

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(parts["codes"], self.bits * self.span, self.page * self.head_dim // self.span)
        pages: Tensor = (
            self.constant.to(codes.device)[codes.long()].flatten(-2).unflatten(-1, (self.page, self.head_dim))
        )
        return pages * parts["scales"].float()[..., None]


@dataclass(frozen=True)
class LearnedVectors(Vectors):
    """Codes of neighbouring channels by a codebook for each KV head and group of channels: `b` stored bits, no scales.

    Attributes:
        books: `[H_kv, D / span, 2^(bits * span), span]` float32; None where only bytes are counted.
    """

    books: Tensor | None = None

    def check(self) -> None:
        super().check()
        if self.bits not in LEARNED_BITS:
            raise ValueError(f"learned codebooks have widths of {', '.join(map(str, LEARNED_BITS))}, not {self.bits}")

    @property
    def parts(self) -> Mapping[str, StoredPart]:
        return {"codes": StoredPart((self.code_bytes,))}

    @property
    def constant(self) -> Tensor:
        if self.books is None:
            raise AssertionError("a cache is given the codebooks of its plan")
        return self.books

    def encode(self, pages: Tensor) -> Mapping[str, Tensor]:
        """Return the codes of pages `[B, H_kv, ..., page, head_dim]`."""
        books = self.constant
        clouds = pages.movedim(1, 0).reshape(len(books), -1, *books.shape[1::2]).transpose(1, 2).flatten(0, 1)
        codes = clustering.nearest(clouds, books.flatten(0, 1)).unflatten(0, books.shape[:2]).transpose(1, 2)
        shape = (len(books), pages.shape[0], *pages.shape[2:-2], -1)
        return {"codes": pack(codes.reshape(shape).movedim(0, 1), self.bits * self.span)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return pages `[B, H_kv, ..., page, head_dim]`."""
        books, packed = self.constant, parts["codes"]
        heads, groups, entries, _ = books.shape
        codes = unpack(packed, self.bits * self.span, self.page * groups).unflatten(-1, (self.page, groups))
        first = torch.arange(0, heads * groups * entries, entries, device=packed.device).view(heads, groups)
        places = codes + first.view(heads, *(1 for _ in codes.shape[2:-1]), groups)
        return books.flatten(0, 2)[places].flatten(-2)


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """Return the nearest entries `[n]` of a codebook `[entries, span]` for vectors `[n, span]`."""
    halves = book.square().sum(-1) / 2
    return torch.cat([(halves - some @ book.T).argmin(-1) for some in vectors.split(AT_ONCE)])


@cache
def gaussian_codebook(span: int, width: int) -> Tensor:
    """Return `2^width` vectors `[2^width, span]`, float32, of small squared error for independent normal numbers.

    Lloyd's algorithm over a fixed sample; of single numbers, in closed form. Sums in another order may give another
    codebook on another machine, so saved caches check it.
    """
    if span == 1:
        return gaussian_levels(width)[:, None]
    sample = torch.randn(SAMPLES, span, generator=torch.Generator().manual_seed(0))
    book = sample[: 1 << width].clone()
    for _ in range(LLOYD_STEPS):
        codes = nearest(sample, book)
        counts = codes.bincount(minlength=len(book))[:, None]
        sums = torch.zeros_like(book).index_add_(0, codes, sample)
        book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
    return book
