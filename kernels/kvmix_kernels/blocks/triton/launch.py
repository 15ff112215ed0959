"""Attention over blocks on a GPU: the problems that the kernel takes, and its launch."""

from __future__ import annotations

import triton
from torch import Tensor

from ...attend.triton.channels import RunLayouts
from ...attend.triton.launch import DTYPES, MOST_CHANNELS, MOST_GROUPS
from ...attend.triton.sharing import LEAST_ROWS, PartialResults, rows_of_program, score_factors, split
from ...layout import PageLayout
from ..affine import AffineBlocks
from ..base import GPU_BLOCKS, BlockTensor
from ..plain import PlainBlocks
from ..problem import BlockProblem
from . import coded_launch
from .kernel import BlockPointers, blocks_kernel

MOST_TOGETHER = 128
"""Tokens whose scores are computed together."""


def unsupported(problem: BlockProblem) -> str | None:
    """Return why the kernel cannot take this problem, for a warning; None if it can."""
    page, query = problem.page, problem.query
    if page not in GPU_BLOCKS:
        return f"blocks of {page} tokens"
    if query.dtype not in DTYPES or query.stride(3) != 1:
        return f"{query.dtype} queries".replace("torch.", "")
    for tensor in (problem.keys, problem.values):
        if tensor.head_dim > MOST_CHANNELS or tensor.head_dim % 16:
            return f"heads of {tensor.head_dim} channels"
        if isinstance(tensor, AffineBlocks) and tensor.layout.groups > MOST_GROUPS:
            return f"{tensor.kind}s in groups of {tensor.layout.group}"
    return coded_launch.unsupported(problem) if coded_launch.has_codes(problem) else None


def attend(problem: BlockProblem) -> Tensor:
    """Return the output `[B, H, S, D_v]`. Nothing waits for the GPU; a table's width decides the number of programs."""
    if coded_launch.has_codes(problem):
        return coded_launch.attend(problem)
    block, device = rows_of_program(problem), problem.query.device
    keys, values = key_layouts(problem.keys), value_layout(problem.values)
    programs, blocks = problem.batch * problem.kv_heads, triton.cdiv(problem.ratio * problem.queries, block)
    splits, pages_per_split = split(problem.table.shape[1], problem.page, programs * blocks, device)
    factor, cap = score_factors(problem)
    partial = PartialResults.of(problem, splits, problem.values.head_dim)
    is_large = max(problem.keys.head_dim, problem.values.head_dim) > 128 or problem.query.dtype.itemsize == 4
    has_wide_codes = any(isinstance(each, PageLayout) and each.bits == 8 for each in (*keys, values))
    blocks_kernel[(programs, splits, blocks)](
        problem.query,
        problem.query.stride()[:3],
        _pointers(problem.keys, problem.key_blocks),
        _pointers(problem.values, problem.value_blocks),
        problem.table,
        problem.table.stride(0),
        problem.lengths,
        partial.means,
        partial.logarithms,
        factor,
        cap,
        problem.kv_heads,
        problem.queries,
        splits,
        pages_per_split,
        K=RunLayouts(keys),
        V=values,
        VALUE_DIM=problem.values.head_dim,
        RATIO=problem.ratio,
        PAGE=problem.page,
        CHUNK=min(problem.page, MOST_TOGETHER),
        TILE=32 if is_large else 64,
        SOFTCAP=problem.softcap is not None,
        BLOCK=block,
        STAGES=2 if is_large else 3,
        num_warps=4 if block > LEAST_ROWS or is_large or has_wide_codes else 2,
    )
    return partial.merge(problem, problem.query.dtype, problem.sink_logits)[0]


def key_layouts(tensor: BlockTensor) -> tuple[PageLayout | int, ...]:
    """Return the groups of channels of keys: layouts of their codes, or a number of channels in full precision."""
    if not isinstance(tensor, AffineBlocks):
        return (tensor.head_dim,)
    together = min(tensor.page, MOST_TOGETHER)  # as many columns as are contracted at once; nothing else is grouped
    return tuple(PageLayout("key", layout.bits, layout.head_dim, layout.page, together) for _, layout in tensor.groups)


def value_layout(tensor: BlockTensor) -> PageLayout | None:
    """Return the layout of values, None for full precision."""
    return tensor.layout if isinstance(tensor, AffineBlocks) else None


def _pointers(tensor: BlockTensor, blocks: Tensor) -> BlockPointers:
    if isinstance(tensor, AffineBlocks):
        words, scales = tensor.words(blocks), tensor.scales(blocks)
    elif isinstance(tensor, PlainBlocks):
        words = scales = tensor.states(blocks)
    else:
        raise AssertionError(f"{type(tensor).__name__} have no words")
    return BlockPointers(words, words.stride()[:2], scales, scales.stride()[:2])
