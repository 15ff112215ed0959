"""Attention on a CPU through the native library: prepares the arguments of `cpu.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..layout import FULL_PRECISION_BITS
from ..native import DTYPES, WIDEST_VECTOR
from ..pages import Channels, Packed, Plain
from ..segments import Segments
from ..tiers import Tiers
from .parts import Part, parts_of

_Strides = ctypes.c_int64 * 3


class _Run(ctypes.Structure):
    """`struct Run` of cpu.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("data_strides", _Strides),
        ("scales_strides", _Strides),
        ("bits", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _Segments(ctypes.Structure):
    """`struct Segments` of cpu.h."""

    _fields_ = (
        ("sink", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("runs", ctypes.POINTER(_Run)),
        ("order", ctypes.c_void_p),
        ("sink_strides", _Strides),
        ("tail_strides", _Strides),
        ("order_strides", _Strides),
        ("sinks", ctypes.c_int64),
        ("pages", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("tail_tokens", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("run_count", ctypes.c_int64),
        ("pages_per_order", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _Part(ctypes.Structure):
    """`struct Part` of cpu.h."""

    _fields_ = (
        ("key", _Segments),
        ("value", _Segments),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("mask_is_bool", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """`struct Attention` of cpu.h."""

    _fields_ = (
        ("parts", ctypes.POINTER(_Part)),
        ("query", ctypes.c_void_p),
        ("sink_logits", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("logarithms", ctypes.c_void_p),
        ("part_count", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("softcap", ctypes.c_float),
    )


def supports(query: Tensor, key: Segments, value: Segments) -> bool:
    """Whether the native path can take these: sizes and groups that vectors divide, dtypes that it knows."""
    return query.dtype in DTYPES and all(_fits(part) for part in parts_of(query, key, value, None))


def describe(key: Segments, value: Segments) -> str:
    """What `supports` looks at, for a warning."""
    codecs = [codec for tensor in (key, value) for held in _held(tensor.packed) for codec in _codecs(held)]
    pages = sorted({codec.page for codec in codecs})
    groups = sorted({codec.layout.group for codec in codecs if isinstance(codec, Packed)})
    runs = "values in channel runs, " if any(isinstance(held, Channels) for held in _held(value.packed)) else ""
    dtype = str(key.tail.dtype).removeprefix("torch.")
    return f"{runs}{dtype} pages of {pages}, heads of {key.shape[3]} in groups of {groups}"


def attend(
    library: ctypes.CDLL,
    query: Tensor,
    key: Segments,
    value: Segments,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.attend`, natively; the same arguments and result."""
    (batch, heads, queries, dim), value_dim = query.shape, value.tail.shape[3]
    scaled = (query.float() * scaling).contiguous()
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    parts = parts_of(query, key, value, mask)  # keeps what the call points to
    output = torch.empty(batch, heads, queries, value_dim)
    logarithms = torch.empty(batch, heads, queries)
    call = _Attention(
        parts=(_Part * len(parts))(*(_part(part, batch, heads, queries) for part in parts)),
        query=scaled.data_ptr(),
        output=output.data_ptr(),
        logarithms=logarithms.data_ptr(),
        part_count=len(parts),
        batch=batch,
        heads=heads,
        kv_heads=key.tail.shape[1],
        queries=queries,
        dim=dim,
        value_dim=value_dim,
        threads=torch.get_num_threads(),
        softcap=softcap or 0.0,
    )
    if sinks is not None:
        sinks = sinks.float().contiguous()
        call.sink_logits = sinks.data_ptr()
    library.kvmix_attend(ctypes.byref(call))
    return output.to(query.dtype), logarithms


def _fits(part: Part) -> bool:
    keys, values = _codecs(part.key.packed), _codecs(part.value.packed)
    if keys and values and (keys[0].page != values[0].page or part.key.sinks != part.value.sinks):
        return False  # tokens are split on the edges of pages of both
    return not isinstance(part.value.packed, Channels) and _is_readable(part.key) and _is_readable(part.value)


def _is_readable(tensor: Segments) -> bool:
    tail = tensor.tail
    return tail.shape[3] % WIDEST_VECTOR == 0 and _is_plain(tail) and all(map(_is_run, _codecs(tensor.packed)))


def _is_run(run: Packed | Plain) -> bool:
    if isinstance(run, Packed):
        return run.layout.group % WIDEST_VECTOR == 0
    return _is_plain(run.states) and run.states.stride(3) == run.page


def _is_plain(x: Tensor) -> bool:
    """Whether elements are in a row, and of a dtype that the native path knows."""
    return x.dtype in DTYPES and x.stride(-1) == 1


def _held(packed: Packed | Channels | Tiers | None) -> tuple[Packed | Channels | Tensor | None, ...]:
    """Every tier's tokens, or those of the only one."""
    return packed.held if isinstance(packed, Tiers) else (packed,)


def _codecs(held: Packed | Channels | Tiers | Tensor | None) -> tuple[Packed | Plain, ...]:
    """What pages are stored in."""
    if isinstance(held, Packed):
        return (held,)
    return held.runs if isinstance(held, Channels) else ()


def _part(part: Part, batch: int, heads: int, queries: int) -> _Part:
    tokens = part.key.shape[2]
    call = _Part(_segments(part.key), _segments(part.value), tokens=tokens)
    if part.mask is not None:
        call.mask, call.mask_is_bool = part.mask.data_ptr(), part.mask.dtype == torch.bool
        call.mask_strides = part.mask.expand(batch, heads, queries, tokens).stride()
    return call


def _segments(tensor: Segments) -> _Segments:
    tail, sink, packed = tensor.tail, tensor.sink, tensor.packed
    call = _Segments(
        tail=tail.data_ptr(),
        tail_strides=tail.stride()[:3],
        tail_tokens=tail.shape[2],
        dim=tail.shape[3],
        dtype=DTYPES[tail.dtype],
    )
    if sink is not None:
        call.sink, call.sink_strides, call.sinks = sink.data_ptr(), sink.stride()[:3], sink.shape[2]
    if runs := _codecs(packed):
        call.runs, call.run_count = (_Run * len(runs))(*map(_run, runs)), len(runs)
        call.pages, call.page = runs[0].pages, runs[0].page
    if isinstance(packed, Channels):
        call.order, call.order_strides = packed.order.data_ptr(), packed.order.stride()[:3]
        call.pages_per_order = packed.pages_per_order
    return call


def _run(run: Packed | Plain) -> _Run:
    if isinstance(run, Plain):
        return _Run(
            data=run.states.data_ptr(),
            data_strides=run.states.stride()[:3],
            bits=FULL_PRECISION_BITS,
            channels=run.width,
            dtype=DTYPES[run.states.dtype],
        )
    layout = run.layout
    return _Run(
        data=run.words.data_ptr(),
        scales=run.scales.data_ptr(),
        data_strides=run.words.stride()[:3],
        scales_strides=run.scales.stride()[:3],
        bits=layout.bits,
        channels=layout.head_dim,
        group=layout.group,
        dtype=DTYPES[run.scales.dtype],
    )
