"""Quantize pages of keys or values into packed words and scales, and back.

`naive` is the definition, `cpu` the native path, `triton` the path of GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Encoder, PageLayout
from ..runtime import gpu
from ..runtime.fallback import warn_once
from ..runtime.native import library
from . import cpu
from . import naive as _naive
from .naive import decode, dequantize, encode, pack, unpack

__all__ = ["decode", "dequantize", "encode", "pack", "quantize", "quantize_into", "unpack"]


def quantize(pages: Tensor, layout: PageLayout, encoder: Encoder = "minmax") -> tuple[Tensor, Tensor]:
    """Quantize and pack whole pages; see `naive.quantize` for arguments, result and errors."""
    if pages.device.type == "cpu" and cpu.is_batch(pages, layout):
        native = library()
        if native is not None and cpu.supports(layout, encoder):
            return cpu.quantize(native, pages, layout, encoder)
        if native is not None:
            warn_once(f"quantizing groups of {layout.group} has no CPU kernel; falling back to slow PyTorch")
    if _has_gpu_kernel(pages, layout, encoder):
        from . import triton

        return triton.quantize(pages, layout, encoder)
    return _naive.quantize(pages, layout, encoder)


def quantize_into(
    pages: Tensor, layout: PageLayout, words: Tensor, scales: Tensor, encoder: Encoder = "minmax"
) -> None:
    """Quantize and pack whole pages to where they stay, on a GPU without memory or copies in between.

    Args:
        pages: `[..., page, head_dim]`, any floating dtype.
        layout: shape and codec of a page.
        words: `[..., *layout.words_shape]` int16, a view of something longer.
        scales: `[..., *layout.scales_shape]` in the scale dtype, a view of something longer.
        encoder: how scale and zero are chosen, see `naive.quantize`.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or for an unknown encoder.
    """
    _check_room(pages, layout, words, scales)
    if _has_gpu_kernel(pages, layout, encoder):
        from . import triton

        if triton.has_whole_pages(words, scales, layout):
            triton.quantize_into(pages, layout, words, scales, encoder)
            return
    for room, made in zip((words, scales), quantize(pages, layout, encoder), strict=True):
        room.copy_(made)


def _check_room(pages: Tensor, layout: PageLayout, words: Tensor, scales: Tensor) -> None:
    """Raise ValueError unless packed pages have the shapes and dtypes of their place."""
    for name, room, shape, dtype in (
        ("words", words, layout.words_shape, torch.int16),
        ("scales", scales, layout.scales_shape, getattr(torch, layout.scale_dtype)),
    ):
        expected = [*pages.shape[:-2], *shape]
        if list(room.shape) != expected or room.dtype != dtype:
            raise ValueError(f"expected {name} {expected} {dtype}, got {list(room.shape)} {room.dtype}")


def _has_gpu_kernel(pages: Tensor, layout: PageLayout, encoder: Encoder) -> bool:
    if not gpu.is_usable(pages.device):
        return False
    from . import triton

    if triton.supports(pages, layout):
        return triton.is_trusted(pages.device, layout, pages.dtype, encoder)
    warn_once(f"quantizing {triton.describe(pages, layout)} has no GPU kernel; falling back to slow PyTorch")
    return False
