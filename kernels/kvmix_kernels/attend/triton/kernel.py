"""Attention of a block of query rows over a split of one KV head's tokens, in Triton.

A program has query rows of one KV head (its query heads times its queries), so packed bytes are read once for all of
them, and a run of packed pages, or of tiles of sink and tail. It writes its weighted mean of values and the logarithm
of its sum of weights; `merge_kernel` puts the splits together. Scores are logarithms to base 2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...runtime.triton_numbers import round_to, to_float32
from .channels import chunk_of, load_query, run_products
from .memory import QueryRows, in_sink_or_tail, in_tail, load_rows, of_head, of_pages
from .packed import add_page_values, cut, size_of
from .plain import add_token_values, padded_channels, token_products
from .softmax import LOG2_E, Scoring, Softmax, logarithm_of_total, score, weigh


class ProgramInputs(NamedTuple):
    """Everything that a program reads, except for its share of the tokens."""

    key: Any
    value: Any
    rows: Any
    scoring: Any
    factor: Any
    tokens: Any
    sinks: Any
    pages: Any
    pages_per_order: Any
    key_tail: Any
    value_tail: Any


LENGTHS = ["tokens", "sinks", "key_pages", "value_pages", "pages_per_order", "key_tail", "value_tail"]
SPLITS = ["first_split", "splits", "packed_splits", "pages_per_split", "tiles_per_split"]
LEAST_TOGETHER = tl.constexpr(64)
"""Tokens of which pages are read together, if they have fewer: so many fill the steps of packed values (`steps.py`)."""
MASK_STRIDES = ["mask_batch", "mask_head", "mask_query", "mask_token"]


@triton.jit(do_not_specialize=["kv_heads", "queries", *LENGTHS, *SPLITS, *MASK_STRIDES])
def attend_kernel(
    query,
    query_strides,
    key,
    value,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_token,
    means,
    logarithms,
    factor,
    cap,
    kv_heads,
    queries,
    tokens,
    sinks,
    key_pages,
    value_pages,
    pages_per_order,
    key_tail,
    value_tail,
    first_split,
    splits,
    packed_splits,
    pages_per_split,
    tiles_per_split,
    K: tl.constexpr,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to a split of the tokens, with arguments that `launch.py` prepares.

    `K` are runs (`channels.py`) and `V` is a layout, or None where nothing is packed. Of all `splits`, this
    launch has those from `first_split` on: first the pages, then the tiles.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < RATIO * queries
    at, query_head = row % queries, kv_head * RATIO + row // queries
    query += batch * query_strides[0]
    mask += batch * mask_batch
    rows = QueryRows(query + query_head * query_strides[1] + at * query_strides[2], is_row)
    mask_rows = mask + query_head * mask_head + at.to(tl.int64) * mask_query
    scoring = Scoring(cap, mask_rows, mask_token, is_row, tokens - queries + at)
    pages = tl.maximum(key_pages, value_pages)
    key, value = of_head(key, batch, kv_head), of_head(value, batch, kv_head)
    task = ProgramInputs(key, value, rows, scoring, factor, tokens, sinks, pages, pages_per_order, key_tail, value_tail)

    running = nothing_yet(V, VALUE_DIM, BLOCK)

    if split < packed_splits:
        first = split * pages_per_split
        last = tl.minimum(first + pages_per_split, pages)
        if K is not None and V is not None:
            both = tl.minimum(last, tl.minimum(key_pages, value_pages))
            running = over_pages(
                running, task, first, both, K, V, True, True, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK, SOFTCAP, STAGES
            )
        if K is not None:
            begin, end = tl.maximum(first, value_pages), tl.minimum(last, key_pages)
            running = over_pages(
                running, task, begin, end, K, V, True, False, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK, SOFTCAP, 1
            )
        if V is not None:
            begin, end = tl.maximum(first, key_pages), tl.minimum(last, value_pages)
            running = over_pages(
                running, task, begin, end, K, V, False, True, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK, SOFTCAP, 1
            )
    else:
        first = (split - packed_splits) * tiles_per_split
        running = over_tiles(
            running, task, first, first + tiles_per_split, V, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK, SOFTCAP, STAGES
        )

    at = (head.to(tl.int64) * splits + first_split + split) * RATIO * queries + row
    store_result(running, means, logarithms, at, is_row, V, VALUE_DIM)


@triton.jit
def nothing_yet(V: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the state before any token; sums of values are in the groups of layout `V`, or whole if that is None."""
    WIDTH: tl.constexpr = triton.next_power_of_2(VALUE_DIM if V is None else size_of(V, "group"))
    sums = ()
    for _ in tl.static_range(1 if V is None else size_of(V, "groups")):
        sums = sums + (tl.zeros([WIDTH, BLOCK], tl.float32),)
    return Softmax(tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32), sums)


@triton.jit
def store_result(running, means, logarithms, at, is_row, V: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Store weighted means of values and logarithms of sums of weights at places `[M]` of partial results."""
    tl.store(logarithms + at, logarithm_of_total(running), mask=is_row)
    divisor = tl.where(running.total == 0, 1.0, running.total)
    GROUP: tl.constexpr = VALUE_DIM if V is None else size_of(V, "group")
    within = tl.arange(0, triton.next_power_of_2(GROUP))
    for group in tl.static_range(len(running.sums)):
        channel = group * GROUP + within
        inside = ((within < GROUP) & (channel < VALUE_DIM))[:, None] & is_row[None, :]
        mean = running.sums[group] / divisor[None, :]
        tl.store(means + at[None, :] * VALUE_DIM + channel[:, None], mean, mask=inside)


@triton.jit
def over_pages(
    running,
    task,
    first,
    last,
    K: tl.constexpr,
    V: tl.constexpr,
    K_PACKED: tl.constexpr,
    V_PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to pages `[first, last)`, of which keys or values or both are packed."""
    if K_PACKED and len(task.key.order) > 0:
        for number in tl.range(first // task.pages_per_order, tl.cdiv(last, task.pages_per_order)):
            order = task.key.order[0] + number * task.key.order_strides[2]
            query = load_query(task.rows, task.factor, (order,), K)
            begin = tl.maximum(first, number * task.pages_per_order)
            end = tl.minimum(last, (number + 1) * task.pages_per_order)
            running = over_pages_of_order(
                running, task, query, begin, end, K, V, K_PACKED, V_PACKED, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK,
                SOFTCAP, STAGES,
            )  # fmt: skip
        return running
    else:
        if K_PACKED:
            query = load_query(task.rows, task.factor, (), K)
        else:
            query = (load_whole_query(task, HEAD_DIM),)
        return over_pages_of_order(
            running, task, query, first, last, K, V, K_PACKED, V_PACKED, HEAD_DIM, VALUE_DIM, PAGE, TILE, MASK, SOFTCAP,
            STAGES,
        )  # fmt: skip


@triton.jit
def over_pages_of_order(
    running,
    task,
    query,
    first,
    last,
    K: tl.constexpr,
    V: tl.constexpr,
    K_PACKED: tl.constexpr,
    V_PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to pages `[first, last)` whose channels are in the order of `query`, as `load_query` returns it."""
    CHUNK: tl.constexpr = chunk_of(K, min(TILE, PAGE)) if K_PACKED else min(TILE, PAGE)
    GROUP: tl.constexpr = VALUE_DIM if V is None else size_of(V, "group")
    TOGETHER: tl.constexpr = max(1, LEAST_TOGETHER // PAGE)
    limit = task.sinks + last * PAGE
    for page in tl.range(first, last, TOGETHER, num_stages=STAGES):
        scores = ()
        for chunk in tl.static_range(TOGETHER * PAGE // CHUNK):
            token = task.sinks + page * PAGE + chunk * CHUNK + tl.arange(0, CHUNK)
            here, within = nth_of(page, last, chunk * CHUNK // PAGE), chunk % (PAGE // CHUNK)
            if K_PACKED:
                products = run_products(query, task.key.runs, here, within, K, CHUNK, PAGE)
            else:
                keys = in_tail(task.key, task.sinks + here * PAGE + within * CHUNK - task.key_tail)
                products = token_products(query[0], keys, token >= 0, HEAD_DIM, True)
            scores = scores + (score(products, token, limit, task.scoring, MASK, SOFTCAP, TOGETHER == 1),)
        running, decay, weights = weigh(running, scores)
        if V_PACKED:
            words, scales = of_pages(task.value.runs[0], page, last - 1)
            running = add_page_values(running, decay, weights, scales, words, V)
        else:
            WIDTH: tl.constexpr = min(CHUNK, TILE)
            parts, firsts = (), ()
            for i in tl.static_range(len(weights)):
                parts = parts + cut(weights[i], WIDTH)
            for i in tl.static_range(len(parts)):
                firsts = firsts + ((nth_of(page, last, i * WIDTH // PAGE) - page) * PAGE + i * WIDTH % PAGE,)
            values = in_tail(task.value, task.sinks + page * PAGE - task.value_tail)
            all_tokens = tl.arange(0, WIDTH) >= 0
            running = add_token_values(running, decay, parts, values, firsts, all_tokens, GROUP, VALUE_DIM, True)
    return running


@triton.jit
def nth_of(page, last, N: tl.constexpr):
    """Return the n-th page from `page` on; the one before `last`, if there are not as many."""
    if N == 0:
        return page
    else:
        return tl.minimum(page + N, last - 1)


@triton.jit
def over_tiles(
    running,
    task,
    first,
    last,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to tiles `[first, last)` of the tokens in full precision: those of the sink, then those of the tails."""
    GROUP: tl.constexpr = VALUE_DIM if V is None else size_of(V, "group")
    query = load_whole_query(task, HEAD_DIM)
    sink_tiles = tl.cdiv(task.sinks, TILE)
    unpacked = task.sinks + task.pages * PAGE
    last = tl.minimum(last, sink_tiles + tl.cdiv(task.tokens - unpacked, TILE))
    for tile in tl.range(first, last, num_stages=STAGES):
        is_sink = tile < sink_tiles
        start = tl.where(is_sink, tile * TILE, unpacked + (tile - sink_tiles) * TILE)
        limit = tl.where(is_sink, task.sinks, task.tokens)
        token = start + tl.arange(0, TILE)
        keys = in_sink_or_tail(task.key, is_sink, start, task.key_tail)
        products = token_products(query, keys, token < limit, HEAD_DIM, False)
        scores = (score(products, token, limit, task.scoring, MASK, SOFTCAP, False),)
        running, decay, weights = weigh(running, scores)
        values = in_sink_or_tail(task.value, is_sink, start, task.value_tail)
        running = add_token_values(running, decay, weights, values, (0,), token < limit, GROUP, VALUE_DIM, False)
    return running


@triton.jit
def load_whole_query(task, HEAD_DIM: tl.constexpr):
    """Load the query rows for keys in full precision, `[channels, M]`."""
    channel = tl.arange(0, padded_channels(HEAD_DIM))
    return load_rows(task.rows, task.factor, channel, channel < HEAD_DIM)


@triton.jit(do_not_specialize=["splits", "kv_heads", "queries"])
def merge_kernel(
    output,
    output_strides,
    totals,
    means,
    logarithms,
    logits,
    splits,
    kv_heads,
    queries,
    VALUE_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge all splits of one query row; `logits`, one a query head, weigh like a token without a value.

    `totals` `[B, H, S]` are the logarithms of the sums of weights, natural ones; those before are to base 2.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    query_head = head % kv_heads * RATIO + row // queries
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    inside = channel < VALUE_DIM
    peak, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    if HAS_LOGITS:
        peak = tl.full([1], 0.0, tl.float32) + to_float32(tl.load(logits + query_head)) * LOG2_E
        total = tl.full([1], 1.0, tl.float32)
    sums = tl.zeros([channel.shape[0]], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        at = (head.to(tl.int64) * splits + split) * (RATIO * queries) + row
        logarithm = tl.load(logarithms + at, mask=split < splits, other=float("-inf"))
        mean = tl.load(
            means + at[:, None] * VALUE_DIM + channel[None, :],
            mask=(split < splits)[:, None] & inside[None, :],
            other=0.0,
        )
        best = tl.maximum(peak, tl.max(logarithm, 0))
        shift = tl.where(best == float("-inf"), 0.0, best)
        weight, decay = tl.exp2(logarithm - shift), tl.exp2(peak - shift)
        sums = sums * decay + tl.sum(weight[:, None] * mean, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = best
    result = sums / tl.where(total == 0, 1.0, total)
    tl.store(totals + head.to(tl.int64) * (RATIO * queries) + row + tl.arange(0, 1), (peak + tl.log2(total)) / LOG2_E)
    output += (head // kv_heads).to(tl.int64) * output_strides[0] + query_head * output_strides[1]
    at = output + row % queries * output_strides[2] + channel
    tl.store(at, round_to(result, output.dtype.element_ty), mask=inside)
