"""The launch for pages of transform codes, one after the other or in a table; its result is a split among others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...pages import Coded
from ..problem import AttentionProblem, QueryProblem
from .coded import coded_kernel
from .planes import decode_sums, fold, planes_of
from .sharing import PartialResults, mask_kind, mask_of_rows, rows_of_program, score_factors, split
from .softmax import LOG2_E

LEAST_TILE = 128
"""Tokens that a program takes at once, at least: of so many, a plane of 1 bit fills the 16 rows of a tensor core."""
SMALLEST_PAGE, LARGEST_PAGE = 16, 256


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Sequences whose pages lie anywhere among those in memory, and whose last tokens are the queries.

    Attributes:
        pages: `[B, pages]` int32, which page in memory is the next of each sequence.
        lengths: `[B]` int64, tokens of each sequence; what is after the last one is not read.
        exact: first tokens of every sequence that are not attended to here.
    """

    pages: Tensor
    lengths: Tensor
    exact: int


def has_pages(problem: AttentionProblem) -> bool:
    """Return whether there are any pages of transform codes."""
    return isinstance(problem.key.packed, Coded) and problem.key.packed.pages > 0


def unsupported(problem: AttentionProblem) -> str | None:
    """Return why the kernel cannot take keys or values in transform codes, for a warning; None if it can."""
    key, value = problem.key.packed, problem.value.packed
    if not isinstance(key, Coded) or not isinstance(value, Coded):
        return "transform codes of keys or values alone"
    if problem.key.edges != problem.value.edges or key.page != value.page:
        return "transform codes of keys and values whose pages are not of the same tokens"
    if 1 < problem.queries > problem.key.tail.shape[2]:
        return f"{problem.queries} queries, the first of which are older than the last page of transform codes"
    page, frames = key.page, key.basis.frames
    if not SMALLEST_PAGE <= page <= LARGEST_PAGE or page & (page - 1):
        return f"pages of {page} tokens"
    if frames is not None and frames.turns and (frames.length or 0) % tile_of(page):
        return f"frames of {frames.length} tokens"
    if key.codes.stride(3) != 1 or value.codes.stride(3) != 1 or value.scales is None or value.scales.stride(3) != 1:
        return "transform codes whose bytes are not in a row"
    return None


def attend_into(problem: AttentionProblem, partial: PartialResults, index: int) -> None:
    """Attend to the pages, and write mean and logarithm as one split among those of all parts."""
    key, value = problem.key.packed, problem.value.packed
    if not isinstance(key, Coded) or not isinstance(value, Coded):
        raise AssertionError("expected keys and values in transform codes")
    mask = problem.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., slice(*problem.key.edges)]
    attend_to_pages(problem, key, value, mask, None, partial, index)


def attend_to_pages(
    problem: QueryProblem,
    key: Coded,
    value: Coded,
    mask: Tensor | None,
    table: BlockTable | None,
    partial: PartialResults,
    index: int,
) -> None:
    """Attend to pages, and write mean and logarithm as one split among others.

    Args:
        problem: the queries.
        key: pages of keys; with a table, those in memory, whose stride over `B` is 0.
        value: pages of values, as many.
        mask: of the tokens of the pages; without one, and without a table, all are seen.
        table: where the pages of each sequence are; None if they lie one after the other.
        partial: of all parts of the tokens.
        index: of the split.
    """
    of_planes = _launch(problem, key, value, mask, table)
    sums, logarithms = of_planes.merge(problem, torch.float32)
    rows = problem.ratio * problem.queries
    means = decode_sums(sums.view(problem.batch, problem.kv_heads, rows, -1), value.basis)
    partial.means[:, index] = means.flatten(0, 1)
    partial.logarithms[:, index] = logarithms.view(-1, rows) * LOG2_E.value


def _launch(
    problem: QueryProblem, key: Coded, value: Coded, mask: Tensor | None, table: BlockTable | None
) -> PartialResults:
    """Return each split's means of the planes of values."""
    if value.scales is None:
        raise AssertionError("values in transform codes have a scale a token")
    factor, cap = score_factors(problem)
    batch, kv_heads, page, device = problem.batch, problem.kv_heads, key.page, problem.query.device
    rows, block, tile = problem.ratio * problem.queries, rows_of_program(problem), tile_of(page)
    query = problem.query.float() * factor
    pages = key.pages if table is None else table.pages.shape[1]
    coefficients, offsets = fold(query.reshape(batch, kv_heads, rows, -1), key.basis, pages)
    of_keys, of_values = planes_of(key.basis), planes_of(value.basis)
    tiles, blocks = triton.cdiv(pages * page, tile), triton.cdiv(rows, block)
    splits, tiles_per_split = split(tiles, tile, batch * kv_heads * blocks, device)
    exact, places, firsts = _exact_of(key) if table is None else (table.exact, None, None)
    per_row = mask_of_rows(mask, problem, pages * page)
    partial = PartialResults.of(problem, splits, of_values.rows)
    coded_kernel[(batch * kv_heads, splits, blocks)](
        key.codes,
        key.codes.stride(0),
        key.codes.stride(2),
        of_keys.places,
        of_keys.chunks,
        of_keys.rows,
        coefficients,
        offsets,
        value.codes,
        value.codes.stride(0),
        value.codes.stride(2),
        of_values.places,
        of_values.chunks,
        of_values.rows,
        value.scales,
        *value.scales.stride()[:3],
        None if table is None else table.pages,
        0 if table is None else table.pages.stride(0),
        None if table is None else table.lengths,
        places,
        firsts,
        exact,
        per_row,
        *per_row.stride(),
        torch.empty(batch * kv_heads, rows, tiles * tile, dtype=torch.bfloat16, device=device),
        torch.empty(batch * kv_heads, rows, tiles, dtype=torch.float32, device=device),
        partial.means,
        partial.logarithms,
        cap,
        kv_heads,
        problem.queries,
        pages,
        _pages_per_frame(key, pages),
        coefficients.shape[2],
        splits,
        tiles,
        tiles_per_split,
        RATIO=problem.ratio,
        PAGE=page,
        TILE=tile,
        MASK=mask_kind(mask, is_causal=table is not None),  # without one, packed tokens are older than all queries
        SOFTCAP=problem.softcap is not None,
        EXACT=exact > 0,
        BLOCK=block,
        STAGES=2,
        num_warps=max(1, block // 8),
    )
    return partial


def tile_of(page: int) -> int:
    """Return the tokens that a program takes at once, of which a frame must have whole numbers."""
    return max(LEAST_TILE, page)


def _pages_per_frame(key: Coded, pages: int) -> int:
    frames = key.basis.frames
    return pages if frames is None or not frames.turns else (frames.length or 0) // key.page


def _exact_of(key: Coded) -> tuple[int, Tensor, Tensor]:
    """Return `N`, the exact tokens `[B, H_kv, N]`, and which is the first of each page `[B, H_kv, pages + 1]`."""
    shape, device = (key.codes.shape[0], key.basis.layout.kv_heads, 0), key.codes.device
    places = torch.empty(shape, dtype=torch.int32, device=device) if key.places is None else key.places.contiguous()
    edges = torch.arange(key.pages + 1, dtype=torch.int32, device=device) * key.page
    firsts = torch.searchsorted(places, edges.expand(*places.shape[:2], -1).contiguous(), out_int32=True)
    return places.shape[2], places, firsts
