"""The transform codec: tokens in the directions of the loss's own metric, each at its own width.

`naive` is the definition of encoding and decoding, `triton` the path of GPUs; see docs/transform-coding.md for the
mathematics.
"""

from __future__ import annotations

from torch import Tensor

from ..runtime import gpu
from . import naive
from .basis import Frames, TransformBasis
from .naive import EncodedPages, decode

__all__ = ["EncodedPages", "Frames", "TransformBasis", "decode", "encode"]


def encode(pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages; see `naive.encode` for arguments, result and errors."""
    if gpu.is_usable(pages.device):
        from . import triton

        if triton.supports(pages, basis) and triton.is_trusted(pages.device, basis, pages.dtype):
            return triton.encode(pages, basis, first_page)
    return naive.encode(pages, basis, first_page)
