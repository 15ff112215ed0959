"""Packed pages as the native library takes them, described once for as long as they stay the same.

A decoding step reads the pages that the step before it read. What is said of them in C, and whether the library takes
them at all, therefore belongs to the pages and not to the call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from torch import Tensor

from ..layout import FULL_PRECISION_BITS
from ..runtime.native.structs import DTYPES, WIDEST_VECTOR, CRun, CSegments
from ..segments import Channels, Coded, Packed, Plain, SortedTokens, TokenPages
from . import coded


@dataclass(frozen=True, eq=False)
class NativePages:
    """Pages of keys or values in C.

    Attributes:
        fits: whether the native library takes them.
        count: number of pages.
        page: tokens of a page.
        segments: the struct with everything that is about pages; what it points to lives as long as the pages.
    """

    fits: bool
    count: int
    page: int
    segments: CSegments


NO_PAGES: Final = NativePages(True, 0, 0, CSegments())
_known: WeakKeyDictionary[TokenPages, NativePages] = WeakKeyDictionary()


def native_pages(packed: TokenPages | SortedTokens | None) -> NativePages:
    """Return pages in C; none of sorted tokens, which are split into parts before."""
    if packed is None or isinstance(packed, SortedTokens):
        return NO_PAGES
    known = _known.get(packed)
    if known is None:
        known = _known[packed] = _describe(packed)
    return known


def is_plain(x: Tensor) -> bool:
    """Return whether elements are in a row, and of a dtype that the native library knows."""
    return x.dtype in DTYPES and x.stride(-1) == 1


def _describe(packed: TokenPages) -> NativePages:
    if packed.pages == 0:
        return NO_PAGES
    call = CSegments(pages=packed.pages, page=packed.page)
    if isinstance(packed, Coded):
        fits = coded.fits(packed)
        if fits:
            call.coded = ctypes.pointer(coded.pages_of(packed))
        return NativePages(fits, packed.pages, packed.page, call)
    if not isinstance(packed, Packed | Channels):
        return NativePages(False, packed.pages, packed.page, call)
    fits = all(map(_is_run, packed.runs))
    if fits:
        call.runs, call.run_count = (CRun * len(packed.runs))(*map(_run, packed.runs)), len(packed.runs)
    if isinstance(packed, Channels):
        call.order, call.order_strides = packed.order.data_ptr(), packed.order.stride()[:3]
        call.pages_per_order = packed.pages_per_order
    return NativePages(fits, packed.pages, packed.page, call)


def _is_run(run: Packed | Plain) -> bool:
    if isinstance(run, Packed):
        return run.layout.group % WIDEST_VECTOR == 0
    return is_plain(run.states) and run.states.stride(3) == run.page


def _run(run: Packed | Plain) -> CRun:
    if isinstance(run, Plain):
        return CRun(
            data=run.states.data_ptr(),
            data_strides=run.states.stride()[:3],
            bits=FULL_PRECISION_BITS,
            channels=run.width,
            dtype=DTYPES[run.states.dtype],
        )
    layout = run.layout
    return CRun(
        data=run.words.data_ptr(),
        scales=run.scales.data_ptr(),
        data_strides=run.words.stride()[:3],
        scales_strides=run.scales.stride()[:3],
        bits=layout.bits,
        channels=layout.head_dim,
        group=layout.group,
        dtype=DTYPES[run.scales.dtype],
    )
