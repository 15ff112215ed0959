"""Writing codes into blocks on a CPU through the native library (`cpu.cpp`), and attention over blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.native.structs import DTYPES, FORMS, CAttention, CPart, CPlacement, CStoring
from .problem import BlockProblem


def place(
    library: ctypes.CDLL,
    form: str,
    blocks: Tensor,
    codes: Tensor,
    slots: Tensor,
    widths: Tensor,
    places: Tensor,
    page: int,
    group: int = 0,
) -> None:
    """Put codes of tokens into blocks, as `naive.place` does.

    Args:
        library: the native library.
        form: `"direction"`, `"key"` or `"value"`: how the codes of a block lie.
        blocks: `[N, bytes]` uint8, the codes of every block.
        codes: `[n, H_kv, D]` uint8.
        slots: `[n]` int64.
        widths: `[H_kv, D]` uint8, bits of the codes.
        places: `[H_kv]` int64, first byte of each head in a block.
        page: tokens of a block.
        group: channels of keys that are packed together.
    """
    codes, slots = codes.contiguous(), slots.contiguous()
    call = _placement(form, blocks, slots, codes.shape, widths, places, page, group)
    call.codes = codes.data_ptr()
    library.kvmix_place(ctypes.byref(call))


def store(
    library: ctypes.CDLL,
    form: str,
    blocks: Tensor,
    scales: Tensor,
    states: Tensor,
    slots: Tensor,
    widths: Tensor,
    places: Tensor,
    group: int,
) -> None:
    """Put tokens into blocks as codes, each group of channels by its smallest and largest element.

    Args:
        library: the native library.
        form: `"key"` or `"value"`: how the codes of a block lie.
        blocks: `[N, bytes]` uint8, the codes of every block.
        scales: `[N, H_kv, groups, 2, page]`, scale and zero of every block, one token after the other.
        states: `[n, H_kv, D]` in a dtype of `DTYPES`, channels contiguous.
        slots: `[n]` int64.
        widths: `[H_kv, D]` uint8, bits of the codes, all alike.
        places: `[H_kv]` int64, first byte of each head in a block.
        group: channels of a group, a multiple of 16.
    """
    slots = slots.contiguous()
    call = CStoring(
        to=_placement(form, blocks, slots, states.shape, widths, places, scales.shape[-1], group),
        states=states.data_ptr(),
        scales=scales.data_ptr(),
        states_strides=states.stride()[:2],
        scales_strides=scales.stride()[:4],
        dtype=DTYPES[states.dtype],
        scale_dtype=DTYPES[scales.dtype],
    )
    library.kvmix_store(ctypes.byref(call))


def _placement(
    form: str,
    blocks: Tensor,
    slots: Tensor,
    shape: Sequence[int],
    widths: Tensor,
    places: Tensor,
    page: int,
    group: int,
) -> CPlacement:
    """Return where tokens `[n, H_kv, D]` of this shape go, without their codes; `slots` must outlive it."""
    return CPlacement(
        slots=slots.data_ptr(),
        blocks=blocks.data_ptr(),
        widths=widths.data_ptr(),
        places=places.data_ptr(),
        block_bytes=blocks.stride(0),
        tokens=shape[0],
        heads=shape[1],
        dim=shape[2],
        page=page,
        form=FORMS[form],
        group=group,
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


def strides(view: Tensor, axes: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return the strides of these axes for batch, head and block, of which the batch has none: all share the blocks."""
    return (ctypes.c_int64 * 3)(0, *(view.stride(axis) for axis in axes))
