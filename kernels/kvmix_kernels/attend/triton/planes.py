"""Transform codes as bit planes, for kernels in which all heads are alike.

A direction of 3, 5 or 6 bits is a plane of low bits and a plane of high ones, and coefficients are linear in both: the
high plane has those of the low one times a power of two, which rounding does not touch. So a kernel knows planes of 4,
2 and 1 bits and no widths. A table says where in a page each plane of a head begins, sorted by bits, each kind padded
to whole chunks; of directions of 0 bits there is nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...transform import TransformBasis
from ...transform_layout import PLANES

PLANE_BITS: Final = (4, 2, 1)
CHUNK: Final = 16
"""Planes that are multiplied at once: what a tensor core contracts, or has rows."""
ROOM: Final = 64
"""Planes of a head are padded to a multiple of this, so that few numbers of them have to be compiled."""


@dataclass(frozen=True, eq=False)
class Planes:
    """The planes of a layer's keys or values, `P` a head.

    Attributes:
        places: `[H_kv, P]` int32, first byte of each plane in a page; below 0 for padding.
        chunks: `[H_kv, 4]` int32, the first chunk of planes of 4, of 2 and of 1 bit, and the one after the last.
        matrix: `[H_kv, D, P]` float32, what a code of 1 in a plane adds to the decoded channels; 0 for padding.
        centers: `[H_kv, P]` float32, the middle of the numbers that the kernels make of a plane's codes.
        mean: `[H_kv, D]` float32.
    """

    places: Tensor
    chunks: Tensor
    matrix: Tensor
    centers: Tensor
    mean: Tensor

    @property
    def rows(self) -> int:
        """Return the planes of a head, padding included."""
        return self.places.shape[1]


_planes: WeakKeyDictionary[TransformBasis, Planes] = WeakKeyDictionary()


def planes_of(basis: TransformBasis) -> Planes:
    """Return the planes of a basis, made once for each."""
    planes = _planes.get(basis)
    if planes is None:
        planes = _planes[basis] = _made(basis)
    return planes


def _made(basis: TransformBasis) -> Planes:
    heads = [_of_head(basis, head) for head in range(basis.layout.kv_heads)]
    most = -(-max([ROOM, *(len(rows) for rows, _ in heads)]) // ROOM) * ROOM
    padding = (-basis.layout.page, 0, 0.0, 0.0)
    padded = [rows + [padding] * (most - len(rows)) for rows, _ in heads]
    device = basis.mean.device
    places, directions, factors, centers = (
        torch.tensor([[row[field] for row in rows] for rows in padded], device=device) for field in range(4)
    )
    decoding = basis.decoding.float()
    matrix = decoding.gather(2, directions[:, None].expand(-1, decoding.shape[1], -1)) * factors.float()[:, None]
    chunks = torch.tensor([chunks for _, chunks in heads], dtype=torch.int32, device=device)
    return Planes(places.int(), chunks, matrix.contiguous(), centers.float(), basis.mean.float().contiguous())


def _of_head(basis: TransformBasis, head: int) -> tuple[list[tuple[int, int, float, float]], list[int]]:
    """Return the planes of a head, each `(first byte, direction, factor, center)`, and the chunks that they fill."""
    layout = basis.layout
    found: dict[int, list[tuple[int, int, float, float]]] = {bits: [] for bits in PLANE_BITS}
    place = layout.head_offsets[head]
    for direction, width in enumerate(layout.direction_widths[head]):
        below = 0
        for bits in PLANES[width]:
            found[bits].append((place, direction, float(2**below), 1.5 * 2.0**bits - 0.5))
            place, below = place + layout.page * bits // 8, below + bits
    rows, chunks = [], [0]
    for bits in PLANE_BITS:
        rows += found[bits]
        rows += [(-layout.page, 0, 0.0, 0.0)] * (-len(rows) % CHUNK)
        chunks.append(len(rows) // CHUNK)
    return rows, chunks


def fold(rows: Tensor, basis: TransformBasis, pages: int) -> tuple[Tensor, Tensor]:
    """Fold query rows into coefficients of the planes of keys, for each frame.

    Scores are `coefficients . numbers + offsets`; offsets are computed from the rounded coefficients, so that what
    rounding changes meets codes as they are counted from the middle of their range.

    Args:
        rows: `[B, H_kv, R, D]` float32, times every factor of the scores.
        basis: of the keys.
        pages: of a sequence.

    Returns:
        Coefficients `[B, H_kv, frames, R, P]` bfloat16, and offsets `[B, H_kv, frames, R]` float32.
    """
    planes, frames = planes_of(basis), basis.frames
    turned = rows[:, :, None]
    if frames is not None and frames.turns:
        count = frames.count(pages, basis.layout.page)
        index = torch.arange(count, device=rows.device)
        turned = frames.turn(turned.expand(-1, -1, count, -1, -1), index)
    coefficients = (turned @ planes.matrix[:, None]).bfloat16()
    offsets = turned @ planes.mean[:, None, :, None] - coefficients.float() @ planes.centers[:, None, :, None]
    return coefficients, offsets.squeeze(-1)


def decode_sums(sums: Tensor, basis: TransformBasis) -> Tensor:
    """Decode weighted means of centred codes, `[B, H_kv, R, P]`, to channels `[B, H_kv, R, D_v]`."""
    planes = planes_of(basis)
    return sums @ planes.matrix.transpose(-1, -2) + planes.mean[:, None]
