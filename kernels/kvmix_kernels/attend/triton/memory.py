"""Pointers of a Triton program: sink | pages | tail of one KV head, and query rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...runtime.triton_numbers import to_float32


class RunPointers(NamedTuple):
    """Pointers to pages of a run of channels, each with its strides over batch rows, heads and pages.

    For channels in full precision, both point to the numbers themselves.
    """

    words: Any
    words_strides: Any
    scales: Any
    scales_strides: Any


class SegmentPointers(NamedTuple):
    """Pointers to keys or values, each with its strides over batch rows, heads, and tokens or orders.

    Without a sink of their own, `sink` is the tail, which then begins with the first token. Runs of pages are a tuple,
    and so is `order`: it is empty where channels are not sorted.
    """

    sink: Any
    sink_strides: Any
    runs: Any
    order: Any
    order_strides: Any
    tail: Any
    tail_strides: Any


class PagePointers(NamedTuple):
    """Pages from `page` to `last`, with a pointer to the first of all and the stride from one to the next."""

    pointer: Any
    stride: Any
    page: Any
    last: Any


class QueryRows(NamedTuple):
    """A program's query rows `[M]`: pointers, and whether each row exists."""

    pointers: Any
    is_row: Any


@triton.jit
def load_rows(rows, factor, channel, is_channel):
    """Load query rows times a factor, `[channels, M]` in float32; 0 where there is no channel."""
    inside = is_channel[:, None] & rows.is_row[None, :]
    return to_float32(tl.load(rows.pointers[None, :] + channel[:, None], mask=inside, other=0.0)) * factor


@triton.jit
def of_head(side, batch, head):
    """Return the pointers of one KV head of one batch row."""
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    runs = ()
    for i in tl.static_range(len(side.runs)):
        words, words_strides, scales, scales_strides = side.runs[i]
        words += batch * words_strides[0] + head * words_strides[1]
        scales += batch * scales_strides[0] + head * scales_strides[1]
        runs = runs + (RunPointers(words, words_strides, scales, scales_strides),)
    order = ()
    for i in tl.static_range(len(side.order)):
        order = order + (side.order[i] + batch * side.order_strides[0] + head * side.order_strides[1],)
    return SegmentPointers(
        side.sink + batch * side.sink_strides[0] + head * side.sink_strides[1],
        side.sink_strides,
        runs,
        order,
        side.order_strides,
        side.tail + batch * side.tail_strides[0] + head * side.tail_strides[1],
        side.tail_strides,
    )


@triton.jit
def of_pages(run, page, last):
    """Return words and scales of the pages from `page` to `last`."""
    words, words_strides, scales, scales_strides = run  # a tuple's elements have no names in Triton 3.6
    page, last = tl.cast(page, tl.int64), tl.cast(last, tl.int64)
    return PagePointers(words, words_strides[2], page, last), PagePointers(scales, scales_strides[2], page, last)


@triton.jit
def beyond(pages, COUNT: tl.constexpr):
    """Return the pages after `COUNT` of them; the last page, if there are none."""
    if COUNT == 0:
        return pages
    else:
        return PagePointers(pages.pointer, pages.stride, tl.minimum(pages.page + COUNT, pages.last), pages.last)


@triton.jit
def in_tail(side, first):
    """Return a pointer to a run of the tail's tokens, and their stride."""
    return side.tail + tl.cast(first, tl.int64) * side.tail_strides[2], side.tail_strides[2]


@triton.jit
def in_sink_or_tail(side, is_sink, first, tail):
    """Return a pointer to a run of tokens, and their stride; `first` counts from the sink, `tail` begins the tail."""
    base = tl.where(is_sink, side.sink, side.tail)
    stride = tl.where(is_sink, side.sink_strides[2], side.tail_strides[2])
    return base + (first - tl.where(is_sink, 0, tail)).to(tl.int64) * stride, stride
