"""The transform codec: tokens in the directions of the loss's own metric, each at its own width.

`naive` is the definition of encoding and decoding, `cpu` the native path, `triton` the path of GPUs;
docs/transform-coding.md has the mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import gpu
from ..runtime.native import library
from . import cpu, naive
from .basis import Frames, TransformBasis, rotate
from .naive import EncodedPages, decode

__all__ = ["EncodedPages", "Frames", "TransformBasis", "decode", "encode", "rotate"]


def encode(pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages; see `naive.encode` for arguments, result and errors."""
    naive.check(pages, basis)
    is_wide = torch.float64 in (pages.dtype, basis.mean.dtype)
    native = library() if pages.device.type == "cpu" and not is_wide else None
    if native is not None:
        return cpu.encode(native, pages, basis, first_page)
    if gpu.is_usable(pages.device) and not is_wide:
        from . import triton

        if triton.supports(pages, basis) and triton.is_trusted(pages.device, basis, pages.dtype):
            return triton.encode(pages, basis, first_page)
    return naive.encode(pages, basis, first_page)
