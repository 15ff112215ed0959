"""The codec of `naive.py` as one Triton kernel: pages are read once, words and scales are written where they stay.

A program takes one group of columns and all sixteen *sixteenths* of some rows: row `j * rows / 16 + c` for every `j`.
Whatever the bits, those are the rows that share words: with `E = 16 / bits` fields, `j = e * bits + d` is field `e`
of word row `d * rows / 16 + c`.
"""

import triton
import triton.language as tl

from ..numbers import round_to, to_float32


@triton.jit(do_not_specialize=["heads", "count"])
def quantize_kernel(
    pages,
    words,
    scales,
    heads,
    count,
    pages_batch,
    pages_head,
    pages_page,
    pages_row,
    pages_column,
    words_batch,
    words_head,
    words_page,
    scales_batch,
    scales_head,
    scales_page,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TINY_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    SIXTEENTH: tl.constexpr = ROWS // 16
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    LEVELS: tl.constexpr = (1 << BITS) - 1
    page = tl.program_id(0).to(tl.int64)
    batch, head, page = page // (heads * count), page // count % heads, page % count
    pages += batch * pages_batch + head * pages_head + page * pages_page
    words += batch * words_batch + head * words_head + page * words_page
    scales += batch * scales_batch + head * scales_head + page * scales_page

    group = tl.program_id(1)
    within = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.arange(0, 16)[:, None] * SIXTEENTH + within[None, :]
    column = group * GROUP + tl.arange(0, BLOCK_COLUMNS)
    is_row = within < SIXTEENTH
    is_column = (tl.arange(0, BLOCK_COLUMNS) < GROUP) & (column < COLUMNS)
    inside = is_row[None, :, None] & is_column[None, None, :]
    at = row[:, :, None].to(tl.int64) * pages_row + column[None, None, :].to(tl.int64) * pages_column
    x = to_float32(tl.load(pages + at, mask=inside, other=0.0))

    is_nan = tl.max((x != x).to(tl.int32), 2) > 0  # which minimum and maximum pass over
    low = tl.min(tl.where(is_column[None, None, :], x, float("inf")), 2)
    low = tl.where(is_nan, float("nan"), low + 0.0)  # of 0 and -0 either may be the minimum: make it 0
    high = tl.max(tl.where(is_column[None, None, :], x, float("-inf")), 2)
    scale = tl.div_rn(high - low, LEVELS * 1.0)
    scale = round_to(tl.where(scale < TINY_SCALE, 0.0, scale), scales.dtype.element_ty)
    zero = round_to(low, scales.dtype.element_ty)
    tl.store(scales + group * ROWS + row, scale, mask=is_row[None, :])
    tl.store(scales + (GROUPS + group) * ROWS + row, zero, mask=is_row[None, :])

    scale, zero = to_float32(scale), to_float32(zero)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    code = (x - zero[:, :, None]) * inverse[:, :, None]
    code = _rounded(tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)) & LEVELS

    to = words + within[None, :, None] * COLUMNS + column[None, None, :]
    if BITS == 3:
        _store_plane(to, code & 3, inside, 2, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        to += 2 * SIXTEENTH * COLUMNS
        _store_plane(to, code >> 2, inside, 1, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        _store_plane(to, code, inside, BITS, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _store_plane(
    to,
    code,
    inside,
    WIDTH: tl.constexpr,
    SIXTEENTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Pack codes `[16, rows, columns]` of `WIDTH` bits into words `[WIDTH, rows, columns]`, and write those."""
    FIELDS: tl.constexpr = 16 // WIDTH
    field = tl.reshape(code, [FIELDS, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS])
    word = tl.sum(field << (tl.arange(0, FIELDS) * WIDTH)[:, None, None, None], 0).to(tl.int16)
    tl.store(to + (tl.arange(0, WIDTH) * SIXTEENTH * COLUMNS)[:, None, None], word, mask=inside)


@triton.jit
def _rounded(x):
    """The nearest integer, ties to even, of `0 <= x < 2**22`: at 2**23 a float32 has no fraction left."""
    return (x + 8388608.0).to(tl.int32, bitcast=True) & 0x3FFFFF
