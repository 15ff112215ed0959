"""Splits of the tokens put together by the logarithms of their sums of weights, in Triton."""

import triton
import triton.language as tl

from ...numbers import round_to, to_float32
from .softmax import LOG2_E


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
    """One query row a program; `logits` are one a query head, and weigh like a token without a value.

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
