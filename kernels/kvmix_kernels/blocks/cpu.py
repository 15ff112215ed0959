"""Writing codes into blocks on a CPU through the native library (`cpu.cpp`), and attention over blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.native.structs import DTYPES, FORMS, CAttention, CPart, CPlacement, CStoring
from .problem import BlockProblem


class BlockLayout(NamedTuple):
    """Layout of the codes of a block.

    Attributes:
        form: `"direction"`, `"key"` or `"value"`: how they are packed.
        widths: `[H_kv, D]` uint8, bits of the codes.
        places: `[H_kv]` int64, first byte of each head in a block.
        page: tokens of a block.
        group: channels of a group, which are packed together where they are keys'; 0 for directions.
    """

    form: str
    widths: Tensor
    places: Tensor
    page: int
    group: int = 0


def place(library: ctypes.CDLL, layout: BlockLayout, blocks: Tensor, codes: Tensor, slots: Tensor) -> None:
    """Put codes of tokens into blocks, as `naive.place` does.

    Args:
        library: the native library.
        layout: of the blocks.
        blocks: `[N, bytes]` uint8, the codes of every block.
        codes: `[n, H_kv, D]` uint8.
        slots: `[n]` int64.
    """
    codes, slots = codes.contiguous(), slots.contiguous()
    call = _placement(layout, blocks, slots, codes.shape)
    call.codes = codes.data_ptr()
    library.kvmix_place(ctypes.byref(call))


def store(
    library: ctypes.CDLL, layout: BlockLayout, blocks: Tensor, scales: Tensor, states: Tensor, slots: Tensor
) -> None:
    """Put tokens into blocks as codes, each group of channels by its smallest and largest element.

    Args:
        library: the native library.
        layout: of the blocks: of keys or values, of one width, in groups of a multiple of 16 channels.
        blocks: `[N, bytes]` uint8, the codes of every block.
        scales: `[N, H_kv, groups, 2, page]`, scale and zero of every block, one token after the other.
        states: `[n, H_kv, D]` in a dtype of `DTYPES`, channels contiguous.
        slots: `[n]` int64.
    """
    slots = slots.contiguous()
    call = CStoring(
        to=_placement(layout, blocks, slots, states.shape),
        states=states.data_ptr(),
        scales=scales.data_ptr(),
        states_strides=states.stride()[:2],
        scales_strides=scales.stride()[:4],
        dtype=DTYPES[states.dtype],
        scale_dtype=DTYPES[scales.dtype],
    )
    library.kvmix_store(ctypes.byref(call))


def _placement(layout: BlockLayout, blocks: Tensor, slots: Tensor, shape: Sequence[int]) -> CPlacement:
    """Return where tokens `[n, H_kv, D]` of this shape go, without their codes; `slots` must outlive it."""
    return CPlacement(
        slots=slots.data_ptr(),
        blocks=blocks.data_ptr(),
        widths=layout.widths.data_ptr(),
        places=layout.places.data_ptr(),
        block_bytes=blocks.stride(0),
        tokens=shape[0],
        heads=shape[1],
        dim=shape[2],
        page=layout.page,
        form=FORMS[layout.form],
        group=layout.group,
        threads=torch.get_num_threads(),
    )


def attend(library: ctypes.CDLL, problem: BlockProblem) -> Tensor:
    """Return the output `[B, H, S, D_v]` float32; blocks that are read may have been written just now."""
    query = (problem.query.float() * problem.scaling).contiguous()
    logits = None if problem.sink_logits is None else problem.sink_logits.float().contiguous()
    key = problem.keys.native(problem.key_blocks, problem.table)
    value = problem.values.native(problem.value_blocks, problem.table)
    batch, heads, queries, _ = query.shape
    table, lengths = problem.table, problem.lengths
    pages = -(-int(lengths.max()) // key.page)
    output, logarithms = torch.empty(batch, heads, queries, value.dim), torch.empty(batch, heads, queries)
    for segments in (key, value):
        segments.pages, segments.table, segments.table_strides = pages, table.data_ptr(), (table.stride(0), 0)
    part = CPart(key, value, lengths=lengths.data_ptr(), tokens=pages * key.page)
    call = CAttention(
        parts=ctypes.pointer(part),
        query=query.data_ptr(),
        output=output.data_ptr(),
        logarithms=logarithms.data_ptr(),
        query_strides=query.stride()[:3],
        dtype=DTYPES[query.dtype],
        part_count=1,
        batch=batch,
        heads=heads,
        kv_heads=problem.kv_heads,
        queries=queries,
        dim=query.shape[3],
        value_dim=value.dim,
        threads=torch.get_num_threads(),
        scaling=1.0,
        softcap=problem.softcap or 0.0,
    )
    if logits is not None:
        call.sink_logits = logits.data_ptr()
    library.kvmix_attend(ctypes.byref(call))
    return output
