"""Attention on a CPU through the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.native.structs import DTYPES, WIDEST_VECTOR, CAttention, CPart, CSegments
from ..segments import Channels, Coded, Packed, Segments
from ..summaries import ChosenPages
from .pages import NativePages, is_plain, native_pages
from .parts import Part, parts_of
from .problem import AttentionProblem


def supports(problem: AttentionProblem) -> bool:
    """Return whether the native path takes this: sizes and groups that vectors divide, dtypes that it knows."""
    return problem.query.dtype in DTYPES and all(map(_fits, parts_of(problem, with_masks=False)))


def describe(problem: AttentionProblem) -> str:
    """Return what `supports` checks, for a warning."""
    parts = parts_of(problem, with_masks=False)
    tensors = [_stored(tensor) for part in parts for tensor in (part.key, part.value)]
    runs = [run for tensor in tensors if not isinstance(tensor.packed, Coded) for run in tensor.runs]
    pages = sorted({known.page for tensor in tensors if (known := _pages(tensor)).count})
    groups = sorted({run.layout.group for run in runs if isinstance(run, Packed)})
    sorted_values = "values in channel runs, " if any(isinstance(p.value.packed, Channels) for p in parts) else ""
    dtype = str(problem.key.tail.dtype).removeprefix("torch.")
    return f"{sorted_values}{dtype} pages of {pages}, heads of {problem.head_dim} in groups of {groups}"


def attend(library: ctypes.CDLL, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Return output and logarithms of the sums of weights, as `AttentionProblem` describes them."""
    query, mask, sink_logits = problem.query, problem.mask, problem.sink_logits
    scaled = (query.float() * problem.scaling).contiguous()
    if mask is not None and mask.dtype != torch.bool:
        problem = replace(problem, mask=mask.float())
    parts = parts_of(problem)  # keeps alive what the call points to
    output = torch.empty(*query.shape[:3], problem.value_dim)
    logarithms = torch.empty(query.shape[:3])
    call = CAttention(
        parts=(CPart * len(parts))(*(_part(part, problem) for part in parts)),
        query=scaled.data_ptr(),
        output=output.data_ptr(),
        logarithms=logarithms.data_ptr(),
        part_count=len(parts),
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        queries=problem.queries,
        dim=problem.head_dim,
        value_dim=problem.value_dim,
        threads=torch.get_num_threads(),
        softcap=problem.softcap or 0.0,
    )
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
        call.sink_logits = sink_logits.data_ptr()
    library.kvmix_attend(ctypes.byref(call))
    return output.to(query.dtype), logarithms


def _fits(part: Part) -> bool:
    key, value = part.key, part.value
    keys, values = _pages(key), _pages(value)
    if keys.count and values.count and (keys.page != values.page or key.sinks != value.sinks):
        return False  # tokens are split on the edges of pages of both
    is_sorted = isinstance(value.packed, Channels)
    return keys.fits and values.fits and not is_sorted and _is_tail(key.tail) and _is_tail(value.tail)


def _stored(tensor: Segments) -> Segments:
    """Return what is in memory, all pages in place of the chosen ones."""
    return replace(tensor, packed=tensor.packed.held) if isinstance(tensor.packed, ChosenPages) else tensor


def _pages(tensor: Segments) -> NativePages:
    """Return the pages in memory in C, all of them where some are chosen."""
    packed = tensor.packed
    return native_pages(packed.held if isinstance(packed, ChosenPages) else packed)


def _is_tail(tail: Tensor) -> bool:
    return tail.shape[3] % WIDEST_VECTOR == 0 and is_plain(tail)


def _part(part: Part, problem: AttentionProblem) -> CPart:
    call = CPart(_segments(part.key), _segments(part.value), tokens=part.tokens)
    if part.mask is not None:
        call.mask, call.mask_is_bool = part.mask.data_ptr(), part.mask.dtype == torch.bool
        call.mask_strides = part.mask.expand(*problem.query.shape[:3], part.tokens).stride()
    return call


def _segments(tensor: Segments) -> CSegments:
    """Return sink and tail in C, with the pages, which `tensor` keeps alive."""
    tail, sink, packed = tensor.tail, tensor.sink, tensor.packed
    call = CSegments.from_buffer_copy(_pages(tensor).segments)
    call.tail, call.tail_strides, call.tail_tokens = tail.data_ptr(), tail.stride()[:3], tail.shape[2]
    call.dim, call.dtype = tail.shape[3], DTYPES[tail.dtype]
    if sink is not None:
        call.sink, call.sink_strides, call.sinks = sink.data_ptr(), sink.stride()[:3], sink.shape[2]
    if isinstance(packed, ChosenPages):
        call.table, call.table_strides = packed.numbers.data_ptr(), packed.numbers.stride()[:2]
        call.pages, call.is_choice = packed.pages, True
    return call
