"""Where things are in memory, for a Triton program: sink | packed pages | tail of one KV head, and query rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Side(NamedTuple):
    """Keys or values: pointers, each with its strides over batch rows, heads, and tokens or pages.

    Without a sink of their own, `sink` is the tail, which then begins with the first token.
    """

    sink: Any
    sink_strides: Any
    words: Any
    words_strides: Any
    scales: Any
    scales_strides: Any
    tail: Any
    tail_strides: Any


class Rows(NamedTuple):
    """A program's query rows `[M]`: pointers to them, and which of them there are."""

    pointers: Any
    is_row: Any


@triton.jit
def of_head(side, batch, head):
    """The pointers of one KV head of one batch row."""
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    return Side(
        side.sink + batch * side.sink_strides[0] + head * side.sink_strides[1],
        side.sink_strides,
        side.words + batch * side.words_strides[0] + head * side.words_strides[1],
        side.words_strides,
        side.scales + batch * side.scales_strides[0] + head * side.scales_strides[1],
        side.scales_strides,
        side.tail + batch * side.tail_strides[0] + head * side.tail_strides[1],
        side.tail_strides,
    )
