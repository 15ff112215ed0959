"""Quantize and pack pages on a CPU through the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..layout import Encoder, PageLayout
from ..runtime.native.structs import DTYPES, ENCODER_NUMBERS, WIDEST_VECTOR, CQuantization

WIDEST_FITTED_GROUP = 2**15
"""Elements whose squared 8-bit codes still have a sum of 31 bits."""


def is_batch(pages: Tensor, layout: PageLayout) -> bool:
    """Return whether these are `[B, H_kv, pages, page, head_dim]` in a dtype and order that the native path reads."""
    fits = tuple(pages.shape[-2:]) == (layout.page, layout.head_dim)
    return fits and pages.ndim == 5 and pages.stride(4) == 1 and pages.dtype in DTYPES


def supports(layout: PageLayout, encoder: Encoder = "minmax") -> bool:
    """Return whether groups are whole vectors, and not too long for sums of their codes."""
    return layout.group % WIDEST_VECTOR == 0 and (encoder == "minmax" or layout.group <= WIDEST_FITTED_GROUP)


def quantize(
    library: ctypes.CDLL, pages: Tensor, layout: PageLayout, encoder: Encoder = "minmax"
) -> tuple[Tensor, Tensor]:
    """Quantize `[B, H_kv, pages, page, head_dim]` to the words and scales of `naive`, bit for bit."""
    scale_dtype = getattr(torch, layout.scale_dtype)
    words = torch.empty(*pages.shape[:3], *layout.words_shape, dtype=torch.int16)
    scales = torch.empty(*pages.shape[:3], *layout.scales_shape, dtype=scale_dtype)
    call = CQuantization(
        pages=pages.data_ptr(),
        words=words.data_ptr(),
        scales=scales.data_ptr(),
        pages_strides=(ctypes.c_int64 * 4)(*pages.stride()[:4]),
        words_strides=(ctypes.c_int64 * 3)(*words.stride()[:3]),
        scales_strides=(ctypes.c_int64 * 3)(*scales.stride()[:3]),
        batch=pages.shape[0],
        heads=pages.shape[1],
        count=pages.shape[2],
        page=layout.page,
        dim=layout.head_dim,
        is_key=layout.kind == "key",
        bits=layout.bits,
        group=layout.group,
        groups=layout.groups,
        dtype=DTYPES[pages.dtype],
        scale_dtype=DTYPES[scale_dtype],
        encoder=ENCODER_NUMBERS[encoder],
        threads=torch.get_num_threads(),
    )
    library.kvmix_quantize(ctypes.byref(call))
    return words, scales
