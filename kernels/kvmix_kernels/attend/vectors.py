"""Pages of vector codes as the native library takes them."""

from __future__ import annotations

from typing import Final

import torch

from ..runtime.native.structs import DTYPES, CVectors
from ..vector_pages import VectorPages

CODES: Final = {(8, 8), (8, 4), (8, 2), (8, 1), (6, 2)}
"""Bits of a code and channels that it stands for, of the codes that the library knows."""
SCALE_DTYPES: Final = (torch.float16, torch.bfloat16)
MOST_ROWS: Final = 64
"""Query rows of a KV head that look single channels up; decoding them once and multiplying is faster for more."""


def fits(pages: VectorPages) -> bool:
    """Return whether the native path takes these pages: of codes that it knows, not turned, elements in a row."""
    scales = pages.scales
    if pages.turn is not None or (pages.code_bits, pages.span) not in CODES:
        return False
    if scales is not None and (scales.dtype not in SCALE_DTYPES or scales.stride(-1) != 1):
        return False
    return pages.codes.stride(-1) == 1 and pages.books.is_contiguous()


def pays(pages: VectorPages, rows: int) -> bool:
    """Return whether tables are faster than decoding, for so many query rows of a KV head: always, but for 8 bits."""
    return pages.span > 1 or rows <= MOST_ROWS


def pages_of(pages: VectorPages) -> CVectors:
    """Return the struct of these pages; what it points to lives as long as they do."""
    heads, groups, span, _ = pages.books.shape
    of_head, of_group = pages.books.stride()[:2]
    call = CVectors(
        codes=pages.codes.data_ptr(),
        books=pages.books.data_ptr(),
        codes_strides=pages.codes.stride()[:3],
        books_strides=(of_head if heads > 1 else 0, of_group if groups > 1 else 0),
        width=pages.code_bits,
        span=span,
    )
    if pages.scales is not None:
        call.scales, call.scales_strides = pages.scales.data_ptr(), pages.scales.stride()[:3]
        call.scale_dtype = DTYPES[pages.scales.dtype]
    return call
