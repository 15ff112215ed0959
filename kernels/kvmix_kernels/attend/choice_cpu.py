"""The choice of the pages that a query reads, on a CPU through the native library (`choice.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..runtime.native.structs import DTYPES, SHARINGS, WIDEST_VECTOR, CChoice
from ..summaries import Summarized


def chosen_pages(library: ctypes.CDLL, query: Tensor, scaling: float, pages: Summarized) -> Tensor | None:
    """Return the numbers `[B, H_kv, count]` int32, ascending, of the pages that one query reads.

    None is returned for what the library does not take: sizes that vectors do not divide, unknown dtypes.

    Args:
        library: the native library.
        query: `[B, H, D]`.
        scaling: of the logits.
        pages: of the keys, more than the query reads, all of which it may attend to.
    """
    summary, books = pages.summary, pages.books
    batch, kv_heads, count, rows, width = summary.shape
    *strides, row_stride, step = summary.stride()
    dim, read = query.shape[2], summary if books is None else books
    part = dim if books is None else books.shape[4]
    is_known = query.dtype in DTYPES and read.dtype in DTYPES and part % WIDEST_VECTOR == 0
    if not is_known or step != 1 or row_stride != width or query.stride(2) != 1:
        return None
    numbers = torch.empty(batch, kv_heads, pages.count, dtype=torch.int32)
    call = CChoice(
        query=query.data_ptr(),
        summary=summary.data_ptr(),
        numbers=numbers.data_ptr(),
        query_strides=query.stride()[:2],
        summary_strides=tuple(strides),
        batch=batch,
        heads=query.shape[1],
        kv_heads=kv_heads,
        pages=count,
        count=pages.count,
        rows=rows,
        dim=dim,
        query_dtype=DTYPES[query.dtype],
        dtype=DTYPES[read.dtype],
        sharing=SHARINGS[pages.sharing],
        threads=torch.get_num_threads(),
        scaling=scaling,
    )
    if books is not None:
        books = books.contiguous()
        call.books, call.parts, call.entries = books.data_ptr(), books.shape[2], books.shape[3]
    library.kvmix_choose(ctypes.byref(call))
    return numbers
