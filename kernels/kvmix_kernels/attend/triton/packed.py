"""Products of coefficients and the codes of a packed page, in Triton.

A page is a matrix `[rows, columns]` whose rows are contracted: q·k sums over channels, p·v over tokens. With scales s
and zeros z of a group of columns,

    sum_n a_n (code_nm s_n + z_n)  =  sum_n (a_n s_n) code_nm  +  sum_n a_n z_n

so scales fold into the coefficients, which are rounded to bfloat16 for the tensor cores. Codes are not converted to
numbers, `codes.py` makes them look like some: `number = unit * code + number_of_zero`. The coefficients take that back.
What is left of it is added to every column, computed from the middle of the code range and from the *rounded*
coefficients: so their rounding errors meet the smallest possible numbers.
"""

import triton
import triton.language as tl

from ...runtime.triton_numbers import dot, round_to, to_float32
from .codes import decode, number_of_zero, unit_of
from .memory import beyond
from .softmax import Softmax
from .steps import fields_of, is_whole, padded_of, share_of, stack_of, step_of, words_of


@triton.constexpr_function
def middle_of(layout):
    """Return the middle of the code range."""
    return layout.levels / 2


@triton.constexpr_function
def size_of(layout, name):
    """Return a size of the layout as a constant of the kernel."""
    return getattr(layout, name)


@triton.constexpr_function
def has_whole_groups(layout):
    """Return whether every group has as many columns as a program takes."""
    return layout.columns % layout.group == 0 and triton.next_power_of_2(layout.group) == layout.group


@triton.jit
def row_of(at, LAYOUT: tl.constexpr):
    """Return the matrix row at a place in the order of steps, and whether there is one."""
    PADDED: tl.constexpr = padded_of(LAYOUT)
    WORDS: tl.constexpr = words_of(LAYOUT)
    if PADDED == WORDS:
        return at, at >= 0
    elif is_whole(LAYOUT):
        return at // PADDED * WORDS + at % WORDS, at >= 0
    else:
        return at // PADDED * WORDS + at % PADDED, at % PADDED < WORDS


@triton.jit
def page_at(pages, at, LAYOUT: tl.constexpr):
    """Return a pointer to the page of a place in the order of steps; the last page for places after it."""
    if stack_of(LAYOUT) == 1:
        return pages.pointer + pages.page * pages.stride
    else:
        page = pages.page + at % padded_of(LAYOUT) // words_of(LAYOUT)
        return pages.pointer + tl.minimum(page, pages.last) * pages.stride


@triton.jit
def fold(x, first, scales, group, LAYOUT: tl.constexpr):
    """Fold a group's scales into bfloat16 coefficients; return those, and `[M]` to add to every column of the group.

    Args:
        x: float32 coefficients `[N, M]` of `N` rows from `first` on in the order of steps; 0 where there is no row.
        scales: where the scales of pages are.
    """
    ROWS: tl.constexpr = size_of(LAYOUT, "rows")
    GROUPS: tl.constexpr = size_of(LAYOUT, "groups")
    MIDDLE: tl.constexpr = middle_of(LAYOUT)
    ZERO: tl.constexpr = number_of_zero(LAYOUT)
    at = first + tl.arange(0, x.shape[0])
    row, is_row = row_of(at, LAYOUT)
    scales = page_at(scales, at, LAYOUT)
    scale = to_float32(load(scales + group * ROWS + row, is_row, is_whole(LAYOUT)))
    zero = to_float32(load(scales + (GROUPS + group) * ROWS + row, is_row, is_whole(LAYOUT)))
    rounded = round_to(x * (scale * unit_of(at, LAYOUT, -1))[:, None], tl.bfloat16)
    middle = ZERO + MIDDLE * unit_of(at, LAYOUT, 1)
    offset = x * (zero + MIDDLE * scale)[:, None] - to_float32(rounded) * middle[:, None]
    return rounded, tl.sum(offset, 0)


@triton.jit
def contract(x, words, group, total, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    """Return `total + codesᵀ @ x` over a group's columns; `x` are folded coefficients, a tuple of `[STEP, M]`."""
    COLUMNS: tl.constexpr = size_of(LAYOUT, "columns")
    GROUP: tl.constexpr = size_of(LAYOUT, "group")
    SIXTEENTH: tl.constexpr = size_of(LAYOUT, "rows") // 16
    PADDED: tl.constexpr = padded_of(LAYOUT)
    WORDS: tl.constexpr = words_of(LAYOUT)
    WHOLE: tl.constexpr = is_whole(LAYOUT) and has_whole_groups(LAYOUT)
    within = tl.arange(0, total.shape[0])
    column = group * GROUP + within
    is_column = (within < GROUP) & (column < COLUMNS)
    for part in tl.static_range(max(1, PADDED // STEP)):
        at = (part * STEP + tl.arange(0, STEP)) % PADDED
        row = at % WORDS if stack_of(LAYOUT) > 1 else at
        page = page_at(words, at[None, :], LAYOUT)
        inside = is_column[:, None] & (row < WORDS)[None, :]
        low = load(page + row[None, :] * COLUMNS + column[:, None], inside, WHOLE)
        high = low
        if size_of(LAYOUT, "bits") == 3:
            # The high bits of word rows r and r + SIXTEENTH share a word, those of the second one bit further up.
            above = WORDS + row % SIXTEENTH
            high = load(page + above[None, :] * COLUMNS + column[:, None], inside, WHOLE)
            high = (high >> (row >= SIXTEENTH).to(tl.int16)[None, :]).to(tl.int16)
        for field in tl.static_range(0, fields_of(LAYOUT), share_of(LAYOUT, STEP)):
            number = decode(low, high, field, LAYOUT, STEP)
            total = dot(number, x[(field * PADDED + part * STEP) // STEP], total)
    return total


@triton.jit
def load(pointers, inside, WHOLE: tl.constexpr):
    """Load what is inside, and 0 elsewhere; without a mask where the whole is inside."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def add_page_products(products, query, scales, words, group, LAYOUT: tl.constexpr):
    """Return `products + keysᵀ @ query` of a group of tokens; the query's channels are in the order of steps."""
    STEP: tl.constexpr = step_of(LAYOUT)
    folded, offset = fold(query, 0, scales, group, LAYOUT)
    return contract(cut(folded, STEP), words, group, products + offset[None, :], LAYOUT, STEP)


@triton.jit
def add_page_values(running, decay, weights, scales, words, LAYOUT: tl.constexpr):
    """Add weighted values of packed pages to the decayed sums; `weights` are a tuple of `[tokens, M]`."""
    STACK: tl.constexpr = stack_of(LAYOUT)
    weights = in_steps(weights, LAYOUT)
    TOKENS: tl.constexpr = weights[0].shape[0]
    EACH: tl.constexpr = STACK * size_of(LAYOUT, "rows") // TOKENS
    STEP: tl.constexpr = step_of(LAYOUT, TOKENS)
    sums = ()
    for group in tl.static_range(size_of(LAYOUT, "groups")):
        total = running.sums[group] * decay[None, :]
        for stack in tl.static_range(len(weights) // EACH):
            parts = ()
            for i in tl.static_range(EACH):
                folded, offset = fold(
                    weights[stack * EACH + i], i * TOKENS, beyond(scales, stack * STACK), group, LAYOUT
                )
                parts = parts + cut(folded, STEP)
                total += offset[None, :]
            total = contract(parts, beyond(words, stack * STACK), group, total, LAYOUT, STEP)
        sums = sums + (total,)
    return Softmax(running.peak, running.total, sums)


@triton.jit
def in_steps(weights, LAYOUT: tl.constexpr):
    """Return weights in the order of contraction: that of steps, where several pages are contracted together."""
    STACK: tl.constexpr = stack_of(LAYOUT)
    if STACK == 1:
        return weights
    else:
        WORDS: tl.constexpr = words_of(LAYOUT)
        TOKENS: tl.constexpr = STACK * size_of(LAYOUT, "rows")
        EACH: tl.constexpr = TOKENS // weights[0].shape[0]
        M: tl.constexpr = weights[0].shape[1]
        stacks = ()
        for stack in tl.static_range(len(weights) // EACH):
            parts = ()
            for i in tl.static_range(EACH):
                parts = parts + (weights[stack * EACH + i],)
            by_page = tl.reshape(tl.permute(joined(parts), [2, 0, 1]), [STACK, fields_of(LAYOUT), WORDS, M])
            stacks = stacks + (tl.reshape(tl.permute(by_page, [1, 0, 2, 3]), [TOKENS, M]),)
        return stacks


@triton.jit
def cut(x, WIDTH: tl.constexpr):
    """Cut `[N, M]` into a tuple of `[WIDTH, M]`, from the top."""
    PARTS: tl.constexpr = x.shape[0] // WIDTH
    return _unzip(tl.permute(tl.reshape(x, [PARTS, WIDTH, x.shape[1]]), [1, 2, 0]))


@triton.jit
def _unzip(x):
    """Cut `[N, M, parts]` into a tuple of `[N, M]`."""
    if x.shape[2] == 1:
        return (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
        evens, odds = _unzip(even), _unzip(odd)
        parts = ()
        for i in tl.static_range(len(evens)):
            parts = parts + (evens[i], odds[i])
        return parts


@triton.jit
def joined(parts):
    """Join a tuple of `[N, M]` to `[N, M, parts]`."""
    if len(parts) == 1:
        return tl.reshape(parts[0], [parts[0].shape[0], parts[0].shape[1], 1])
    else:
        evens, odds = (), ()
        for i in tl.static_range(len(parts) // 2):
            evens, odds = evens + (parts[2 * i],), odds + (parts[2 * i + 1],)
        both = tl.join(joined(evens), joined(odds))
        return tl.reshape(both, [both.shape[0], both.shape[1], len(parts)])
