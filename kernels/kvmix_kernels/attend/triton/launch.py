"""Attention on a GPU in Triton: the problems that the kernels take, the sharing of tokens among programs, the launches.

Each part of the tokens is one launch, and one more launch merges the results of all programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...layout import PageLayout
from ...pages import Channels, Packed, Plain
from ...segments import Segments
from ..parts import Part, parts_of, uncoded_parts_of
from ..problem import AttentionProblem
from . import coded_launch
from .channels import RunLayouts
from .kernel import attend_kernel
from .memory import RunPointers, SegmentPointers
from .sharing import LEAST_ROWS, PartialResults, mask_kind, mask_of_rows, rows_of_program, score_factors, split

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_PAGE = 16
MOST_GROUPS = 8
MOST_CHANNELS = 256
MOST_RUNS = 4


@dataclass(frozen=True)
class Shares:
    """Pages and tiles of a part of the tokens, and how many of them a program has.

    Attributes:
        page: tokens of a page.
        tile: tokens of a tile.
        pages: of keys and of values.
        sinks: tokens before the pages.
        packed_splits: programs that the pages are shared among.
        pages_per_split: pages of one program.
        tile_splits: programs that the tiles of sink and tail are shared among.
        tiles_per_split: tiles of one program.
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


def unsupported(problem: AttentionProblem) -> str | None:
    """Return why the kernels cannot take this problem, for a warning; None if they can."""
    if problem.is_coded and (reason := coded_launch.unsupported(problem)):
        return reason
    reasons = (_unsupported(problem, part.key, part.value) for part in plain_parts(problem, with_masks=False))
    return next((reason for reason in reasons if reason), None)


def plain_parts(problem: AttentionProblem, with_masks: bool = True) -> list[Part]:
    """Return the parts of a problem, pages of transform codes left out; with masks, chosen pages as copies."""
    parts = (uncoded_parts_of if problem.is_coded else parts_of)(problem, with_masks)
    return [part.gathered() if with_masks else part.all_pages() for part in parts]


def attend(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Return output and logarithms of the sums of weights, as `AttentionProblem` describes them.

    Nothing waits for the GPU, and memory comes from PyTorch's pool, so that the call can be captured in a CUDA graph.
    """
    parts = plain_parts(problem)
    shares = [_shares_of(part, problem) for part in parts]
    of_codes = coded_launch.has_pages(problem)
    partial = PartialResults.of(problem, sum(share.splits for share in shares) + of_codes, problem.value_dim)
    with torch.cuda.device_of(problem.query):
        first_split = 0
        for part, share in zip(parts, shares, strict=True):
            if share.splits:
                _launch(problem, part, share, partial, first_split)
            first_split += share.splits
        if of_codes:
            coded_launch.attend_into(problem, partial, first_split)
        return partial.merge(problem, problem.query.dtype, problem.sink_logits)


def _launch(problem: AttentionProblem, part: Part, shares: Shares, partial: PartialResults, first_split: int) -> None:
    """Attend to a part of the tokens, whose splits are those from `first_split` on of all."""
    key, value, block = part.key, part.value, rows_of_program(problem)
    factor, cap = score_factors(problem)
    per_row = mask_of_rows(part.mask, problem, part.tokens)
    runs, value_layout = run_layouts(key), next(iter(run_layouts(value)), None)
    programs = problem.batch * problem.kv_heads
    attend_kernel[(programs, shares.splits, triton.cdiv(problem.ratio * problem.queries, block))](
        problem.query,
        problem.query.stride()[:3],
        _pointers(key),
        _pointers(value),
        per_row,
        *per_row.stride(),
        partial.means,
        partial.logarithms,
        factor,
        cap,
        problem.kv_heads,
        problem.queries,
        part.tokens,
        shares.sinks,
        *shares.pages,
        key.packed.pages_per_order if isinstance(key.packed, Channels) else 1,
        *(tensor.edges[1] for tensor in (key, value)),
        first_split,
        partial.splits,
        shares.packed_splits,
        shares.pages_per_split,
        shares.tiles_per_split,
        K=RunLayouts(runs) if runs else None,
        V=value_layout,
        HEAD_DIM=problem.head_dim,
        VALUE_DIM=problem.value_dim,
        RATIO=problem.ratio,
        PAGE=shares.page,
        TILE=shares.tile,
        MASK=mask_kind(part.mask, problem.queries > 1),
        SOFTCAP=problem.softcap is not None,
        BLOCK=block,
        STAGES=2 if _is_large(problem) else 3,
        num_warps=_warps(block, max(problem.head_dim, problem.value_dim), (*runs, value_layout)),
    )


def run_layouts(tensor: Segments) -> tuple[PageLayout | int, ...]:
    """Return what is packed, a run of channels each: layouts, and numbers of channels in full precision."""
    return tuple(run.layout if isinstance(run, Packed) else run.width for run in tensor.runs)


def _shares_of(part: Part, problem: AttentionProblem) -> Shares:
    """Return as many shares as fill the GPU, each of one program a KV head, batch row and block of query rows."""
    key, value, device = part.key, part.value, problem.query.device
    blocks = triton.cdiv(problem.ratio * problem.queries, rows_of_program(problem))
    programs, tile = problem.batch * problem.kv_heads * blocks, 32 if _is_large(problem) else 64
    page = next((run.page for run in (*key.runs, *value.runs)), SMALLEST_PAGE)
    key_pages, value_pages = (tensor.runs[0].pages if tensor.runs else 0 for tensor in (key, value))
    sinks, pages = max(key.sinks, value.sinks), max(key_pages, value_pages)
    tiles = triton.cdiv(sinks, tile) + triton.cdiv(part.tokens - sinks - pages * page, tile)
    packed = split(pages, page, programs, device)
    return Shares(page, tile, (key_pages, value_pages), sinks, *packed, *split(tiles, tile, programs, device))


def _is_large(problem: AttentionProblem) -> bool:
    """Return whether a tile takes so much memory that it must have fewer tokens."""
    return max(problem.head_dim, problem.value_dim) > 128 or problem.key.tail.dtype == torch.float32


def _warps(block: int, channels: int, runs: tuple[PageLayout | int | None, ...]) -> int:
    """Return as few warps as the registers allow: two issue the fewest instructions per code (kernels/README.md)."""
    has_wide_codes = any(isinstance(run, PageLayout) and run.bits == 8 for run in runs)
    return 4 if block > LEAST_ROWS or channels > 128 or has_wide_codes else 2


def _pointers(tensor: Segments) -> SegmentPointers:
    sink = tensor.tail if tensor.sink is None else tensor.sink
    order = (tensor.packed.order,) if isinstance(tensor.packed, Channels) else ()
    runs = []
    for run in tensor.runs:
        parts = (run.words, run.scales) if isinstance(run, Packed) else (run.states, run.states)
        runs.append(RunPointers(*(field for part in parts for field in (part, part.stride()[:3]))))
    return SegmentPointers(
        sink,
        sink.stride()[:3],
        tuple(runs),
        order,
        tuple(stride for each in order for stride in each.stride()[:3]),
        tensor.tail,
        tensor.tail.stride()[:3],
    )


def _unsupported(problem: AttentionProblem, key: Segments, value: Segments) -> str | None:
    for tensor in (problem.query, key.tail, value.tail):
        channels = tensor.shape[3]
        if tensor.dtype not in DTYPES or tensor.stride(3) != 1:
            return f"{problem.query.dtype} queries over {key.tail.dtype} keys".replace("torch.", "")
        if channels > MOST_CHANNELS or channels % 16:
            return f"heads of {key.shape[3]} and {value.shape[3]} channels"
    if isinstance(value.packed, Channels):
        return "values in runs of channels"
    if len(key.runs) > MOST_RUNS:
        return f"keys in {len(key.runs)} runs of channels"
    if not _begin_together(key, value):
        return "keys and values whose pages do not begin at the same tokens"
    return _unsupported_pages([*key.runs, *value.runs])


def _unsupported_pages(runs: list[Packed | Plain]) -> str | None:
    for run in runs:
        if run.page < SMALLEST_PAGE or run.page & (run.page - 1):
            return f"pages of {run.page} tokens"
    layouts = [run.layout for run in runs if isinstance(run, Packed)]
    for layout in layouts:
        if layout.groups > MOST_GROUPS or layout.group < 16:
            return f"{layout.kind}s in groups of {layout.group}"
        if layout.kind == "key" and layout.group & (layout.group - 1):
            return f"keys in groups of {layout.group}"
    if len(groups := {layout.group for layout in layouts if layout.kind == "key"}) > 1:
        return f"keys in runs of channels with groups of {' and '.join(map(str, sorted(groups)))}"
    return None


def _begin_together(key: Segments, value: Segments) -> bool:
    """Return whether pages are of the same tokens, and none of one tensor's tail is in the other's sink."""
    sinks = max(key.sinks, value.sinks)
    for tensor in (key, value):
        if tensor.sinks not in (0, sinks) or (tensor.packed is not None and tensor.sinks != sinks):
            return False
    return len({run.page for run in (*key.runs, *value.runs)}) <= 1
