"""Attention of a block of query rows over a split of one sequence's blocks, in Triton.

As in `attend/triton/kernel.py`, a program has query rows of one KV head, so packed bytes are read once for all of them.
Which block is the next of its sequence stands in a table. Every key has scales of its own, which therefore do not fold
into the query: they multiply what the codes of a group of channels amount to, token by token,

    sum_n q_n (code_nm s_m + z_m)  =  s_m sum_n q_n code_nm  +  z_m sum_n q_n

so queries are rounded to bfloat16 once, before all blocks.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...attend.triton.channels import count_of, first_of, is_packed, load_query, run_of
from ...attend.triton.codes import number_of_zero, unit_of
from ...attend.triton.kernel import nothing_yet, store_result
from ...attend.triton.memory import PagePointers, QueryRows
from ...attend.triton.packed import add_page_values, contract, cut, middle_of, size_of
from ...attend.triton.plain import add_channel_products, add_token_values
from ...attend.triton.softmax import CAUSAL, Scoring, score, weigh
from ...attend.triton.steps import step_of
from ...runtime.triton_numbers import round_to, to_float32


class BlockPointers(NamedTuple):
    """Pointers to keys or values of all blocks, each with its strides over blocks and heads.

    In full precision, both point to the numbers themselves.
    """

    words: Any
    words_strides: Any
    scales: Any
    scales_strides: Any


class FoldedQuery(NamedTuple):
    """Query rows for a group of keys' channels: bfloat16 coefficients, `[M]` to add to their products, `[M]` sums."""

    coefficients: Any
    offset: Any
    total: Any


@triton.jit(do_not_specialize=["table_stride", "kv_heads", "queries", "splits", "pages_per_split"])
def blocks_kernel(
    query,
    query_strides,
    keys,
    values,
    table,
    table_stride,
    lengths,
    means,
    logarithms,
    factor,
    cap,
    kv_heads,
    queries,
    splits,
    pages_per_split,
    K: tl.constexpr,
    V: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to a split of a sequence's blocks, with arguments that `launch.py` prepares.

    `K` are groups of channels (`channels.py`) and `V` is a layout, or None for values in full precision.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < RATIO * queries
    at, query_head = row % queries, kv_head * RATIO + row // queries
    tokens = tl.load(lengths + batch).to(tl.int32)
    query += batch * query_strides[0]
    rows = QueryRows(query + query_head * query_strides[1] + at * query_strides[2], is_row)
    last_seen = tokens - queries + at
    scoring = Scoring(cap, query, 0, is_row, last_seen)
    table += batch * table_stride
    key, value = of_head(keys, kv_head), of_head(values, kv_head)
    folded = fold_query(load_query(rows, factor, (), K), K)
    running = nothing_yet(V, VALUE_DIM, BLOCK)
    first = split * pages_per_split
    seen = tl.max(tl.where(is_row, last_seen, -1), 0) + 1
    last = tl.minimum(first + pages_per_split, tl.cdiv(seen, PAGE))
    for page in tl.range(first, last, num_stages=STAGES):
        block = tl.load(table + page).to(tl.int64)
        scores = ()
        for chunk in tl.static_range(PAGE // CHUNK):
            token = page * PAGE + chunk * CHUNK + tl.arange(0, CHUNK)
            products = key_products(folded, key, block, chunk, K, CHUNK, PAGE, BLOCK)
            scores = scores + (score(products, token, tokens, scoring, CAUSAL, SOFTCAP, True),)
        running, decay, weights = weigh(running, scores)
        if V is not None:
            codes = PagePointers(value.words, value.words_strides[0], block, block)
            scales = PagePointers(value.scales, value.scales_strides[0], block, block)
            running = add_page_values(running, decay, weights, scales, codes, V)
        else:
            parts, firsts = (), ()
            for i in tl.static_range(len(weights)):
                parts = parts + cut(weights[i], TILE)
            for i in tl.static_range(len(parts)):
                firsts = firsts + (i * TILE,)
            of_block = value.words + block * value.words_strides[0], VALUE_DIM
            everything = tl.arange(0, TILE) >= 0
            running = add_token_values(running, decay, parts, of_block, firsts, everything, VALUE_DIM, VALUE_DIM, True)
    place = (head.to(tl.int64) * splits + split) * RATIO * queries + row
    store_result(running, means, logarithms, place, is_row, V, VALUE_DIM)


@triton.jit
def of_head(side, head):
    """Return the pointers of one KV head."""
    words = side.words + head * side.words_strides[1]
    scales = side.scales + head * side.scales_strides[1]
    return BlockPointers(words, side.words_strides, scales, side.scales_strides)


@triton.jit
def fold_query(queries, K: tl.constexpr):
    """Return query rows `[channels, M]` of every group of channels as coefficients of its codes."""
    folded = ()
    for i in tl.static_range(count_of(K)):
        if is_packed(run_of(i, K)):
            folded = folded + (fold_group(queries[i], run_of(i, K)),)
        else:
            folded = folded + (FoldedQuery(queries[i], 0.0, 0.0),)
    return folded


@triton.jit
def fold_group(x, LAYOUT: tl.constexpr):
    """Fold what codes are as numbers (`codes.py`) into a group's query rows, in the order of steps."""
    MIDDLE: tl.constexpr = middle_of(LAYOUT)
    ZERO: tl.constexpr = number_of_zero(LAYOUT)
    at = tl.arange(0, x.shape[0])
    rounded = round_to(x * unit_of(at, LAYOUT, -1)[:, None], tl.bfloat16)
    middle = ZERO + MIDDLE * unit_of(at, LAYOUT, 1)
    offset = tl.sum(x * MIDDLE - to_float32(rounded) * middle[:, None], 0)
    return FoldedQuery(rounded, offset, tl.sum(x, 0))


@triton.jit
def key_products(
    folded, key, block, chunk, K: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiply query rows by the keys of a chunk of a block's tokens, `[CHUNK, M]`."""
    products = tl.zeros([CHUNK, BLOCK], tl.float32)
    words = key.words + block * key.words_strides[0]
    scales = key.scales + block * key.scales_strides[0] + chunk * CHUNK + tl.arange(0, CHUNK)
    for i in tl.static_range(count_of(K)):
        coefficients, offset, total = folded[i]  # a tuple's elements have no names in Triton 3.6
        if is_packed(run_of(i, K)):
            sums = code_sums(coefficients, offset, words, chunk, first_of(i, K), run_of(i, K), CHUNK, PAGE)
            scale = to_float32(tl.load(scales + 2 * i * PAGE))
            zero = to_float32(tl.load(scales + (2 * i + 1) * PAGE))
            products += sums * scale[:, None] + total[None, :] * zero[:, None]
        else:
            products = add_channel_products(products, coefficients, words, chunk * CHUNK, run_of(i, K), PAGE)
    return products


@triton.jit
def code_sums(
    coefficients,
    offset,
    words,
    chunk,
    FIRST: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Multiply query rows by the codes of a group of channels from `FIRST` on, of a chunk of a block's tokens."""
    pages = PagePointers(words + FIRST * size_of(LAYOUT, "bits") // 16 * PAGE, 0, 0, 0)
    parts = cut(coefficients, step_of(LAYOUT))
    nothing = tl.zeros([CHUNK, offset.shape[0]], tl.float32)
    return contract(parts, pages, chunk, nothing, LAYOUT, step_of(LAYOUT)) + offset[None, :]
