"""Quantize and pack pages on a GPU: the Triton kernel, its launch, and the trial that it passes before it is used.

Pages are read once, and words and scales are written where they stay. A program takes one group of columns and all
sixteen *sixteenths* of some rows: row `j * rows / 16 + c` for every `j`. Whatever the bits, those are the rows that
share words: with `E = 16 / bits` fields, `j = e * bits + d` is field `e` of word row `d * rows / 16 + c`.
The encoders that fit a grid to its codes are in `triton_grids.py`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import WORD_BITS, Encoder, PageLayout
from ..runtime import trial
from ..runtime.triton_numbers import round_to, to_float32
from . import grids, naive
from .triton_grids import codes_of, fitted, stored

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ELEMENTS = 8192
"""Elements in one program's tile; more would not fit the registers."""
MOST_FITTED_ELEMENTS = 4096
"""The same for encoders that fit a grid, which keep more of each element."""
WIDEST_GROUP = 1024


def supports(pages: Tensor, layout: PageLayout) -> bool:
    """Return whether the kernel takes these pages: `[B, H_kv, pages, page, head_dim]`, with groups that fit a tile."""
    fits = pages.ndim == 5 and tuple(pages.shape[3:]) == (layout.page, layout.head_dim)
    return fits and pages.dtype in DTYPES and layout.group <= WIDEST_GROUP


def has_whole_pages(words: Tensor, scales: Tensor, layout: PageLayout) -> bool:
    """Return whether every page is contiguous in both."""
    of_scales = (layout.groups * layout.rows, layout.rows, 1)
    return words.stride()[3:] == (layout.columns, 1) and scales.stride()[3:] == of_scales


def describe(pages: Tensor, layout: PageLayout) -> str:
    """Return what `supports` checks, for a warning."""
    return f"{pages.dtype} pages {list(pages.shape)} in groups of {layout.group}".replace("torch.", "")


def quantize(pages: Tensor, layout: PageLayout, encoder: Encoder = "minmax") -> tuple[Tensor, Tensor]:
    """Quantize `[B, H_kv, pages, page, head_dim]` of any strides to the words and scales of `naive`, bit for bit."""
    scale_dtype = getattr(torch, layout.scale_dtype)
    words = torch.empty(*pages.shape[:3], *layout.words_shape, dtype=torch.int16, device=pages.device)
    scales = torch.empty(*pages.shape[:3], *layout.scales_shape, dtype=scale_dtype, device=pages.device)
    quantize_into(pages, layout, words, scales, encoder)
    return words, scales


def quantize_into(
    pages: Tensor, layout: PageLayout, words: Tensor, scales: Tensor, encoder: Encoder = "minmax"
) -> None:
    """Quantize pages to where they stay: `words` and `scales` may be slices of a longer cache along their third axis.

    Args:
        pages: `[B, H_kv, pages, page, head_dim]`, any strides.
        words: `[B, H_kv, pages, *layout.words_shape]` int16, every page contiguous.
        scales: `[B, H_kv, pages, *layout.scales_shape]` in the scale dtype, every page contiguous.
    """
    batch, heads, count = pages.shape[:3]
    block_columns = triton.next_power_of_2(layout.group)
    block_rows = triton.next_power_of_2(layout.rows // WORD_BITS)
    most = MOST_ELEMENTS if encoder == "minmax" else MOST_FITTED_ELEMENTS
    block_rows = max(1, min(block_rows, most // (WORD_BITS * block_columns)))
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
            TINY_SCALE=grids.TINY_SCALE,
            ENCODER=encoder,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            enable_fp_fusion=False,
            num_warps=8 if WORD_BITS * block_rows * block_columns > most // 2 else 4,
        )


def is_trusted(device: torch.device, layout: PageLayout, dtype: torch.dtype, encoder: Encoder = "minmax") -> bool:
    """Return whether the kernel packs this layout right, as far as trials can tell; if not, one warning names it.

    The first call on a device tries a handful of layouts before this one. If one of them fails, the kernel is not
    used on that device at all.
    """
    return not trial.is_due() or (passes_first(device) and passes(device, layout, dtype, encoder))


def passes_first(device: torch.device) -> bool:
    """Return whether a handful of layouts come out right, which are tried before anything else on a device."""
    return all(passes(device, layout, torch.float32, "minmax") for layout in first_layouts())


def first_layouts() -> list[PageLayout]:
    """Return the layouts that are tried before anything else on a device."""
    return [PageLayout("key", 2, 64, 64, 32), PageLayout("value", 3, 64, 64, 24)]


@functools.cache
def passes(device: torch.device, layout: PageLayout, dtype: torch.dtype, encoder: Encoder) -> bool:
    """Return whether random pages are packed bit for bit as `naive` packs them; if not, one warning names it."""
    name = f"quantizing {layout.kind}s to {layout.bits} bits in groups of {layout.group} from {dtype}"
    name = name.replace("torch.", "") + ("" if encoder == "minmax" else f" by {encoder}")
    return trial.passes(name, functools.partial(_failure, device, layout, dtype, encoder))


def _failure(device: torch.device, layout: PageLayout, dtype: torch.dtype, encoder: Encoder) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)
    pages = torch.randn(1, 2, 2, layout.page, layout.head_dim, generator=generator)
    pages = pages.mul(torch.tensor([1e-7, 1.0]).view(1, 2, 1, 1, 1)).to(dtype)  # scales that are subnormal, and not
    expected = naive.quantize(pages, layout, encoder)
    got = quantize(pages.to(device), layout, encoder)
    for name, one, other in zip(("words", "scales"), got, expected, strict=True):
        if not torch.equal(one.cpu().view(torch.int16), other.view(torch.int16)):
            return f"its {name} differ from those of the definition"
    return None


@triton.jit(do_not_specialize=["heads", "count"])
def quantize_kernel(
    pages,
    words,
    scales,
    heads,
    count,
    pages_batch,
    pages_head,
    pages_page,
    pages_row,
    pages_column,
    words_batch,
    words_head,
    words_page,
    scales_batch,
    scales_head,
    scales_page,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TINY_SCALE: tl.constexpr,
    ENCODER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    SIXTEENTH: tl.constexpr = ROWS // 16
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    LEVELS: tl.constexpr = (1 << BITS) - 1
    page = tl.program_id(0).to(tl.int64)
    batch, head, page = page // (heads * count), page // count % heads, page % count
    pages += batch * pages_batch + head * pages_head + page * pages_page
    words += batch * words_batch + head * words_head + page * words_page
    scales += batch * scales_batch + head * scales_head + page * scales_page

    group = tl.program_id(1)
    within = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.arange(0, 16)[:, None] * SIXTEENTH + within[None, :]
    column = group * GROUP + tl.arange(0, BLOCK_COLUMNS)
    is_row = within < SIXTEENTH
    is_column = (tl.arange(0, BLOCK_COLUMNS) < GROUP) & (column < COLUMNS)
    inside = is_row[None, :, None] & is_column[None, None, :]
    at = row[:, :, None].to(tl.int64) * pages_row + column[None, None, :].to(tl.int64) * pages_column
    x = to_float32(tl.load(pages + at, mask=inside, other=0.0))

    is_nan = tl.max((x != x).to(tl.int32), 2) > 0  # which minimum and maximum pass over
    low = tl.min(tl.where(is_column[None, None, :], x, float("inf")), 2)
    low = tl.where(is_nan, float("nan"), low + 0.0)  # of 0 and -0 either may be the minimum: make it 0
    high = tl.max(tl.where(is_column[None, None, :], x, float("-inf")), 2)
    scale, zero = stored(tl.div_rn(high - low, LEVELS * 1.0), low, scales.dtype.element_ty, TINY_SCALE)
    if ENCODER != "minmax":
        scale, zero = fitted(
            x, is_column[None, None, :], low, high, scale, zero, LEVELS, scales.dtype.element_ty, TINY_SCALE, ENCODER
        )
    tl.store(scales + group * ROWS + row, round_to(scale, scales.dtype.element_ty), mask=is_row[None, :])
    tl.store(scales + (GROUPS + group) * ROWS + row, round_to(zero, scales.dtype.element_ty), mask=is_row[None, :])
    code = codes_of(x, scale, zero, LEVELS)

    to = words + within[None, :, None] * COLUMNS + column[None, None, :]
    if BITS == 3:
        _store_plane(to, code & 3, inside, 2, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        to += 2 * SIXTEENTH * COLUMNS
        _store_plane(to, code >> 2, inside, 1, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        _store_plane(to, code, inside, BITS, SIXTEENTH, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _store_plane(
    to,
    code,
    inside,
    WIDTH: tl.constexpr,
    SIXTEENTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Pack codes `[16, rows, columns]` of `WIDTH` bits into words `[WIDTH, rows, columns]`, and write those."""
    FIELDS: tl.constexpr = 16 // WIDTH
    field = tl.reshape(code, [FIELDS, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS])
    word = tl.sum(field << (tl.arange(0, FIELDS) * WIDTH)[:, None, None, None], 0).to(tl.int16)
    tl.store(to + (tl.arange(0, WIDTH) * SIXTEENTH * COLUMNS)[:, None, None], word, mask=inside)
