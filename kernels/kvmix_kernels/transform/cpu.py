"""Encoding on a CPU: projection by PyTorch, all that follows by the native library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..runtime.native.structs import CEncoding
from .basis import TransformBasis
from .naive import EncodedPages, project


def encode(library: ctypes.CDLL, pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages; see `naive.encode` for arguments and result."""
    layout = basis.layout
    z = project(pages, basis, first_page).float().contiguous()
    codes = torch.empty(z.shape[0], 1, z.shape[2], layout.page_bytes, dtype=torch.uint8)
    scales = torch.empty(z.shape[:4], dtype=torch.float16) if layout.is_scaled else None
    errors = torch.empty(z.shape[:4])
    widths, places = basis.widths.to(torch.uint8), torch.tensor(layout.head_offsets)
    deviation, steps = basis.deviation.float().contiguous(), basis.steps.float().contiguous()
    call = CEncoding(
        z=z.data_ptr(),
        codes=codes.data_ptr(),
        errors=errors.data_ptr(),
        widths=widths.data_ptr(),
        places=places.data_ptr(),
        deviation=deviation.data_ptr(),
        steps=steps.data_ptr(),
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
