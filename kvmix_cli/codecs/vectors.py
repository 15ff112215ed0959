"""Vector codes: a few channels of a token coded together, by a codebook of the normal distribution.

The codebook is universal, as of NSNQuant (arXiv 2505.18231) and HIGGS, and of no model: keys and values must be
rotated, which makes their channels nearly normal. VecInfer (arXiv 2510.06175) and CQ (arXiv 2405.03917) learn theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import torch
from torch import Tensor

from .base import PageCodec, StoredPart
from .levels import gaussian_levels
from .packed import pack, unpack

SPANS: Final = {1: 8, 2: 4, 3: 2, 4: 2, 8: 1}
"""Channels that are coded together, by width: a code has 8 bits, at 3 bits 6."""
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

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(parts["codes"], self.bits * self.span, self.page * self.head_dim // self.span)
        pages: Tensor = (
            self.constant.to(codes.device)[codes.long()].flatten(-2).unflatten(-1, (self.page, self.head_dim))
        )
        return pages * parts["scales"].float()[..., None]


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
