"""Attention on a CPU through the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ..layout import FULL_PRECISION_BITS
from ..runtime.native.structs import DTYPES, WIDEST_VECTOR, CAttention, CPart, CRun, CSegments
from ..segments import Channels, Coded, Packed, Plain, Segments, SortedTokens
from ..summaries import ChosenPages
from . import coded
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
    pages = sorted({page for tensor in tensors if (page := _page(tensor))})
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
    pages = [_page(tensor) for tensor in (part.key, part.value)]
    if all(pages) and (pages[0] != pages[1] or part.key.sinks != part.value.sinks):
        return False  # tokens are split on the edges of pages of both
    return not isinstance(part.value.packed, Channels) and _is_segment(part.key) and _is_segment(part.value)


def _page(tensor: Segments) -> int:
    """Return the tokens of a page; 0 where there is none."""
    packed = tensor.packed
    return 0 if packed is None or isinstance(packed, SortedTokens) or packed.pages == 0 else packed.page


def _stored(tensor: Segments) -> Segments:
    """Return what is in memory, all pages in place of the chosen ones."""
    return replace(tensor, packed=tensor.packed.held) if isinstance(tensor.packed, ChosenPages) else tensor


def _is_segment(tensor: Segments) -> bool:
    tensor = _stored(tensor)
    if tensor.tail.shape[3] % WIDEST_VECTOR or not _is_plain(tensor.tail):
        return False
    return coded.fits(tensor.packed) if isinstance(tensor.packed, Coded) else all(map(_is_run, tensor.runs))


def _is_run(run: Packed | Plain) -> bool:
    if isinstance(run, Packed):
        return run.layout.group % WIDEST_VECTOR == 0
    return _is_plain(run.states) and run.states.stride(3) == run.page


def _is_plain(x: Tensor) -> bool:
    """Return whether elements are in a row, and of a dtype that the native path knows."""
    return x.dtype in DTYPES and x.stride(-1) == 1


def _part(part: Part, problem: AttentionProblem) -> CPart:
    call = CPart(_segments(part.key), _segments(part.value), tokens=part.tokens)
    if part.mask is not None:
        call.mask, call.mask_is_bool = part.mask.data_ptr(), part.mask.dtype == torch.bool
        call.mask_strides = part.mask.expand(*problem.query.shape[:3], part.tokens).stride()
    return call


def _segments(tensor: Segments) -> CSegments:
    chosen, tensor = tensor.packed, _stored(tensor)
    tail, sink, packed = tensor.tail, tensor.sink, tensor.packed
    call = CSegments(
        tail=tail.data_ptr(),
        tail_strides=tail.stride()[:3],
        tail_tokens=tail.shape[2],
        dim=tail.shape[3],
        dtype=DTYPES[tail.dtype],
    )
    if sink is not None:
        call.sink, call.sink_strides, call.sinks = sink.data_ptr(), sink.stride()[:3], sink.shape[2]
    if isinstance(packed, Coded):
        if packed.pages:
            call.coded = ctypes.pointer(coded.pages_of(packed))
            call.pages, call.page = packed.pages, packed.page
    elif runs := tensor.runs:
        call.runs, call.run_count = (CRun * len(runs))(*map(_run, runs)), len(runs)
        call.pages, call.page = runs[0].pages, runs[0].page
    if isinstance(packed, Channels):
        call.order, call.order_strides = packed.order.data_ptr(), packed.order.stride()[:3]
        call.pages_per_order = packed.pages_per_order
    if isinstance(chosen, ChosenPages):
        call.table, call.table_strides = chosen.numbers.data_ptr(), chosen.numbers.stride()[:2]
        call.pages, call.is_choice = chosen.pages, True
    return call


def _run(run: Packed | Plain) -> CRun:
    if isinstance(run, Plain):
        return CRun(
            data=run.states.data_ptr(),
            data_strides=run.states.stride()[:3],
            bits=FULL_PRECISION_BITS,
            channels=run.width,
            dtype=DTYPES[run.states.dtype],
        )
    layout = run.layout
    return CRun(
        data=run.words.data_ptr(),
        scales=run.scales.data_ptr(),
        data_strides=run.words.stride()[:3],
        scales_strides=run.scales.stride()[:3],
        bits=layout.bits,
        channels=layout.head_dim,
        group=layout.group,
        dtype=DTYPES[run.scales.dtype],
    )
