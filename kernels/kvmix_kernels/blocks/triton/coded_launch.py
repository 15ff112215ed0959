"""Attention over blocks of transform codes on a GPU: the problems that it takes, and its launches.

The kernel is that of pages (`attend/triton/coded.py`), which finds blocks through a table. It leaves the weights of all
tokens in memory, so that many queries over long sequences attend in shares. The sink is attended to by PyTorch: it is
a token or a few, found in the first block of each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...attend.triton.coded_launch import BlockTable, attend_to_pages, tile_of
from ...attend.triton.sharing import PartialResults
from ...attend.triton.softmax import LOG2_E
from ...pages import Coded
from ..coded import CodedBlocks
from ..problem import BlockProblem

MOST_WEIGHTS = 2**26
"""Weights that are in memory at once, at most, 128 MiB: an engine has given nearly all memory to its blocks."""


def has_codes(problem: BlockProblem) -> bool:
    """Return whether keys or values are transform codes."""
    return isinstance(problem.keys, CodedBlocks) or isinstance(problem.values, CodedBlocks)


def unsupported(problem: BlockProblem) -> str | None:
    """Return why the kernel cannot take blocks of transform codes, for a warning; None if it can."""
    keys, values = problem.keys, problem.values
    if not isinstance(keys, CodedBlocks) or not isinstance(values, CodedBlocks):
        return "transform codes of keys or values alone"
    if keys.sink != values.sink:
        return f"a sink of {keys.sink} keys and {values.sink} values"
    frames = keys.basis.frames
    if frames is not None and frames.turns and (frames.length or 0) % tile_of(keys.page):
        return f"frames of {frames.length} tokens"
    for blocks in (problem.key_blocks, problem.value_blocks):
        if blocks.stride(1) != 1 or blocks.stride(0) % (keys.page // 8):
            return f"blocks of transform codes that are {blocks.stride(0)} bytes apart"
    return None


def attend(problem: BlockProblem) -> Tensor:
    """Return the output `[B, H, S, D_v]` in the query's dtype. Nothing waits for the GPU."""
    shares = list(_shares(problem))
    if len(shares) == 1:
        return _attend(problem)
    output = problem.query.new_empty(*problem.query.shape[:3], problem.values.head_dim)
    for rows, queries, share in shares:
        output[rows, :, queries] = _attend(share)
    return output


def _shares(problem: BlockProblem) -> Iterator[tuple[slice, slice, BlockProblem]]:
    """Yield sequences and queries that attend together, and their problem."""
    count, tokens = problem.queries, problem.table.shape[1] * problem.page
    most = max(1, MOST_WEIGHTS // (problem.heads * tokens))  # queries of one sequence, or of several
    sequences = max(1, most // count)
    for row in range(0, problem.batch, sequences):
        rows = slice(row, row + sequences)
        for start in range(0, count, most):
            stop = min(start + most, count)
            queries = slice(start, stop)
            yield (
                rows,
                queries,
                replace(
                    problem,
                    query=problem.query[rows, :, queries],
                    table=problem.table[rows],
                    lengths=problem.lengths[rows] - (count - stop),
                ),
            )


def _attend(problem: BlockProblem) -> Tensor:
    keys, values = problem.keys, problem.values
    if not isinstance(keys, CodedBlocks) or not isinstance(values, CodedBlocks):
        raise AssertionError("expected keys and values in transform codes")
    partial = PartialResults.of(problem, 1 + (keys.sink > 0), values.head_dim)
    table = BlockTable(problem.table, problem.lengths, keys.sink)
    key, value = _pages(keys, problem.key_blocks, problem), _pages(values, problem.value_blocks, problem)
    with torch.cuda.device_of(problem.query):
        attend_to_pages(problem, key, value, None, table, partial, 0)
        if keys.sink:
            _attend_to_sink(problem, keys, values, partial, 1)
        return partial.merge(problem, problem.query.dtype, problem.sink_logits)[0]


def _pages(tensor: CodedBlocks, blocks: Tensor, problem: BlockProblem) -> Coded:
    """Return all blocks as pages that every sequence may have."""
    pages = tensor.pages(blocks)
    scales = None if pages.scales is None else pages.scales.expand(problem.batch, -1, -1, -1)
    return Coded(tensor.basis, pages.codes.expand(problem.batch, -1, -1, -1), scales)


def _attend_to_sink(
    problem: BlockProblem, keys: CodedBlocks, values: CodedBlocks, partial: PartialResults, index: int
) -> None:
    """Attend to the sink, and write mean and logarithm as one split among others."""
    key = keys.first_tokens(problem.key_blocks, problem.table).float()
    value = values.first_tokens(problem.value_blocks, problem.table).float()
    device = problem.query.device
    grouped = problem.query.float().unflatten(1, (problem.kv_heads, problem.ratio)).flatten(2, 3)
    scores = grouped @ key.transpose(-1, -2) * problem.scaling
    if problem.softcap is not None:
        scores = problem.softcap * (scores / problem.softcap).tanh()
    query = torch.arange(problem.queries, device=device).repeat(problem.ratio)
    last_seen = (problem.lengths - problem.queries)[:, None, None, None] + query[:, None]
    scores = scores.masked_fill(torch.arange(keys.sink, device=device) > last_seen, -torch.inf)
    partial.means[:, index] = (scores.softmax(-1) @ value).flatten(0, 1)
    partial.logarithms[:, index] = scores.logsumexp(-1).flatten(0, 1) * LOG2_E.value
