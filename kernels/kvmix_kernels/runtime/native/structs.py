"""The C structs that the native library takes, mirrored in ctypes, and the check that both sides agree.

Class `CRun` mirrors `struct Run`, and so on: the same fields in the same order. What the fields mean is said in
`attend/cpu.h`, `attend/choice.h`, `blocks/cpu.h`, `quantize/cpu.h` and `transform/cpu.h`.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from ...layout import Encoder

WIDEST_VECTOR: Final = 16
"""Lanes of the widest instruction set: rows and groups must be a multiple of it."""
DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`enum Dtype` of simd.h."""
ENCODER_NUMBERS: Final[dict[Encoder, int]] = {"minmax": 0, "refit": 1, "search": 2}
"""`enum Encoder` of quantize/cpu.h."""
SHARINGS: Final = {"max": 0, "sum": 1, "layer": 2}
"""`enum Sharing` of attend/choice.h."""
FORMS: Final = {"direction": 0, "key": 1, "value": 2}
"""`enum Form` of blocks/cpu.h."""

_Strides = ctypes.c_int64 * 3


class CRun(ctypes.Structure):
    """Channels that are stored alike, in pages."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("data_strides", _Strides),
        ("scales_strides", _Strides),
        ("bits", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("by_token", ctypes.c_int64),
    )


class CCoded(ctypes.Structure):
    """Pages of transform codes, with the basis folded for attention."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("exact", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("decoding", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("middles", ctypes.c_void_p),
        ("turns", ctypes.c_void_p),
        ("codes_strides", ctypes.c_int64 * 2),
        ("scales_strides", _Strides),
        ("places_strides", ctypes.c_int64 * 2),
        ("exact_strides", _Strides),
        ("exact_tokens", ctypes.c_int64),
        ("exact_dtype", ctypes.c_int64),
        ("frame", ctypes.c_int64),
        ("pairs", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
    )


class CVectors(ctypes.Structure):
    """Pages of vector codes, with their codebooks."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("codes_strides", _Strides),
        ("scales_strides", _Strides),
        ("books_strides", ctypes.c_int64 * 2),
        ("width", ctypes.c_int64),
        ("span", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
    )


class CSegments(ctypes.Structure):
    """Keys or values: sink | packed pages | tail."""

    _fields_ = (
        ("sink", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("runs", ctypes.POINTER(CRun)),
        ("coded", ctypes.POINTER(CCoded)),
        ("vectors", ctypes.POINTER(CVectors)),
        ("order", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
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
        ("table_strides", ctypes.c_int64 * 2),
        ("is_choice", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class CPart(ctypes.Structure):
    """Some of the tokens, and the mask over them."""

    _fields_ = (
        ("key", CSegments),
        ("value", CSegments),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("mask_is_bool", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
    )


class CAttention(ctypes.Structure):
    """Everything that `kvmix_attend` takes."""

    _fields_ = (
        ("parts", ctypes.POINTER(CPart)),
        ("query", ctypes.c_void_p),
        ("sink_logits", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("logarithms", ctypes.c_void_p),
        ("query_strides", _Strides),
        ("dtype", ctypes.c_int64),
        ("part_count", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class CChoice(ctypes.Structure):
    """Everything that `kvmix_choose` takes."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 2),
        ("summary_strides", _Strides),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("pages", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("parts", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("query_dtype", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("sharing", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


class CQuantization(ctypes.Structure):
    """Everything that `kvmix_quantize` takes."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("pages_strides", ctypes.c_int64 * 4),
        ("words_strides", _Strides),
        ("scales_strides", _Strides),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("is_key", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
        ("encoder", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class CEncoding(ctypes.Structure):
    """Everything that `kvmix_encode` takes."""

    _fields_ = (
        ("z", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("deviation", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class CCoding(ctypes.Structure):
    """Everything that `kvmix_code` takes."""

    _fields_ = (
        ("states", ctypes.c_void_p),
        ("frames", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("encoder", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("deviation", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("states_strides", ctypes.c_int64 * 2),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("pairs", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("frame", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class CPlacement(ctypes.Structure):
    """Everything that `kvmix_place` takes."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("form", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class CStoring(ctypes.Structure):
    """Everything that `kvmix_store` takes."""

    _fields_ = (
        ("to", CPlacement),
        ("states", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("states_strides", ctypes.c_int64 * 2),
        ("scales_strides", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
    )


STRUCTS: Final = (
    CRun,
    CCoded,
    CVectors,
    CSegments,
    CPart,
    CAttention,
    CChoice,
    CQuantization,
    CEncoding,
    CCoding,
    CPlacement,
    CStoring,
)


def describe(struct: type[ctypes.Structure]) -> str:
    """Return a struct's line of `kvmix_structs`: `name bytes field:offset:bytes ...`."""
    fields = [(name, getattr(struct, name)) for name, *_ in struct._fields_]
    places = (f"{name}:{field.offset}:{field.size}" for name, field in fields)
    return " ".join([struct.__name__.removeprefix("C"), str(ctypes.sizeof(struct)), *places])


def mismatch(reported: str) -> str | None:
    """Return which struct the library lays out otherwise than its mirror, and how, or None if there is none.

    Args:
        reported: what the library's `kvmix_structs` returns, a line a struct.
    """
    lines = {line.split()[0]: line for line in reported.splitlines()}
    for struct in STRUCTS:
        name, ours = struct.__name__.removeprefix("C"), describe(struct)
        theirs = lines.get(name, f"{name} missing")
        if theirs != ours:
            pairs = zip(theirs.split()[1:], ours.split()[1:], strict=False)
            one, other = next((pair for pair in pairs if pair[0] != pair[1]), ("fewer fields", "more fields"))
            return f"struct {name} has {one} in C and {other} in {struct.__name__}"
    return None
