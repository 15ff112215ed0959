"""Attention on a CPU through the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ..pages import Channels, Coded, Packed
from ..runtime.native.structs import DTYPES, WIDEST_VECTOR, CAttention, CPart, CSegments
from ..segments import Segments
from ..summaries import ChosenPages
from ..vector_pages import VectorPages
from . import vectors
from .pages import NativePages, native_pages
from .parts import Part, parts_of
from .problem import AttentionProblem


def describe(problem: AttentionProblem) -> str:
    """Return what `attend` needs to know of a problem to take it, for a warning."""
    parts = parts_of(problem, with_masks=False)
    tensors = [_stored(tensor) for part in parts for tensor in (part.key, part.value)]
    runs = [run for tensor in tensors if not isinstance(tensor.packed, Coded) for run in tensor.runs]
    pages = sorted({known.page for tensor in tensors if (known := native_pages(tensor.packed)).count})
    groups = sorted({run.layout.group for run in runs if isinstance(run, Packed)})
    sorted_values = "values in channel runs, " if any(isinstance(p.value.packed, Channels) for p in parts) else ""
    dtype = str(problem.key.tail.dtype).removeprefix("torch.")
    return f"{sorted_values}{dtype} pages of {pages}, heads of {problem.head_dim} in groups of {groups}"


def attend(library: ctypes.CDLL, problem: AttentionProblem) -> tuple[Tensor, Tensor] | None:
    """Return output and logarithms of the sums of weights, as `AttentionProblem` describes them.

    None is returned for what the library does not take: sizes and groups that vectors do not divide, unknown dtypes.
    Where pages are many, whatever ran before them has left the processor's caches, and each operator of PyTorch costs
    up to 100 microseconds here: there are no more than two, which make the tensors that are returned.
    """
    query, mask, sink_logits = problem.query, problem.mask, problem.sink_logits
    if query.dtype not in DTYPES:
        return None
    if mask is not None and mask.dtype != torch.bool:
        problem = replace(problem, mask=mask.float())
    parts = parts_of(problem)  # keeps alive what the call points to
    described = [each for part in parts if (each := _part(part, problem)) is not None]
    if len(described) < len(parts):
        return None
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, heads, queries, dim = query.shape
    output = torch.empty(batch, heads, queries, problem.value_dim, dtype=query.dtype)
    logarithms = torch.empty(batch, heads, queries)
    call = CAttention(
        parts=(CPart * len(described))(*described),
        query=query.data_ptr(),
        output=output.data_ptr(),
        logarithms=logarithms.data_ptr(),
        query_strides=query.stride()[:3],
        dtype=DTYPES[query.dtype],
        part_count=len(described),
        batch=batch,
        heads=heads,
        kv_heads=problem.kv_heads,
        queries=queries,
        dim=dim,
        value_dim=output.shape[3],
        threads=torch.get_num_threads(),
        scaling=problem.scaling,
        softcap=problem.softcap or 0.0,
    )
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
        call.sink_logits = sink_logits.data_ptr()
    library.kvmix_attend(ctypes.byref(call))
    return output, logarithms


def _stored(tensor: Segments) -> Segments:
    """Return what is in memory, all pages in place of the chosen ones."""
    return replace(tensor, packed=tensor.packed.held) if isinstance(tensor.packed, ChosenPages) else tensor


def _part(part: Part, problem: AttentionProblem) -> CPart | None:
    """Return a part in C, or None if the library does not take it."""
    keys, values = native_pages(part.key.packed), native_pages(part.value.packed)
    if keys.count and values.count and (keys.page != values.page or part.key.sinks != part.value.sinks):
        return None  # tokens are split on the edges of pages of both
    key, value = _segments(part.key, keys), _segments(part.value, values)
    if key is None or value is None or values.is_sorted:
        return None
    packed, rows = (part.key.packed, part.value.packed), problem.ratio * problem.queries
    if any(isinstance(pages, VectorPages) and not vectors.pays(pages, rows) for pages in packed):
        return None
    call = CPart(key, value, tokens=part.tokens)
    if part.mask is not None:
        call.mask, call.mask_is_bool = part.mask.data_ptr(), part.mask.dtype == torch.bool
        call.mask_strides = part.mask.expand(*problem.query.shape[:3], part.tokens).stride()
    return call


def _segments(tensor: Segments, pages: NativePages) -> CSegments | None:
    """Return sink and tail in C, with the pages, which `tensor` keeps alive; None if the library does not take them."""
    tail, sink = tensor.tail, tensor.sink
    *strides, step = tail.stride()
    *_, tokens, dim = tail.shape
    dtype = DTYPES.get(tail.dtype)
    if not pages.fits or dtype is None or step != 1 or dim % WIDEST_VECTOR:
        return None
    call = CSegments.from_buffer_copy(pages.segments)
    call.tail, call.tail_strides, call.tail_tokens = tail.data_ptr(), tuple(strides), tokens
    call.dim, call.dtype = dim, dtype
    if sink is not None:
        call.sink, call.sink_strides, call.sinks = sink.data_ptr(), sink.stride()[:3], sink.shape[2]
    return call
