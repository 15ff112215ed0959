"""Steps in which a page's rows are contracted: their number and their rows, all constants of a kernel.

A step is one matrix product over `step` rows: over the word rows of one field, or, where a field has fewer than the
16 rows that a tensor core contracts at once, of `share` neighbouring fields of the same words. Word rows are counted
as a power of two, `padded`; those beyond the `words` there are contribute nothing, or, of values, are those of the
next pages: `stack` pages are contracted together. The rows of a plane of 3 bits are those of its 2-bit plane.
"""

import triton

LEAST_STEP = 16
"""Rows that a tensor core contracts at once."""
LEAST_PADDED = {1: 4, 2: 8, 3: 8, 4: 16, 8: 16}
"""So that the fields of one step lie within the 7 bits of a bfloat16's mantissa."""


@triton.constexpr_function
def fields_of(layout):
    """Return the fields in a word of the (low) plane."""
    return 16 // layout.planes[0]


@triton.constexpr_function
def words_of(layout):
    """Return the word rows of the (low) plane."""
    return layout.rows * layout.planes[0] // 16


@triton.constexpr_function
def padded_of(layout):
    """Return the word rows, padded to a power of two."""
    words = layout.rows * layout.planes[0] // 16
    return max(LEAST_PADDED[layout.bits], triton.next_power_of_2(words))


@triton.constexpr_function
def stack_of(layout):
    """Return how many pages are contracted together."""
    words = layout.rows * layout.planes[0] // 16
    return max(1, LEAST_PADDED[layout.bits] // words) if layout.kind == "value" else 1


@triton.constexpr_function
def is_whole(layout):
    """Return whether no word row is padding."""
    words = layout.rows * layout.planes[0] // 16
    padded = max(LEAST_PADDED[layout.bits], triton.next_power_of_2(words))
    return padded == words or layout.kind == "value"


@triton.constexpr_function
def step_of(layout, most=None):
    """Return the rows of one step, at most `most`."""
    step = max(padded_of(layout), LEAST_STEP)
    return step if most is None else min(step, most)


@triton.constexpr_function
def places_of(layout):
    """Return the number of rows in the order of steps, padding included."""
    return 16 // layout.planes[0] * padded_of(layout)


@triton.constexpr_function
def share_of(layout, step):
    """Return the fields in one step."""
    return max(1, step // padded_of(layout))
