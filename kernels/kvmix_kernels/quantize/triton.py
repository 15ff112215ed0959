"""Quantize and pack on a GPU: prepares the arguments of `triton_kernel.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..layout import WORD_BITS, PageLayout
from .naive import TINY_SCALE
from .triton_kernel import quantize_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ELEMENTS = 8192
"""In one program's tile; more would not fit the registers."""
WIDEST_GROUP = 1024


def supports(pages: Tensor, layout: PageLayout) -> bool:
    """Whether the kernel can take these: `[B, H_kv, pages, page, head_dim]`, with groups that one tile holds."""
    fits = pages.ndim == 5 and tuple(pages.shape[3:]) == (layout.page, layout.head_dim)
    return fits and pages.dtype in DTYPES and layout.group <= WIDEST_GROUP


def has_whole_pages(words: Tensor, scales: Tensor, layout: PageLayout) -> bool:
    """Whether every page is contiguous in both."""
    of_scales = (layout.groups * layout.rows, layout.rows, 1)
    return words.stride()[3:] == (layout.columns, 1) and scales.stride()[3:] == of_scales


def describe(pages: Tensor, layout: PageLayout) -> str:
    """What `supports` looks at, for a warning."""
    return f"{pages.dtype} pages {list(pages.shape)} in groups of {layout.group}".replace("torch.", "")


def quantize(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """`naive.quantize` for `[B, H_kv, pages, page, head_dim]`, any strides; the same words and scales, bit for bit."""
    scale_dtype = getattr(torch, layout.scale_dtype)
    words = torch.empty(*pages.shape[:3], *layout.words_shape, dtype=torch.int16, device=pages.device)
    scales = torch.empty(*pages.shape[:3], *layout.scales_shape, dtype=scale_dtype, device=pages.device)
    quantize_into(pages, layout, words, scales)
    return words, scales


def quantize_into(pages: Tensor, layout: PageLayout, words: Tensor, scales: Tensor) -> None:
    """Quantize pages to where they stay: `words` and `scales` may be slices of a longer cache along their third axis.

    Args:
        pages: `[B, H_kv, pages, page, head_dim]`, any strides.
        words: `[B, H_kv, pages, *layout.words_shape]` int16, every page contiguous.
        scales: `[B, H_kv, pages, *layout.scales_shape]` in the scale dtype, every page contiguous.
    """
    batch, heads, count = pages.shape[:3]
    block_columns = triton.next_power_of_2(layout.group)
    block_rows = triton.next_power_of_2(layout.rows // WORD_BITS)
    block_rows = max(1, min(block_rows, MOST_ELEMENTS // (WORD_BITS * block_columns)))
    token, channel = pages.stride()[3:]
    grid = (batch * heads * count, layout.groups, triton.cdiv(layout.rows // WORD_BITS, block_rows))
    if 0 in grid:
        return
    with torch.cuda.device_of(pages):
        quantize_kernel[grid](
            pages,
            words,
            scales,
            heads,
            count,
            *pages.stride()[:3],
            *((channel, token) if layout.kind == "key" else (token, channel)),
            *words.stride()[:3],
            *scales.stride()[:3],
            ROWS=layout.rows,
            COLUMNS=layout.columns,
            BITS=layout.bits,
            GROUP=layout.group,
            TINY_SCALE=TINY_SCALE,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=8 if WORD_BITS * block_rows * block_columns > MOST_ELEMENTS // 2 else 4,
        )
