"""Codes of a few bits packed into bytes, for codecs without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack codes `[..., n]` below `2^width` into uint8 `[..., n * width / 8]`; `n` is a multiple of 8.

    A width that does not divide 8 is stored in planes that do, the widest first: 3 bits are 2 bits, then 1.
    """
    planes, shift = [], 0
    for bits in _planes(width):
        fields = ((codes >> shift) & ((1 << bits) - 1)).to(torch.uint8).unflatten(-1, (-1, 8 // bits))
        planes.append((fields << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8))
        shift += bits
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the `count` codes `[..., count]`, int32: the inverse of `pack`."""
    codes, shift = torch.zeros((), dtype=torch.int32, device=packed.device), 0
    planes = packed.split([count * bits // 8 for bits in _planes(width)], dim=-1)
    for bits, plane in zip(_planes(width), planes, strict=True):
        fields = (plane[..., None] >> _shifts(bits, packed.device)) & ((1 << bits) - 1)
        codes = codes | (fields.flatten(-2).int() << shift)
        shift += bits
    return codes


def _planes(width: int) -> list[int]:
    """Return the powers of two that a width of 1 to 8 is the sum of, the largest first."""
    return [bits for bits in (8, 4, 2, 1) if width & bits]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
