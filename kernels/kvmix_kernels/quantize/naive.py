"""Definition of the codec, in plain PyTorch. Every kernel must produce the same words and scales, bit for bit.

Asymmetric round-to-nearest in groups (KVmix, arXiv 2506.08018, section 3.3; the KIVI scheme):

    scale = (max - min) / (2^bits - 1)      zero = min
    code = round((x - zero) / scale)        x' = code * scale + zero

Codes are computed against the scale and zero *as stored*, so that `|x - x'| <= scale / 2` up to their rounding.
A scale too small for float16 is stored as 0 and the group decodes to its minimum. NaN and Inf reach the scales.
The other encoders of `grids.py` choose scale and zero for a small squared error instead, and promise no such bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import WORD_BITS, Encoder, PageLayout
from .grids import grid_of


def quantize(pages: Tensor, layout: PageLayout, encoder: Encoder = "minmax") -> tuple[Tensor, Tensor]:
    """Quantize and pack whole pages.

    Args:
        pages: `[..., page, head_dim]`, any floating dtype; arithmetic is in float32.
        layout: shape and codec of a page.
        encoder: how scale and zero are chosen: `"minmax"`, `"refit"` or `"search"`, see `grids.py`.

    Returns:
        words `[..., *layout.words_shape]` int16 and scales `[..., *layout.scales_shape]` in the scale dtype.

    Raises:
        ValueError: if the last two axes are not `[page, head_dim]`, or for an unknown encoder.
    """
    if tuple(pages.shape[-2:]) != (layout.page, layout.head_dim):
        raise ValueError(f"expected pages [..., {layout.page}, {layout.head_dim}], got {list(pages.shape)}")
    codes, scales = encode(_orient(pages, layout), layout, encoder)
    return pack(codes, layout), scales


def dequantize(words: Tensor, scales: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return pages `[..., page, head_dim]` in `dtype`, computed in float32: the inverse of `quantize`."""
    return _orient(decode(unpack(words, layout), scales, layout), layout).to(dtype)


def encode(matrix: Tensor, layout: PageLayout, encoder: Encoder = "minmax") -> tuple[Tensor, Tensor]:
    """Return codes (uint8, `[..., rows, columns]`) and scales (`[..., 2, groups, rows]`) of `[..., rows, columns]`."""
    scale_dtype = getattr(torch, layout.scale_dtype)
    parts = matrix.float().split(layout.group, dim=-1)
    grids = [grid_of(part, layout.levels, scale_dtype, encoder) for part in parts]
    codes = [grid.codes(part, layout.levels).to(torch.uint8) for part, grid in zip(parts, grids, strict=True)]
    scale, zero = (torch.cat(each, dim=-1) for each in zip(*((grid.scale, grid.zero) for grid in grids), strict=True))
    return torch.cat(codes, dim=-1), torch.stack([scale.mT, zero.mT], dim=-3).to(scale_dtype)


def decode(codes: Tensor, scales: Tensor, layout: PageLayout) -> Tensor:
    """Return the float32 matrix `[..., rows, columns]` that codes and scales stand for."""
    scale, zero = (_per_column(part, layout) for part in scales.float().unbind(-3))
    return codes * scale + zero


def pack(codes: Tensor, layout: PageLayout) -> Tensor:
    """Pack codes `[..., rows, columns]` into int16 words `[..., rows * bits / 16, columns]`."""
    planes, shift = [], 0
    for width in layout.planes:
        planes.append(_pack_plane((codes.int() >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=-2)


def unpack(words: Tensor, layout: PageLayout) -> Tensor:
    """Unpack words into int16 codes `[..., rows, columns]`: the inverse of `pack`."""
    sizes = [layout.rows * width // WORD_BITS for width in layout.planes]
    codes, shift = None, 0
    for width, plane in zip(layout.planes, torch.split(words, sizes, dim=-2), strict=True):
        fields = _unpack_plane(plane, width)
        codes = fields if codes is None else codes | (fields << shift)
        shift += width
    if codes is None:
        raise AssertionError("a layout has at least one plane")
    return codes


def _orient(x: Tensor, layout: PageLayout) -> Tensor:
    """Swap between `[page, head_dim]` and the stored `[rows, columns]`."""
    return x.transpose(-1, -2) if layout.kind == "key" else x


def _per_column(per_group: Tensor, layout: PageLayout) -> Tensor:
    """Spread `[..., groups, rows]` over the columns of each group: `[..., rows, columns or 1]`."""
    per_group = per_group.transpose(-1, -2)
    if layout.groups == 1:
        return per_group
    return per_group.repeat_interleave(layout.group, dim=-1)[..., : layout.columns]


def _pack_plane(fields: Tensor, width: int) -> Tensor:
    per_word = WORD_BITS // width
    fields = fields.unflatten(-2, (per_word, -1))
    shifts = torch.arange(0, WORD_BITS, width, dtype=torch.int32, device=fields.device)
    return (fields << shifts[:, None, None]).sum(-3, dtype=torch.int32).to(torch.int16)


def _unpack_plane(words: Tensor, width: int) -> Tensor:
    shifts = torch.arange(0, WORD_BITS, width, dtype=torch.int16, device=words.device)
    return ((words.unsqueeze(-3) >> shifts[:, None, None]) & ((1 << width) - 1)).flatten(-3, -2)
