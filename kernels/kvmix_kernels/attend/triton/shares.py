"""How the tokens of a part are shared among programs: runs of pages, then runs of tiles of sink and tail."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from ...segments import Segments
from .limits import SMALLEST_PAGE, runs_of

TOKENS_PER_SPLIT = 1024
"""At least: a split's partial result is written and read once more."""
PROGRAMS_PER_PROCESSOR = 8


@dataclass(frozen=True)
class Shares:
    """Pages and tiles of a part of the tokens, and how many of them a program has.

    Attributes:
        page: tokens of a page.
        tile: tokens of a tile.
        pages: of keys and of values.
        sinks: tokens before the pages.
    """

    page: int
    tile: int
    pages: tuple[int, int]
    sinks: int
    packed_splits: int
    pages_per_split: int
    tile_splits: int
    tiles_per_split: int

    @property
    def splits(self) -> int:
        """Programs that the tokens are shared among."""
        return self.packed_splits + self.tile_splits


def shares_of(key: Segments, value: Segments, tile: int, programs: int) -> Shares:
    """As many shares as fill the GPU, where every share is of `programs` programs: heads, and blocks of rows."""
    runs, device = [runs_of(tensor.packed) for tensor in (key, value)], key.tail.device
    page = next((run.page for each in runs for run in each), SMALLEST_PAGE)
    key_pages, value_pages = (each[0].pages if each else 0 for each in runs)
    sinks, pages = max(key.sinks, value.sinks), max(key_pages, value_pages)
    tiles = triton.cdiv(sinks, tile) + triton.cdiv(key.shape[2] - sinks - pages * page, tile)
    packed = _split(pages, page, programs, device)
    return Shares(page, tile, (key_pages, value_pages), sinks, *packed, *_split(tiles, tile, programs, device))


def _split(units: int, tokens: int, programs: int, device: torch.device) -> tuple[int, int]:
    """In how many splits to cut `units` of `tokens` each, and the units of one."""
    wanted = PROGRAMS_PER_PROCESSOR * _processors(device)
    each = max(TOKENS_PER_SPLIT // tokens, triton.cdiv(units * programs, wanted), 1)
    return triton.cdiv(units, each), each


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
