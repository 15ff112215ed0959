"""Encoding on a CPU by the native library (`cpu.cpp`): of single tokens all, of pages all but the projection."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..runtime.native.structs import DTYPES, CCoding, CEncoding
from .basis import TransformBasis
from .naive import EncodedPages, project

LANES = 16
"""Directions of whole vectors, on every instruction set."""


def encode(library: ctypes.CDLL, pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages; see `naive.encode` for arguments and result."""
    layout = basis.layout
    z = project(pages, basis, first_page).float().contiguous()
    codes = torch.empty(z.shape[0], 1, z.shape[2], layout.page_bytes, dtype=torch.uint8)
    scales = torch.empty(z.shape[:4], dtype=torch.float16) if layout.is_scaled else None
    errors = torch.empty(z.shape[:4])
    arrays = basis.arrays
    call = CEncoding(
        z=z.data_ptr(),
        codes=codes.data_ptr(),
        errors=errors.data_ptr(),
        widths=arrays.widths.data_ptr(),
        places=arrays.places.data_ptr(),
        deviation=arrays.deviation.data_ptr(),
        steps=arrays.steps.data_ptr(),
        batch=z.shape[0],
        heads=z.shape[1],
        count=z.shape[2],
        page=layout.page,
        dim=layout.head_dim,
        page_bytes=layout.page_bytes,
        threads=torch.get_num_threads(),
    )
    if scales is not None:
        call.scales = scales.data_ptr()
    library.kvmix_encode(ctypes.byref(call))
    return EncodedPages(codes, scales, errors)


def takes(states: Tensor, basis: TransformBasis) -> bool:
    """Return whether `code` takes tokens of this dtype and size."""
    is_known = states.dtype in DTYPES and basis.encoder.dtype == torch.float32
    return states.device.type == "cpu" and is_known and basis.layout.head_dim % LANES == 0


def code(
    library: ctypes.CDLL, states: Tensor, basis: TransformBasis, frames: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the codes of single tokens, and their scales, as `naive.code` does of tokens in the basis.

    Args:
        library: the native library.
        states: `[n, H_kv, D]` that `takes` accepts.
        basis: directions and widths.
        frames: `[n]` int64, which keys are turned to; None where nothing is turned.

    Returns:
        Codes `[n, H_kv, D]` uint8 and, of values, scales `[n, H_kv]` float16.
    """
    states = states if states.stride(-1) == 1 else states.contiguous()
    codes = torch.empty(states.shape, dtype=torch.uint8)
    scales = torch.empty(states.shape[:2], dtype=torch.float16) if basis.layout.is_scaled else None
    arrays = basis.arrays
    call = CCoding(
        states=states.data_ptr(),
        encoder=arrays.encoder.data_ptr(),
        mean=arrays.mean.data_ptr(),
        deviation=arrays.deviation.data_ptr(),
        steps=arrays.steps.data_ptr(),
        widths=arrays.widths.data_ptr(),
        codes=codes.data_ptr(),
        states_strides=states.stride()[:2],
        tokens=states.shape[0],
        heads=states.shape[1],
        dim=states.shape[2],
        dtype=DTYPES[states.dtype],
        threads=torch.get_num_threads(),
    )
    if scales is not None:
        call.scales = scales.data_ptr()
    of_keys = basis.frames
    if frames is not None and of_keys is not None and of_keys.length is not None:
        frames, frequencies = frames.contiguous(), of_keys.frequencies.double().contiguous()
        call.frames, call.frequencies = frames.data_ptr(), frequencies.data_ptr()
        call.pairs, call.first, call.frame = len(frequencies), of_keys.start, of_keys.length
        call.interleaved = of_keys.interleaved
    library.kvmix_code(ctypes.byref(call))
    return codes, scales
