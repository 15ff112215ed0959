"""Encoding on a CPU: projection by PyTorch, all that follows by the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.native.structs import CEncoding
from .basis import TransformBasis
from .naive import EncodedPages, project

LANES = 16
"""Tokens of a whole vector, on every instruction set."""


def encode(library: ctypes.CDLL, pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages; see `naive.encode` for arguments and result."""
    layout = basis.layout
    z = project(pages, basis, first_page).float().contiguous()
    codes = torch.empty(z.shape[0], 1, z.shape[2], layout.page_bytes, dtype=torch.uint8)
    scales, errors = _run(library, z, basis, codes=codes)
    return EncodedPages(codes, scales, errors)


def code(library: ctypes.CDLL, z: Tensor, basis: TransformBasis) -> tuple[Tensor, Tensor | None]:
    """Return the codes of tokens in the basis, and their scales, as `naive.code` does.

    Args:
        library: the native library.
        z: `[H_kv, n, D]` float32.
        basis: directions and widths.

    Returns:
        Codes `[H_kv, n, D]` uint8 and, of values, scales `[H_kv, n]` float16.
    """
    count = z.shape[1]
    page = pad(z, (0, 0, 0, -count % LANES))[None, :, None].contiguous()
    codes = torch.empty(page.shape, dtype=torch.uint8)
    scales, _ = _run(library, page, basis, unpacked=codes)
    return codes[0, :, 0, :count], None if scales is None else scales[0, :, 0, :count]


def _run(
    library: ctypes.CDLL,
    z: Tensor,
    basis: TransformBasis,
    codes: Tensor | None = None,
    unpacked: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Write the codes of pages `[B, H_kv, pages, page, D]` in the basis, and return scales and errors of tokens."""
    layout = basis.layout
    scales = torch.empty(z.shape[:4], dtype=torch.float16) if layout.is_scaled else None
    errors = torch.empty(z.shape[:4])
    widths, places, deviation, steps = basis.arrays
    call = CEncoding(
        z=z.data_ptr(),
        errors=errors.data_ptr(),
        widths=widths.data_ptr(),
        places=places.data_ptr(),
        deviation=deviation.data_ptr(),
        steps=steps.data_ptr(),
        batch=z.shape[0],
        heads=z.shape[1],
        count=z.shape[2],
        page=z.shape[3],
        dim=layout.head_dim,
        page_bytes=layout.page_bytes,
        threads=torch.get_num_threads(),
    )
    if codes is not None:
        call.codes = codes.data_ptr()
    if unpacked is not None:
        call.bytes = unpacked.data_ptr()
    if scales is not None:
        call.scales = scales.data_ptr()
    library.kvmix_encode(ctypes.byref(call))
    return scales, errors
