"""Attention on a CPU through the native library: prepares the arguments of `cpu.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..layout import FULL_PRECISION_BITS
from ..native import DTYPES, WIDEST_VECTOR
from ..pages import Packed
from ..segments import Segments

_Strides = ctypes.c_int64 * 3


class _Segments(ctypes.Structure):
    """`struct Segments` of cpu.h."""

    _fields_ = (
        ("sink", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("sink_strides", _Strides),
        ("words_strides", _Strides),
        ("scales_strides", _Strides),
        ("tail_strides", _Strides),
        ("sinks", ctypes.c_int64),
        ("pages", ctypes.c_int64),
        ("tail_tokens", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """`struct Attention` of cpu.h."""

    _fields_ = (
        ("key", _Segments),
        ("value", _Segments),
        ("query", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("mask_is_bool", ctypes.c_int64),
        ("sink_logits", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("logarithms", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("softcap", ctypes.c_float),
    )


def supports(query: Tensor, *tensors: Segments) -> bool:
    """Whether the native path can take these: sizes and groups that vectors divide, a dtype that it knows."""
    return query.dtype in DTYPES and all(_fits(tensor) for tensor in tensors)


def describe(*tensors: Segments) -> str:
    """What `supports` looks at, for a warning."""
    groups = sorted({x.packed.layout.group for x in tensors if isinstance(x.packed, Packed)})
    return f"{tensors[0].tail.dtype} heads of {tensors[0].shape[3]} in groups of {groups}".replace("torch.", "")


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
    batch, heads, queries, _ = query.shape
    scaled = (query.float() * scaling).contiguous()
    output = torch.empty(batch, heads, queries, value.shape[3])
    logarithms = torch.empty(batch, heads, queries)
    call = _Attention(
        key=_segments(key),
        value=_segments(value),
        query=scaled.data_ptr(),
        output=output.data_ptr(),
        logarithms=logarithms.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        queries=queries,
        tokens=key.shape[2],
        threads=torch.get_num_threads(),
        softcap=softcap or 0.0,
    )
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        wide = mask.expand(batch, heads, queries, key.shape[2])
        call.mask, call.mask_strides = mask.data_ptr(), (ctypes.c_int64 * 4)(*wide.stride())
        call.mask_is_bool = mask.dtype == torch.bool
    if sinks is not None:
        sinks = sinks.float().contiguous()
        call.sink_logits = sinks.data_ptr()
    library.kvmix_attend(ctypes.byref(call))
    return output.to(query.dtype), logarithms


def _fits(tensor: Segments) -> bool:
    if tensor.shape[3] % WIDEST_VECTOR or tensor.tail.dtype not in DTYPES or tensor.tail.stride(3) != 1:
        return False
    if tensor.packed is None:
        return True
    return isinstance(tensor.packed, Packed) and tensor.packed.layout.group % WIDEST_VECTOR == 0


def _segments(tensor: Segments) -> _Segments:
    tail, sink, packed = tensor.tail, tensor.sink, tensor.packed
    call = _Segments(
        tail=tail.data_ptr(),
        tail_strides=_Strides(*tail.stride()[:3]),
        sinks=tensor.sinks,
        tail_tokens=tail.shape[2],
        dim=tail.shape[3],
        dtype=DTYPES[tail.dtype],
        bits=FULL_PRECISION_BITS,
        page=1,
    )
    if sink is not None:
        call.sink, call.sink_strides = sink.data_ptr(), _Strides(*sink.stride()[:3])
    if isinstance(packed, Packed):
        layout = packed.layout
        call.words, call.words_strides = packed.words.data_ptr(), _Strides(*packed.words.stride()[:3])
        call.scales, call.scales_strides = packed.scales.data_ptr(), _Strides(*packed.scales.stride()[:3])
        call.pages, call.bits, call.page = packed.pages, layout.bits, layout.page
        call.group, call.groups = layout.group, layout.groups
        call.scale_dtype = DTYPES[packed.scales.dtype]
    return call
