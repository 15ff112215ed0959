"""Online softmax of a program's query rows, in Triton: from products to weights, and the sums between tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

CAUSAL, BOOLEAN, ADDITIVE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Kinds of mask; 0 is none. A boolean mask is one of bytes."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)
LOWEST_LOGARITHM = tl.constexpr(-16384.0)


class Softmax(NamedTuple):
    """State after some tokens: largest score, sum of weights `[M]`, and sums of values `[columns, M]`, one a group."""

    peak: Any
    total: Any
    sums: Any


class Scoring(NamedTuple):
    """Soft-cap and mask of the scores; the mask of each query row `[M]` is a pointer or a last token."""

    cap: Any
    mask: Any
    mask_token: Any
    is_row: Any
    last_seen: Any


@triton.jit
def score(products, token, limit, scoring, MASK: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
    """Return scores `[N, M]` of tokens `[N]`, with -inf where a row must not attend.

    Tokens from `limit` on are not attended to; with `WHOLE` there are none.
    """
    if SOFTCAP:
        products = scoring.cap * (1.0 - 2.0 / (1.0 + tl.exp2(products)))  # tanh
    if not WHOLE:
        products = tl.where((token < limit)[:, None], products, float("-inf"))
    if MASK == CAUSAL:
        return tl.where(token[:, None] <= scoring.last_seen[None, :], products, float("-inf"))
    if MASK == 0:
        return products
    at = scoring.mask[None, :] + token[:, None].to(tl.int64) * scoring.mask_token
    mask = tl.load(at, mask=(token < limit)[:, None] & scoring.is_row[None, :], other=0)
    if MASK == BOOLEAN:
        return tl.where(mask != 0, products, float("-inf"))
    mask = mask.to(tl.float32)
    # What is finite stays so: a row that the lowest number masks is an even mean.
    return products + tl.where(mask == float("-inf"), mask, tl.maximum(mask * LOG2_E, LOWEST))


@triton.jit
def logarithm_of_total(running):
    """Return the logarithms to base 2 of the sums of weights, `[M]`, and -inf where a row attends to nothing.

    Where the lowest number masks all tokens, float32 would lose the sum beside the peak: `LOWEST_LOGARITHM` is the peak
    then, so that splits of different lengths still merge to an even mean.
    """
    return tl.where(running.peak < LOWEST / 2, LOWEST_LOGARITHM, running.peak) + tl.log2(running.total)


@triton.jit
def weigh(running, scores):
    """Take in scores of more tokens, a tuple of `[N, M]`: return softmax, decay of the old sums, and weights."""
    best, total = scores[0], tl.zeros_like(scores[0])
    for i in tl.static_range(1, len(scores)):
        best = tl.maximum(best, scores[i])
    peak = tl.maximum(running.peak, tl.max(best, 0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weights = ()
    for i in tl.static_range(len(scores)):
        weight = tl.exp2(scores[i] - shift[None, :])
        total += weight
        weights = weights + (weight,)
    decay = tl.exp2(running.peak - shift)
    return Softmax(peak, running.total * decay + tl.sum(total, 0), running.sums), decay, weights
