"""Pages of transform codes as the native library takes them."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..pages import Coded
from ..runtime.native.structs import DTYPES, CCoded
from ..transform import Frames, TransformBasis

LONGEST_PAGE = 1024
"""Tokens whose codes times 16-bit weights have a sum of 31 bits."""

FEWEST_FRAMES = 16
"""Frames that a query can be turned to at first."""


@dataclass(frozen=True, eq=False)
class _Folded:
    """A basis as attention reads it, all contiguous; see `struct Coded` in cpu.h."""

    widths: Tensor
    offsets: Tensor
    decoding: Tensor
    mean: Tensor
    middles: Tensor


_folded: WeakKeyDictionary[TransformBasis, _Folded] = WeakKeyDictionary()
_turns: WeakKeyDictionary[Frames, list[Tensor]] = WeakKeyDictionary()


def fits(coded: Coded) -> bool:
    """Return whether the native path takes these pages: not too long, elements in a row, dtypes that it knows."""
    parts = (coded.codes, coded.scales, coded.places, coded.exact)
    in_a_row = all(part is None or part.stride(-1) == 1 or part.shape[-1] <= 1 for part in parts)
    return coded.page <= LONGEST_PAGE and in_a_row and (coded.exact is None or coded.exact.dtype in DTYPES)


def pages_of(coded: Coded) -> CCoded:
    """Return the struct of these pages; what it points to lives as long as `coded`, its basis and its frames."""
    folded, frames = _fold(coded.basis), coded.basis.frames
    call = CCoded(
        codes=coded.codes.data_ptr(),
        codes_strides=(coded.codes.stride(0), coded.codes.stride(2)),
        widths=folded.widths.data_ptr(),
        offsets=folded.offsets.data_ptr(),
        decoding=folded.decoding.data_ptr(),
        mean=folded.mean.data_ptr(),
        middles=folded.middles.data_ptr(),
    )
    if coded.scales is not None:
        call.scales, call.scales_strides = coded.scales.data_ptr(), coded.scales.stride()[:3]
    if coded.places is not None and coded.exact is not None:
        call.places, call.places_strides = coded.places.data_ptr(), coded.places.stride()[:2]
        call.exact, call.exact_strides = coded.exact.data_ptr(), coded.exact.stride()[:3]
        call.exact_tokens, call.exact_dtype = coded.exact.shape[2], DTYPES[coded.exact.dtype]
    if frames is not None and frames.turns and frames.length is not None:
        call.turns = _turns_to(frames, frames.count(coded.pages, coded.page)).data_ptr()
        call.frame, call.pairs = frames.length, frames.frequencies.numel()
        call.start, call.interleaved = frames.start, frames.interleaved
    return call


def _fold(basis: TransformBasis) -> _Folded:
    folded = _folded.get(basis)
    if folded is None:
        folded = _folded[basis] = _Folded(
            basis.widths.to(torch.uint8).contiguous(),
            torch.tensor(basis.layout.head_offsets),
            basis.decoding.float().contiguous(),
            basis.mean.float().contiguous(),
            (basis.levels.float() / 2 - 0.5).contiguous(),
        )
    return folded


def _turns_to(frames: Frames, count: int) -> Tensor:
    """Return cosines and sines of at least `count` frames, `[frames, 2, pairs]`: those that turn a query to each.

    Earlier ones are kept, since structs point to them; of each twice as many frames, they are few.
    """
    made = _turns.setdefault(frames, [])
    if not made or made[-1].shape[0] < count:
        starts = torch.arange(max(count, 2 * len(made[-1]) if made else FEWEST_FRAMES)) * (frames.length or 0)
        angles = starts[:, None].double() * frames.frequencies * -1
        made.append(torch.stack([angles.cos(), angles.sin()], dim=1).float())
    return made[-1]
