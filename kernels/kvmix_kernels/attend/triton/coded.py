"""Attention to pages of transform codes, in Triton: one program has a split of one KV head's pages.

First, tile after tile, codes of keys times folded coefficients are scores, and scores are weights, which the program
leaves in memory, each tile's relative to the largest score until then, times the scales of its tokens. Then, plane by
plane, codes of values times these weights are sums. So a program keeps no more than one tile of scores or one chunk of
sums in registers, however many directions a head has and whatever their widths, and nothing in it depends on them.

Pages lie one after the other, or are blocks of an engine: a table says where the next of a sequence is, each sequence
ends at its own length, and queries are its last tokens.

Codes are the left operand, and are never converted: masked into the mantissa of a bfloat16 `2^bits`, a code of a plane
of `bits` bits *is* the number `2^bits + code`.
"""

import triton
import triton.language as tl

from ...runtime.triton_numbers import INTERPRETED, dot, round_to, to_float32
from .packed import joined
from .planes import CHUNK as CHUNK_PLANES
from .planes import PLANE_BITS
from .softmax import Scoring, Softmax, logarithm_of_total, score, weigh

CHUNK = tl.constexpr(CHUNK_PLANES)
KINDS = tl.constexpr(len(PLANE_BITS))
LENGTHS = ["kv_heads", "queries", "pages", "pages_per_frame", "frames", "key_rows", "value_rows", "exact"]
SPLITS = ["splits", "tiles", "tiles_per_split"]
STRIDES = ["keys_batch", "keys_page", "values_batch", "values_page", "scales_batch", "scales_head", "scales_page"]
STRIDES += ["table_batch"]
MASK_STRIDES = ["mask_batch", "mask_head", "mask_query", "mask_token"]


@triton.constexpr_function
def bits_of(kind):
    """Return the bits of a kind of planes."""
    return PLANE_BITS[kind]


@triton.constexpr_function
def center(kind):
    """Return the middle of the numbers `2^bits + code` of a kind of planes."""
    return 1.5 * 2 ** PLANE_BITS[kind] - 0.5


@triton.constexpr_function
def shift_of(field, bits):
    """Return how many bits to shift right to bring a field to the top of the mantissa; below 0 is to the left."""
    return field * bits - (7 - bits)


@triton.constexpr_function
def mask_of(bits):
    """Return the mask of a code at the top of a bfloat16's mantissa."""
    return (2**bits - 1) << (7 - bits)


@triton.constexpr_function
def number_of_zero(bits):
    """Return the bits of the bfloat16 number `2^bits`."""
    return (127 + bits) << 7


@triton.constexpr_function
def assembly(field, bits):
    """Return PTX from two bytes, each in 16 bits, `$1`, to two bfloat16 numbers `$0`."""
    shift, mask, zero = field * bits - (7 - bits), (2**bits - 1) << (7 - bits), (127 + bits) << 7
    moved = f"shr.b32 a, $1, {shift};" if shift > 0 else f"shl.b32 a, $1, {-shift};"
    return f"{{ .reg .b32 a; {moved} lop3.b32 $0, a, {mask * 0x10001:#x}, {zero * 0x10001:#x}, 0xEA; }}"


@triton.jit
def number(words, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Return the bfloat16 numbers `2^BITS + code` of a field of bytes, given as int16."""
    if INTERPRETED:
        return number_plainly(words, FIELD, BITS)
    return tl.inline_asm_elementwise(assembly(FIELD, BITS), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def number_plainly(words, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Do the same without assembly, for the interpreter and as a check of the assembly."""
    SHIFT: tl.constexpr = shift_of(FIELD, BITS)
    moved = words.to(tl.int32)
    moved = moved >> SHIFT if SHIFT > 0 else moved << -SHIFT
    return ((moved & mask_of(BITS)) | number_of_zero(BITS)).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=[*LENGTHS, *SPLITS, *STRIDES, *MASK_STRIDES])
def coded_kernel(
    keys,
    keys_batch,
    keys_page,
    key_places,
    key_chunks,
    key_rows,
    coefficients,
    offsets,
    values,
    values_batch,
    values_page,
    value_places,
    value_chunks,
    value_rows,
    scales,
    scales_batch,
    scales_head,
    scales_page,
    table,
    table_batch,
    lengths,
    places,
    firsts,
    exact,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_token,
    weights,
    decays,
    means,
    logarithms,
    cap,
    kv_heads,
    queries,
    pages,
    pages_per_frame,
    frames,
    splits,
    tiles,
    tiles_per_split,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to a split of the pages, with arguments that `coded_launch.py` prepares.

    Without a table, all sequences have as many pages, and `places` and `firsts` tell which tokens are exact; with one,
    those before `exact` are.
    """
    TOGETHER: tl.constexpr = TILE // PAGE
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = head // kv_heads, head % kv_heads
    rows = RATIO * queries
    row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < rows
    mask_rows = mask + batch * mask_batch + (kv_head * RATIO + row // queries) * mask_head
    mask_rows += (row % queries).to(tl.int64) * mask_query
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    if table is None:
        tokens, last_seen = pages * PAGE, row
        places, firsts = places + head * exact, firsts + head * (pages + 1)
    else:
        tokens = tl.load(lengths + batch).to(tl.int32)
        last_seen = tokens - queries + row % queries
        table += batch * table_batch
        pages = tl.cdiv(tokens, PAGE)
        last = tl.minimum(last, tl.cdiv(tl.max(tl.where(is_row, last_seen, -1), 0) + 1, TILE))
    scoring = Scoring(cap, mask_rows, mask_token, is_row, last_seen)
    keys += tl.multiple_of(batch * keys_batch, PAGE // 8)
    values += tl.multiple_of(batch * values_batch, PAGE // 8)
    scales += batch * scales_batch + kv_head * scales_head
    key_places, value_places = key_places + kv_head * key_rows, value_places + kv_head * value_rows
    key_chunks, value_chunks = key_chunks + kv_head * (KINDS + 1), value_chunks + kv_head * (KINDS + 1)
    weights += (head * rows + row) * (tiles * TILE)
    decays += (head * rows + row) * tiles
    zero = tl.zeros([BLOCK], tl.float32)
    running = Softmax(tl.full([BLOCK], float("-inf"), tl.float32), zero, (zero,))
    for tile in tl.range(first, last):
        page = tile * TOGETHER
        folded = (head * frames + page // pages_per_frame) * rows + row
        products = tl.zeros([TILE, BLOCK], tl.float32)
        for kind in tl.static_range(KINDS):
            products += code_products(
                keys, keys_page, page, pages, table, key_places, tl.load(key_chunks + kind),
                tl.load(key_chunks + kind + 1), coefficients + folded * key_rows, is_row, bits_of(kind), PAGE, TILE,
                BLOCK, STAGES,
            )  # fmt: skip
        products += tl.load(offsets + folded, mask=is_row, other=0.0)[None, :]
        token = page * PAGE + tl.arange(0, TILE)
        scores = score(products, token, tokens, scoring, MASK, SOFTCAP, TOGETHER == 1)
        if EXACT:
            hidden = token < exact if table is not None else is_exact(token, page, pages, places, firsts, TOGETHER)
            scores = tl.where(hidden[:, None], float("-inf"), scores)
        running, decay, weight = weigh(running, (scores,))
        at = scales + page_at(token // PAGE, token < tokens, table) * scales_page + token % PAGE
        scale = to_float32(tl.load(at, mask=token < tokens, other=0.0))
        weight = round_to(weight[0] * scale[:, None], tl.bfloat16)
        mass = running.sums[0] * decay + tl.sum(to_float32(weight), 0)
        running = Softmax(running.peak, running.total, (mass,))
        tl.store(weights[None, :] + token[:, None], weight, mask=is_row[None, :])
        tl.store(decays + tile, decay, mask=is_row)
    tl.debug_barrier()  # weights are read by other threads than wrote them

    at = (head * splits + split) * rows + row
    tl.store(logarithms + at, logarithm_of_total(running), mask=is_row)
    divisor = tl.where(running.total == 0, 1.0, running.total)
    plane = tl.arange(0, CHUNK)
    means += at * value_rows
    for kind in tl.static_range(KINDS):
        for chunk in tl.range(tl.load(value_chunks + kind), tl.load(value_chunks + kind + 1)):
            place = tl.multiple_of(tl.load(value_places + plane + chunk * CHUNK), PAGE // 8)
            sums = code_sums(
                values, values_page, place, first, last, pages, table, weights, decays, is_row, bits_of(kind), PAGE,
                TILE, BLOCK, STAGES,
            )  # fmt: skip
            sums = (sums - center(kind) * running.sums[0][None, :]) / divisor[None, :]
            tl.store(means[None, :] + (plane + chunk * CHUNK)[:, None], sums, mask=is_row[None, :])
    for chunk in tl.range(tl.load(value_chunks + KINDS), value_rows // CHUNK):
        nothing = tl.zeros([CHUNK, BLOCK], tl.float32)
        tl.store(means[None, :] + (plane + chunk * CHUNK)[:, None], nothing, mask=is_row[None, :])


@triton.jit
def code_products(
    keys,
    stride,
    page,
    pages,
    table,
    places,
    first,
    last,
    coefficients,
    is_row,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply a tile's codes in chunks `[first, last)` of planes of keys by coefficients, `[TILE, M]`."""
    plane = tl.arange(0, CHUNK)
    parts = ()
    for _ in tl.static_range(8 // BITS):
        parts = parts + (tl.zeros([TILE * BITS // 8, BLOCK], tl.float32),)
    at, is_page = bytes_of(stride, page, pages, table, BITS, PAGE, TILE)
    for chunk in tl.range(first, last, num_stages=STAGES):
        index = plane + chunk * CHUNK
        place = tl.multiple_of(tl.load(places + index), PAGE // 8)
        words = load_bytes(keys, at[:, None], place[None, :], is_page[:, None], PAGE == TILE)
        factor = tl.load(coefficients[None, :] + index[:, None], mask=is_row[None, :], other=0.0)
        sums = ()
        for field in tl.static_range(8 // BITS):
            sums = sums + (dot(number(words, field, BITS), factor, parts[field]),)
        parts = sums
    return in_order(parts, BITS, PAGE, TILE, BLOCK)


@triton.jit
def code_sums(
    values,
    stride,
    place,
    first,
    last,
    pages,
    table,
    weights,
    decays,
    is_row,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum weights times numbers of a chunk of planes over tiles `[first, last)`, `[CHUNK, M]`."""
    BYTES: tl.constexpr = PAGE * BITS // 8
    within = tl.arange(0, TILE * BITS // 8)
    token = within // BYTES * PAGE + within % BYTES
    sums = tl.zeros([CHUNK, BLOCK], tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        at, is_page = bytes_of(stride, tile * (TILE // PAGE), pages, table, BITS, PAGE, TILE)
        words = load_bytes(values, at[None, :], place[:, None], is_page[None, :], PAGE == TILE)
        sums = sums * tl.load(decays + tile, mask=is_row, other=0.0)[None, :]
        for field in tl.static_range(8 // BITS):
            of_field = weights[None, :] + (tile * TILE + field * BYTES + token)[:, None]
            weight = tl.load(of_field, mask=is_row[None, :], other=0.0)
            sums = dot(number(words, field, BITS), weight, sums)
    return sums


@triton.jit
def bytes_of(stride, page, pages, table, BITS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Return where the bytes of a plane of a tile's pages are, `[TILE * BITS / 8]`, and whether such pages exist."""
    BYTES: tl.constexpr = PAGE * BITS // 8
    within = tl.arange(0, TILE * BITS // 8)
    if PAGE == TILE:
        return tl.multiple_of(page_at(page, page < pages, table) * stride, PAGE // 8) + within, within >= 0
    else:
        page = page + within // BYTES
        return page_at(page, page < pages, table) * stride + within % BYTES, page < pages


@triton.jit
def page_at(page, is_page, table):
    """Return which pages in memory some pages are, int64; without a table those that are counted so."""
    if table is None:
        return tl.cast(page, tl.int64)
    else:
        return tl.load(table + page, mask=is_page, other=0).to(tl.int64)


@triton.jit
def load_bytes(codes, at, place, is_page, WHOLE: tl.constexpr):
    """Load bytes of planes as int16, 0 for planes that do not exist and, unless `WHOLE`, for such pages."""
    inside = place >= 0
    if not WHOLE:
        inside = inside & is_page
    return tl.load(codes + (at + place), mask=inside, other=0).to(tl.int16)


@triton.jit
def in_order(parts, BITS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Join the products of all fields to those of a tile of tokens in their order, `[TILE, M]`."""
    BYTES: tl.constexpr = PAGE * BITS // 8
    by_page = tl.reshape(tl.permute(joined(parts), [2, 0, 1]), [8 // BITS, TILE // PAGE, BYTES, BLOCK])
    return tl.reshape(tl.permute(by_page, [1, 0, 2, 3]), [TILE, BLOCK])


@triton.jit
def is_exact(token, page, pages, places, firsts, TOGETHER: tl.constexpr):
    """Return whether tokens `[N]` of pages from `page` on are exact; `firsts` is the first such place of each page."""
    hidden = token < 0
    begin, end = tl.load(firsts + page), tl.load(firsts + tl.minimum(page + TOGETHER, pages))
    for index in tl.range(begin, end):
        hidden = hidden | (token == tl.load(places + index))
    return hidden
