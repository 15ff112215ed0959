"""Definition of the transform codec, in plain PyTorch.

    z = encode (R y - mean)        u = clamp(floor(z / step + n / 2), 0, n - 1),  n = 2^width
    R y' = mean + decode z'        z' = (u - n / 2 + 1/2) step s

`R` turns a key to its frame. Steps are static; `s` is 1 for keys, and for values one float16 a token: the root mean
square of `z / deviation` over coded directions, then the least-squares factor of the codes that it gave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..transform_layout import PLANES
from .basis import TransformBasis

SMALLEST_SCALE = 1e-4


@dataclass(frozen=True, eq=False)
class EncodedPages:
    """Pages of transform codes.

    Attributes:
        codes: `[B, 1, pages, page_bytes]` uint8.
        scales: `[B, H_kv, pages, page]` float16, of values; None for keys.
        errors: `[B, H_kv, pages, page]`, squared error of each token in the metric.
    """

    codes: Tensor
    scales: Tensor | None
    errors: Tensor


def encode(pages: Tensor, basis: TransformBasis, first_page: int = 0) -> EncodedPages:
    """Encode and pack whole pages.

    Args:
        pages: `[B, H_kv, pages, page, D]`, any floating dtype; arithmetic is in float32, or float64 for float64.
        basis: directions and widths.
        first_page: index of the first of these pages in its sequence, which decides their frames.

    Raises:
        ValueError: if the pages do not have the layout's heads, tokens and channels.
    """
    check(pages, basis)
    codes, scales, errors = code(project(pages, basis, first_page), basis)
    return EncodedPages(pack(codes, basis), scales, errors)


def code(z: Tensor, basis: TransformBasis) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return codes `[B, H_kv, pages, page, D]` uint8, scales and errors of tokens that are in the basis.

    Scales and errors are those of `EncodedPages`. Every token stands alone, so that pages may be of any length.
    """
    units = z / basis.deviation[:, None, None]
    scales = None
    if basis.layout.is_scaled:
        scales = _scales(units, basis)
        units = units / scales.to(units.dtype)[..., None]
    codes = _codes(units, basis)
    if scales is not None:
        scales = _refined(units, codes, scales, basis)
    errors = (z - _values(codes, scales, basis)).square().sum(-1)
    return codes, scales, errors.float()


def check(pages: Tensor, basis: TransformBasis) -> None:
    """Raise ValueError if pages do not have the layout's heads, tokens and channels."""
    layout = basis.layout
    if (pages.shape[1], *pages.shape[3:]) != (layout.kv_heads, layout.page, layout.head_dim):
        expected = f"[B, {layout.kv_heads}, pages, {layout.page}, {layout.head_dim}]"
        raise ValueError(f"expected pages {expected}, got {list(pages.shape)}")


def project(pages: Tensor, basis: TransformBasis, first_page: int) -> Tensor:
    """Return pages `[B, H_kv, pages, page, D]` in the basis, turned to their frames first."""
    return project_tokens(pages, basis, basis.frames_of(first_page, pages.shape[2]))


def project_tokens(pages: Tensor, basis: TransformBasis, frames: Tensor | None) -> Tensor:
    """Return pages of any length in the basis, turned to `frames` `[pages]` first; None where nothing is turned."""
    states = pages.to(torch.promote_types(pages.dtype, torch.float32))
    if basis.frames is not None and frames is not None:
        states = basis.frames.turn(states, frames)
    return _times(states - basis.mean[:, None, None], basis.encoder)


def decode(
    codes: Tensor, scales: Tensor | None, basis: TransformBasis, first_page: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return pages `[B, H_kv, pages, page, D]` in `dtype`: what `encode` packed, up to its errors."""
    return states_of(unpack(codes, basis), scales, basis, basis.frames_of(first_page, codes.shape[2]), dtype)


def states_of(
    codes: Tensor, scales: Tensor | None, basis: TransformBasis, frames: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the tokens that codes `[B, H_kv, pages, page, D]` stand for, turned back from `frames` `[pages]`."""
    z = _values(codes, scales, basis)
    states = _times(z, basis.decoder) + basis.mean[:, None, None]
    if basis.frames is not None and frames is not None:
        states = basis.frames.turn(states, frames, back=True)
    return states.to(dtype)


def _times(tokens: Tensor, matrices: Tensor) -> Tensor:
    """Return matrices `[H_kv, D, D]` times tokens `[B, H_kv, pages, page, D]`, in one product a head."""
    product: Tensor = (tokens.flatten(2, 3) @ matrices.transpose(-1, -2)).unflatten(2, tokens.shape[2:4])
    return product


def pack(codes: Tensor, basis: TransformBasis) -> Tensor:
    """Pack codes `[B, H_kv, pages, page, D]` uint8 into bytes `[B, 1, pages, page_bytes]`."""
    rows = []
    for head, widths in enumerate(basis.layout.widths):
        fields = codes[:, head].transpose(-1, -2)  # [B, pages, D, page]
        for width in sorted(set(widths) - {0}, reverse=True):
            some = fields[:, :, basis.widths[head] == width]
            rows.append(_packed(some, PLANES[width]).flatten(2))
    empty = codes.new_zeros(codes.shape[0], codes.shape[2], 0)
    return torch.cat([empty, *rows], dim=-1)[:, None]


def unpack(codes: Tensor, basis: TransformBasis) -> Tensor:
    """Unpack bytes into codes `[B, H_kv, pages, page, D]` uint8: the inverse of `pack`; 0 for directions of 0 bits."""
    layout = basis.layout
    batch, _, pages, _ = codes.shape
    found = codes.new_zeros(batch, layout.kv_heads, pages, layout.head_dim, layout.page)
    at = 0
    for head, widths in enumerate(layout.widths):
        for width in sorted(set(widths) - {0}, reverse=True):
            chosen = basis.widths[head] == width
            size = layout.page * width // 8
            count = layout.direction_widths[head].count(width)
            rows = codes[:, 0, :, at : at + count * size].unflatten(-1, (count, size))
            found[:, head][:, :, chosen] = _unpacked(rows, PLANES[width])
            at += count * size
    return found.transpose(-1, -2)


def _packed(fields: Tensor, planes: tuple[int, ...]) -> Tensor:
    """Pack `[..., page]` into `[..., page * width / 8]`, plane after plane."""
    packed, shift = [], 0
    for width in planes:
        parts = ((fields >> shift) & (2**width - 1)).unflatten(-1, (8 // width, -1))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)
        packed.append((parts << shifts[:, None]).sum(-2, dtype=torch.uint8))
        shift += width
    return torch.cat(packed, dim=-1)


def _unpacked(rows: Tensor, planes: tuple[int, ...]) -> Tensor:
    total = sum(planes)
    sizes = [rows.shape[-1] * width // total for width in planes]
    fields: Tensor | None = None
    shift = 0
    for width, plane in zip(planes, rows.split(sizes, dim=-1), strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=rows.device)
        part = ((plane.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)).flatten(-2) << shift
        fields = part if fields is None else fields | part
        shift += width
    if fields is None:
        raise AssertionError("a direction of 0 bits has no planes")
    return fields


def _codes(units: Tensor, basis: TransformBasis) -> Tensor:
    """Return the codes uint8 of directions in units of their deviation, `[B, H_kv, pages, page, D]`."""
    steps = torch.where(basis.widths > 0, basis.steps / basis.deviation, 1.0)[:, None, None]
    levels = basis.levels[:, None, None]
    return (units / steps + levels / 2).floor().clamp(levels.new_zeros(()), levels - 1).to(torch.uint8)


def _values(codes: Tensor, scales: Tensor | None, basis: TransformBasis) -> Tensor:
    """Return what codes stand for, in units of `z`."""
    middle: Tensor = (codes.to(basis.mean.dtype) - basis.levels[:, None, None] / 2 + 0.5) * basis.steps[:, None, None]
    return middle if scales is None else middle * scales.to(middle.dtype)[..., None]


def _scales(units: Tensor, basis: TransformBasis) -> Tensor:
    """Return each token's root mean square over the coded directions, float16 `[B, H_kv, pages, page]`."""
    coded = (basis.widths > 0).to(units.dtype)[:, None, None]
    mean = (units.square() * coded).sum(-1) / coded.sum(-1).clamp(min=1)
    return mean.sqrt().clamp(min=SMALLEST_SCALE).half()


def _refined(units: Tensor, codes: Tensor, scales: Tensor, basis: TransformBasis) -> Tensor:
    """Return scales times the factor by which the codes' values are nearest to the units that they code."""
    values = _values(codes, None, basis) / basis.deviation[:, None, None]
    factor = (values * units).sum(-1) / values.square().sum(-1).clamp(min=1e-6)
    return (scales.to(units.dtype) * factor.to(units.dtype)).half()
