"""Encode and pack tokens on a GPU: PyTorch's matrix product, and one Triton kernel for everything after it.

A program takes all directions of tokens `j * page / 8 + c` of a page, for every `j` and some `c`: whatever the width of
a plane, those are the tokens that share bytes. With planes of `b` bits, `j = e * b + d` is field `e` of byte
`d * page / 8 + c`. Sums are in another order than those of `naive.py`, so a code at a tie may differ from it.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import trial
from ..transform_layout import PLANES, TransformLayout
from . import naive
from .basis import TransformBasis
from .naive import SMALLEST_SCALE, EncodedPages

MOST_ELEMENTS = 8192
"""Elements in one program's tile; more would not fit the registers."""
MOST_DIRECTIONS = 256
MOST_DIFFERENT = 1e-3
"""Share of bytes that a trial allows to differ: those of codes at ties."""
KINDS = (4, 2, 1)
"""Bits of planes."""


class Directions(NamedTuple):
    """Directions of a KV head `[WIDTH]`: whether each exists, its deviation, its step, and the number of its codes."""

    exists: Any
    deviation: Any
    step: Any
    level: Any


def supports(pages: Tensor, basis: TransformBasis) -> bool:
    """Return whether the kernel takes these pages: in at most float32, of so many directions."""
    dtypes = torch.promote_types(pages.dtype, torch.float32), basis.mean.dtype
    return all(dtype == torch.float32 for dtype in dtypes) and basis.layout.head_dim <= MOST_DIRECTIONS


def encode(pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages as `naive.encode` does, but for ties; arguments and result are those."""
    layout = basis.layout
    z = naive.project(pages, basis, first_page).contiguous()
    shape, device = z.shape, z.device
    codes = torch.empty(shape[0], 1, shape[2], layout.page_bytes, dtype=torch.uint8, device=device)
    scales = torch.empty(shape[:4], dtype=torch.float16, device=device)
    errors = torch.empty(shape[:4], dtype=torch.float32, device=device)
    places, shifts = bit_planes_of(layout, device)
    width = triton.next_power_of_2(layout.head_dim)
    block = min(triton.next_power_of_2(layout.page // 8), max(1, MOST_ELEMENTS // (8 * width)))
    grid = (shape[0] * shape[1] * shape[2], triton.cdiv(layout.page // 8, block))
    if 0 not in grid:
        with torch.cuda.device_of(z):
            encode_kernel[grid](
                z,
                codes,
                scales,
                errors,
                basis.deviation.contiguous(),
                basis.steps.contiguous(),
                basis.levels.contiguous(),
                places,
                shifts,
                layout.kv_heads,
                shape[2],
                layout.page_bytes,
                PAGE=layout.page,
                HEAD_DIM=layout.head_dim,
                SCALED=layout.is_scaled,
                SMALLEST=SMALLEST_SCALE,
                BLOCK=block,
                WIDTH=width,
                enable_fp_fusion=False,
                num_warps=8 if 8 * block * width > MOST_ELEMENTS // 2 else 4,
            )
    return EncodedPages(codes, scales if layout.is_scaled else None, errors)


@functools.cache
def bit_planes_of(layout: TransformLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each direction's planes of 4, 2 and 1 bits are in a page, and the bits below, `[H_kv, 3, D]` int32.

    A direction without such a plane has a place below 0.
    """
    places, shifts = (torch.full((layout.kv_heads, len(KINDS), layout.head_dim), fill) for fill in (-1, 0))
    for head, widths in enumerate(layout.direction_widths):
        place = layout.head_offsets[head]
        for direction, width in enumerate(widths):
            below = 0
            for bits in PLANES[width]:
                places[head, KINDS.index(bits), direction] = place
                shifts[head, KINDS.index(bits), direction] = below
                place, below = place + layout.page * bits // 8, below + bits
    return places.int().to(device), shifts.int().to(device)


def is_trusted(device: torch.device, basis: TransformBasis, dtype: torch.dtype) -> bool:
    """Return whether the kernel packs such pages right, as far as a trial can tell; if not, one warning names it."""
    layout = basis.layout
    return not trial.is_due() or passes(device, layout.kind, layout.head_dim, layout.page, dtype)


@functools.cache
def passes(device: torch.device, kind: str, head_dim: int, page: int, dtype: torch.dtype) -> bool:
    """Return whether random pages are packed as `naive` packs them, but for ties; if not, one warning names it."""
    name = f"encoding {kind}s of {head_dim} directions in pages of {page} from {dtype}".replace("torch.", "")
    return trial.passes(name, functools.partial(_failure, device, kind, head_dim, page, dtype))


def _failure(device: torch.device, kind: str, head_dim: int, page: int, dtype: torch.dtype) -> str | None:
    draw = torch.Generator().manual_seed(trial.SEED)
    runs = -(-head_dim // 8)
    widths = tuple(tuple(max(0, most - run * 7 // runs) for run in range(runs)) for most in (6, 3))
    layout = TransformLayout("key" if kind == "key" else "value", widths, head_dim, page)
    encoder = torch.linalg.qr(torch.randn(2, head_dim, head_dim, generator=draw))[0]
    parts = encoder, encoder.mT.contiguous(), torch.zeros(2, head_dim), torch.ones(2, head_dim)
    there = [part.to(device) for part in parts]
    pages = torch.randn(1, 2, 2, page, head_dim, generator=draw).to(dtype)
    got = encode(pages.to(device), TransformBasis(layout, there[0], there[1], there[2], there[3]))
    expected = naive.encode(pages, TransformBasis(layout, parts[0], parts[1], parts[2], parts[3]))
    if (different := (got.codes.cpu() != expected.codes).float().mean().item()) > MOST_DIFFERENT:
        return f"{different:.2%} of its bytes differ from those of the definition"
    pairs = [(got.errors, expected.errors)]
    if got.scales is not None and expected.scales is not None:
        pairs.append((got.scales, expected.scales))
    if not all(torch.allclose(one.cpu().float(), other.float(), rtol=1e-2, atol=1e-2) for one, other in pairs):
        return "its scales or errors differ from those of the definition"
    return None


@triton.jit(do_not_specialize=["heads", "count", "page_bytes"])
def encode_kernel(
    z,
    codes,
    scales,
    errors,
    deviation,
    steps,
    levels,
    places,
    shifts,
    heads,
    count,
    page_bytes,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Encode some tokens of a page of a KV head."""
    EIGHTH: tl.constexpr = PAGE // 8
    page = tl.program_id(0).to(tl.int64)
    head = page // count % heads
    codes += (page // (heads * count) * count + page % count) * page_bytes
    direction = tl.arange(0, WIDTH)
    directions = load_directions(deviation, steps, levels, head, HEAD_DIM, WIDTH)

    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = within < EIGHTH
    token = tl.reshape(tl.arange(0, 8)[:, None] * EIGHTH + within[None, :], [8 * BLOCK])
    token_inside = tl.reshape((tl.arange(0, 8)[:, None] >= 0) & is_token[None, :], [8 * BLOCK])
    at = (page * PAGE + token)[:, None] * HEAD_DIM + direction[None, :]
    x = tl.load(z + at, mask=token_inside[:, None] & directions.exists[None, :], other=0.0)
    code, scale, decoded = code_tokens(x, directions, SCALED, SMALLEST)
    if SCALED:
        tl.store(scales + page * PAGE + token, scale, mask=token_inside)
    error = x - decoded
    tl.store(errors + page * PAGE + token, tl.sum(error * error, 1), mask=token_inside)

    fields = tl.reshape(code.to(tl.int32), [8, BLOCK, WIDTH])
    for kind in tl.static_range(3):
        store_planes(
            codes, fields, places + (head * 3 + kind) * HEAD_DIM + direction,
            shifts + (head * 3 + kind) * HEAD_DIM + direction, directions.exists, within, is_token, 4 >> kind, EIGHTH,
            BLOCK, WIDTH,
        )  # fmt: skip


@triton.jit
def load_directions(deviation, steps, levels, head, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load the directions of a KV head; those that do not exist have one code."""
    direction = tl.arange(0, WIDTH)
    exists = direction < HEAD_DIM
    at = head * HEAD_DIM + direction
    deviation = tl.load(deviation + at, mask=exists, other=1.0)
    step = tl.load(steps + at, mask=exists, other=0.0)
    return Directions(exists, deviation, step, tl.load(levels + at, mask=exists, other=1.0))


@triton.jit
def code_tokens(x, directions, SCALED: tl.constexpr, SMALLEST: tl.constexpr):
    """Code tokens in the basis `[N, WIDTH]`: return codes in float32, scales `[N]` float16, and what they stand for."""
    TOKENS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    level, step = directions.level, directions.step
    deviation = tl.broadcast_to(directions.deviation[None, :], [TOKENS, WIDTH])
    is_coded = (level > 1.5) & directions.exists
    unit_step = tl.where(is_coded, tl.div_rn(step, directions.deviation), 1.0)
    units = tl.div_rn(x, deviation)
    scaled = units
    scale = tl.full([TOKENS], 1.0, tl.float16)
    if SCALED:
        squares = tl.sum(tl.where(is_coded[None, :], units * units, 0.0), 1)
        coded = tl.maximum(tl.sum(is_coded.to(tl.float32), 0), 1.0)
        mean = tl.div_rn(squares, tl.full([TOKENS], 0.0, tl.float32) + coded)
        scale = tl.maximum(tl.sqrt_rn(mean), SMALLEST).to(tl.float16)
        scaled = tl.div_rn(units, tl.broadcast_to(scale.to(tl.float32)[:, None], [TOKENS, WIDTH]))
    ratio = tl.div_rn(scaled, tl.broadcast_to(unit_step[None, :], [TOKENS, WIDTH]))
    code = tl.floor(ratio + level[None, :] * 0.5)
    code = tl.minimum(tl.maximum(code, 0.0), level[None, :] - 1)
    decoded = (code - level[None, :] * 0.5 + 0.5) * step[None, :]
    if SCALED:
        values = tl.div_rn(decoded, deviation)
        factor = tl.sum(values * scaled, 1)
        factor = tl.div_rn(factor, tl.maximum(tl.sum(values * values, 1), 1e-6))
        scale = (scale.to(tl.float32) * factor).to(tl.float16)
        decoded = decoded * scale.to(tl.float32)[:, None]
    return code, scale, decoded


@triton.jit
def store_planes(
    codes,
    fields,
    places,
    shifts,
    is_direction,
    within,
    is_token,
    BITS: tl.constexpr,
    EIGHTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pack the planes of so many bits of codes `[8, BLOCK, WIDTH]`, and write them where a direction has one."""
    place = tl.load(places, mask=is_direction, other=-1)
    plane = (fields >> tl.load(shifts, mask=is_direction, other=0)[None, None, :]) & ((1 << BITS) - 1)
    plane = tl.reshape(plane, [8 // BITS, BITS, BLOCK, WIDTH])
    packed = tl.sum(plane << (tl.arange(0, 8 // BITS) * BITS)[:, None, None, None], 0).to(tl.uint8)
    byte = (tl.arange(0, BITS) * EIGHTH)[:, None, None] + within[None, :, None]
    inside = is_token[None, :, None] & (place >= 0)[None, None, :]
    tl.store(codes + (byte + place[None, None, :]), packed, mask=inside)
