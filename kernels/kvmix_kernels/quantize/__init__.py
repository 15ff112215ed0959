"""Quantize pages of keys or values into packed words and scales, and back.

`naive` is the definition, `cpu` the native path, `triton` that of GPUs.
"""

from __future__ import annotations

from torch import Tensor

from .. import gpu
from ..fallback import warn_once
from ..layout import PageLayout
from ..native import library
from . import cpu
from . import naive as _naive
from .naive import decode, dequantize, encode, pack, unpack

__all__ = ["decode", "dequantize", "encode", "pack", "quantize", "unpack"]


def quantize(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Quantize and pack whole pages; see `naive.quantize` for arguments, result and errors."""
    if pages.device.type == "cpu" and cpu.is_batch(pages, layout):
        native = library()
        if native is not None and cpu.supports(layout):
            return cpu.quantize(native, pages, layout)
        if native is not None:
            warn_once(f"quantizing groups of {layout.group} has no CPU kernel; falling back to slow PyTorch")
    if gpu.is_usable(pages.device):
        from . import triton

        if triton.supports(pages, layout):
            return triton.quantize(pages, layout)
        warn_once(f"quantizing {triton.describe(pages, layout)} has no GPU kernel; falling back to slow PyTorch")
    return _naive.quantize(pages, layout)
