"""Packed pages as the native library takes them, described once for as long as they stay the same.

A decoding step reads the pages that the step before it read. What is said of them in C, and whether the library takes
them at all, therefore belongs to the pages and not to the call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from ..layout import FULL_PRECISION_BITS
from ..pages import Channels, Coded, Packed, Plain, TokenPages
from ..runtime.native.structs import DTYPES, WIDEST_VECTOR, CRun, CSegments
from ..sorted_tokens import SortedTokens
from ..summaries import ChosenPages
from ..vector_pages import VectorPages
from . import coded, vectors


@dataclass(frozen=True, eq=False)
class NativePages:
    """Pages of keys or values in C.

    Attributes:
        fits: whether the native library takes them.
        is_sorted: whether their channels are sorted, which the library takes of keys only.
        count: number of pages.
        page: tokens of a page.
        segments: the struct with everything that is about pages; what it points to lives as long as the pages.
    """

    fits: bool
    is_sorted: bool
    count: int
    page: int
    segments: CSegments


NO_PAGES: Final = NativePages(True, False, 0, 0, CSegments())
_known: WeakKeyDictionary[TokenPages | SortedTokens, NativePages] = WeakKeyDictionary()


def native_pages(packed: TokenPages | SortedTokens | None) -> NativePages:
    """Return pages in C; none of sorted tokens, which are split into parts before."""
    if packed is None:
        return NO_PAGES
    known = _known.get(packed)
    if known is None:
        known = _known[packed] = _describe(packed)
    return known


def _describe(packed: TokenPages | SortedTokens) -> NativePages:
    if isinstance(packed, SortedTokens) or packed.pages == 0:
        return NO_PAGES
    if isinstance(packed, ChosenPages):
        return _describe_chosen(packed)
    call = CSegments(pages=packed.pages, page=packed.page)
    if isinstance(packed, Coded):
        fits = coded.fits(packed)
        if fits:
            call.coded = ctypes.pointer(coded.pages_of(packed))
        return NativePages(fits, False, packed.pages, packed.page, call)
    if isinstance(packed, VectorPages):
        fits = vectors.fits(packed)
        if fits:
            call.vectors = ctypes.pointer(vectors.pages_of(packed))
        return NativePages(fits, False, packed.pages, packed.page, call)
    if not isinstance(packed, Packed | Channels):
        return NativePages(False, False, packed.pages, packed.page, call)
    fits = all(map(_is_run, packed.runs))
    if fits:
        call.runs, call.run_count = (CRun * len(packed.runs))(*map(_run, packed.runs)), len(packed.runs)
    if isinstance(packed, Channels):
        call.order, call.order_strides = packed.order.data_ptr(), packed.order.stride()[:3]
        call.pages_per_order = packed.pages_per_order
    return NativePages(fits, isinstance(packed, Channels), packed.pages, packed.page, call)


def _describe_chosen(chosen: ChosenPages) -> NativePages:
    """Return the pages that a query reads: those in memory, with the table of the chosen ones."""
    held = native_pages(chosen.held)
    call = CSegments.from_buffer_copy(held.segments)
    call.table, call.table_strides = chosen.numbers.data_ptr(), chosen.numbers.stride()[:2]
    call.pages, call.is_choice = chosen.pages, True
    return NativePages(held.fits, held.is_sorted, chosen.pages, held.page, call)


def _is_run(run: Packed | Plain) -> bool:
    if isinstance(run, Packed):
        return run.layout.group % WIDEST_VECTOR == 0
    states = run.states
    return states.dtype in DTYPES and states.stride()[3:] == (run.page, 1)


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
