"""The encoders of `grids.py` in Triton: scale and zero of the groups in a program's tile, bit for bit.

A tile `x` is `[16, rows, columns]`, a group along its last axis; what is known of a group is `[16, rows]`. Scales and
zeros are float32 with the values that are stored. Kernels that use these functions are launched with
`enable_fp_fusion=False`: a contracted multiply-add would round elsewhere.
"""

import triton
import triton.language as tl

from ..runtime.triton_numbers import round_to, to_float32
from . import grids

CLIPS = tl.constexpr(grids.CLIPS)
STEPS = tl.constexpr(grids.SEARCH_STEPS)
LONGEST_TREE = tl.constexpr(16)  # levels; without effect beyond those of the group


@triton.jit
def stored(scale, zero, dtype: tl.constexpr, TINY_SCALE: tl.constexpr):
    """Return scale and zero as they are stored in `dtype`."""
    scale = tl.where(scale < TINY_SCALE, 0.0, scale)
    return to_float32(round_to(scale, dtype)), to_float32(round_to(zero + 0.0, dtype))


@triton.jit
def codes_of(x, scale, zero, LEVELS: tl.constexpr):
    """Return the codes of a tile, int32."""
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    code = (x - zero[:, :, None]) * inverse[:, :, None]
    return _rounded(tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)) & LEVELS


@triton.jit
def fitted(
    x,
    inside,
    low,
    high,
    scale,
    zero,
    LEVELS: tl.constexpr,
    dtype: tl.constexpr,
    TINY_SCALE: tl.constexpr,
    ENCODER: tl.constexpr,
):
    """Return the scale and zero of `refit` or `search`, given those of `minmax`; `inside` marks a group's columns."""
    best_scale, best_zero = scale, zero
    above = tl.where(inside, x - low[:, :, None], 0.0)
    count = tl.sum(tl.where(inside, 1, 0), 2)
    sum_x = _tree_sum(above)
    if ENCODER == "refit":
        sum_q, sum_qq, sum_qx, _ = _sums(x, above, inside, scale, zero, LEVELS)
        best_scale, best_zero = _step(count, low, sum_x, sum_q, sum_qq, sum_qx, scale, zero, dtype, TINY_SCALE)
    else:
        least = tl.full(low.shape, float("inf"), tl.float32)
        for clip in range(4):
            share, below = _clip(clip)
            clipped = tl.div_rn((high - low) * share, LEVELS * 1.0)
            now_scale, now_zero = stored(clipped, low + (high - low) * below, dtype, TINY_SCALE)
            for _ in range(STEPS + 1):  # the step after the last one is not looked at
                sum_q, sum_qq, sum_qx, error = _sums(x, above, inside, now_scale, now_zero, LEVELS)
                best_scale = tl.where(error < least, now_scale, best_scale)
                best_zero = tl.where(error < least, now_zero, best_zero)
                least = tl.where(error < least, error, least)
                now_scale, now_zero = _step(
                    count, low, sum_x, sum_q, sum_qq, sum_qx, now_scale, now_zero, dtype, TINY_SCALE
                )
    is_finite = _is_finite(scale) & _is_finite(zero)
    return tl.where(is_finite, best_scale, scale), tl.where(is_finite, best_zero, zero)


@triton.jit
def _clip(index):
    """Return a start of the search: the share of the range, and the share below it."""
    share = tl.where(index == 0, CLIPS[0][0], tl.where(index == 1, CLIPS[1][0], CLIPS[2][0]))
    below = tl.where(index == 0, CLIPS[0][1], tl.where(index == 1, CLIPS[1][1], CLIPS[2][1]))
    return tl.where(index == 3, CLIPS[3][0], share), tl.where(index == 3, CLIPS[3][1], below)


@triton.jit
def _sums(x, above, inside, scale, zero, LEVELS: tl.constexpr):
    """Return the sums of codes, of their squares, of code times element, and of squared errors."""
    code = tl.where(inside, codes_of(x, scale, zero, LEVELS), 0)
    number = code.to(tl.float32)
    error = tl.where(inside, number * scale[:, :, None] + zero[:, :, None] - x, 0.0)
    return tl.sum(code, 2), tl.sum(code * code, 2), _tree_sum(number * above), _tree_sum(error * error)


@triton.jit
def _step(count, low, sum_x, sum_q, sum_qq, sum_qx, scale, zero, dtype: tl.constexpr, TINY_SCALE: tl.constexpr):
    """Return the least-squares scale and zero for the codes of a grid, or that grid where there is none."""
    spread = (count.to(tl.int64) * sum_qq - sum_q.to(tl.int64) * sum_q).to(tl.float32)
    n, q = count.to(tl.float32), sum_q.to(tl.float32)
    covered = tl.div_rn(n * sum_qx - q * sum_x, tl.where(spread > 0, spread, 1.0))
    new_scale, _ = stored(covered, low, dtype, TINY_SCALE)
    new_scale, new_zero = stored(new_scale, low + tl.div_rn(sum_x - new_scale * q, n), dtype, TINY_SCALE)
    is_better = (spread > 0) & (new_scale > 0) & _is_finite(new_scale) & _is_finite(new_zero)
    return tl.where(is_better, new_scale, scale), tl.where(is_better, new_zero, zero)


@triton.jit
def _tree_sum(x):
    """Return the sum over the last axis, a power of two: the second half is added to the first until one is left."""
    for _ in tl.static_range(LONGEST_TREE):
        if x.shape[2] > 1:
            x = tl.sum(tl.reshape(x, [16, x.shape[1], 2, x.shape[2] // 2]), 2)
    return tl.reshape(x, [16, x.shape[1]])


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _rounded(x):
    """Round `0 <= x < 2**22` to the nearest integer, ties to even: at 2**23 a float32 has no fraction left."""
    return (x + 8388608.0).to(tl.int32, bitcast=True) & 0x3FFFFF
