"""Queries times pages of keys whose channels may be sorted and cut into runs, in Triton.

A run is a layout, or the number of its channels where those are in full precision. Each run is multiplied by the same
channels of the query, so products are sums over the runs.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from ...layout import PageLayout
from .memory import load_rows, of_pages
from .packed import add_page_products, row_of
from .plain import add_channel_products, padded_channels
from .steps import places_of


@dataclass(frozen=True)
class RunLayouts:
    """All runs as one constant of a kernel, because not every Triton keeps a tuple of them constant."""

    each: tuple[PageLayout | int, ...]


@triton.constexpr_function
def is_packed(run):
    """Return whether a run is stored as codes."""
    return not isinstance(run, int)


@triton.constexpr_function
def count_of(runs):
    """Return the number of runs."""
    return len(runs.each)


@triton.constexpr_function
def run_of(index, runs):
    """Return the run with this index."""
    return runs.each[index]


@triton.constexpr_function
def first_of(index, runs):
    """Return the place of a run's first channel."""
    return sum(run if isinstance(run, int) else run.rows for run in runs.each[:index])


@triton.constexpr_function
def chunk_of(runs, otherwise):
    """Return how many tokens are multiplied together: a group, if there are groups."""
    return next((run.group for run in runs.each if not isinstance(run, int)), otherwise)


@triton.jit
def load_query(rows, factor, order, RUNS: tl.constexpr):
    """Load query rows times a factor, `[channels, M]` of every run; `order` is a tuple of one pointer, or empty."""
    queries = ()
    for i in tl.static_range(count_of(RUNS)):
        queries = queries + (_load_run(rows, factor, order, first_of(i, RUNS), run_of(i, RUNS)),)
    return queries


@triton.jit
def run_products(queries, runs, page, chunk, RUNS: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr):
    """Multiply query rows, as `load_query` returns them, by the keys of a chunk of a page's tokens: `[CHUNK, M]`."""
    products = tl.zeros([CHUNK, queries[0].shape[1]], tl.float32)
    for i in tl.static_range(count_of(RUNS)):
        words, scales = of_pages(runs[i], page, page)
        if is_packed(run_of(i, RUNS)):
            products = add_page_products(products, queries[i], scales, words, chunk, run_of(i, RUNS))
        else:
            keys = words.pointer + words.page * words.stride
            products = add_channel_products(products, queries[i], keys, chunk * CHUNK, run_of(i, RUNS), PAGE)
    return products


@triton.jit
def _load_run(rows, factor, order, FIRST: tl.constexpr, RUN: tl.constexpr):
    if is_packed(RUN):
        place, is_place = row_of(tl.arange(0, places_of(RUN)), RUN)
    else:
        place = tl.arange(0, padded_channels(RUN))
        is_place = place < RUN
    if len(order) == 0:
        return load_rows(rows, factor, FIRST + place, is_place)
    else:
        channel = tl.load(order[0] + FIRST + place, mask=is_place, other=0).to(tl.int32)
        return load_rows(rows, factor, channel, is_place)
