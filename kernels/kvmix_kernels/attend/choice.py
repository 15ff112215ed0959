"""The choice of the pages that a query reads, by their summaries (Quest, arXiv 2406.10774; ShadowKV, 2410.21465).

Every page stands for its tokens with its summary: the mean key `m`, with the logit `q·m`; the smallest and largest
number of each channel, with the largest logit that any key between them could have, `sum_d max(q_d lo_d, q_d hi_d)`;
or codes of all of its keys, each cut into parts, with the largest logit of the keys that they stand for, by a table of
the products of the query and all entries of the codebooks (PQCache, arXiv 2407.12820).
The softmax of these logits over a head's pages is what the heads that choose together compare.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..pages import Coded, Packed
from ..runtime.native import library
from ..summaries import ChosenPages, Summarized
from . import choice_cpu
from .problem import AttentionProblem


def with_chosen_pages(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem over sink, chosen pages and tail, which one query reads; several queries read all pages.

    Raises:
        ValueError: if values are not in the same pages as their keys.
    """
    pages, values = problem.key.packed, problem.value.packed
    if not isinstance(pages, Summarized):
        return problem
    whole = with_all_pages(problem)
    if problem.queries > 1 or pages.pages <= pages.count:
        return whole
    edges = [problem.key.edges, problem.value.edges]
    if edges[0] != edges[1] or not isinstance(values, (Packed, Coded)):
        raise ValueError(
            f"keys are in pages at {edges[0]}, values at {edges[1]}; expected the same tokens in each page"
        )
    by_page = None if problem.mask is None else _by_page(problem.mask, problem, pages.page)
    allowed = None if by_page is None else _is_seen(by_page).any(-1)
    numbers = chosen_pages(problem.query[:, :, 0], problem.scaling, pages, allowed)
    return replace(
        problem,
        key=replace(problem.key, packed=ChosenPages(pages.held, numbers)),
        value=replace(problem.value, packed=ChosenPages(values, numbers)),
        mask=_mask_of(problem, by_page, numbers),
    )


def with_all_pages(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem without the summaries of its pages."""
    pages = problem.key.packed
    return replace(problem, key=replace(problem.key, packed=pages.held)) if isinstance(pages, Summarized) else problem


def gathered(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem over copies of its chosen pages, for kernels that take no list of pages."""
    key, value = (
        replace(tensor, packed=tensor.packed.gathered()) if isinstance(tensor.packed, ChosenPages) else tensor
        for tensor in (problem.key, problem.value)
    )
    return replace(problem, key=key, value=value)


def chosen_pages(query: Tensor, scaling: float, pages: Summarized, allowed: Tensor | None = None) -> Tensor:
    """Return the numbers `[B, H_kv, count]` int32, ascending, of the pages that one query reads.

    The native library takes what may attend to all pages, in half of the time of PyTorch's operators.

    Args:
        query: `[B, H, D]`.
        scaling: of the logits.
        pages: of the keys, more than the query reads.
        allowed: `[B, 1 or H, pages]`, pages with any token that the query may attend to; None for all.
    """
    native = library() if query.device.type == "cpu" and allowed is None else None
    numbers = None if native is None else choice_cpu.chosen_pages(native, query, scaling, pages)
    return _chosen_pages(query * scaling, pages, allowed) if numbers is None else numbers


def _chosen_pages(query: Tensor, pages: Summarized, allowed: Tensor | None) -> Tensor:
    """Return what `chosen_pages` does, of a query that is scaled, by PyTorch."""
    kv_heads = pages.summary.shape[1]
    grouped_queries = query.unflatten(1, (kv_heads, -1))
    if pages.books is None:
        logits = _logits(grouped_queries.to(pages.summary.dtype), pages.summary)
    else:
        logits = _coded_logits(grouped_queries.to(pages.books.dtype), pages.summary, pages.books)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32))
    if allowed is not None:
        grouped = allowed.expand(-1, query.shape[1], -1).unflatten(1, (kv_heads, -1))
        logits = logits.masked_fill(~grouped, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    if pages.sharing == "max":
        worth = weights.amax(2)
    else:
        worth = weights.sum(2) if pages.sharing == "sum" else weights.sum((1, 2))[:, None]
    best: Tensor = worth.topk(pages.count, dim=-1).indices.sort(-1).values
    numbers: Tensor = best.int().expand(-1, kv_heads, -1).contiguous()
    return numbers


def _logits(query: Tensor, summary: Tensor) -> Tensor:
    """Return the logits `[B, H_kv, R, pages]` of queries `[B, H_kv, R, D]` over the summaries of pages."""
    if summary.shape[3] == 2:
        query = torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)
    return (summary.flatten(3) @ query.mT).mT


def _coded_logits(query: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """Return the largest logit in each page `[B, H_kv, R, pages]` of the keys that codes stand for.

    Args:
        query: `[B, H_kv, R, D]`.
        codes: `[B, H_kv, pages, page, P]`.
        books: `[B, H_kv, P, entries, D / P]`.
    """
    parts = query.unflatten(-1, (books.shape[2], -1)).transpose(2, 3)
    tables = parts @ books.mT  # [B, H_kv, P, R, entries]
    places = codes.flatten(2, 3).mT.long()[:, :, :, None].expand(-1, -1, -1, query.shape[2], -1)
    logits: Tensor = tables.gather(-1, places).sum(2).unflatten(-1, codes.shape[2:4]).amax(-1)
    return logits


def _by_page(mask: Tensor, problem: AttentionProblem, page: int) -> Tensor:
    """Return the mask's columns of packed tokens, `[B, 1 or H, pages, page]`."""
    first, last = problem.key.edges
    columns = mask.expand(problem.batch, *mask.shape[1:3], problem.key.shape[2])[:, :, 0, first:last]
    pages: Tensor = columns.unflatten(-1, (-1, page))
    return pages


def _is_seen(mask: Tensor) -> Tensor:
    """Return where a mask lets queries attend; models add their dtype's lowest number as often as -inf."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _mask_of(problem: AttentionProblem, by_page: Tensor | None, numbers: Tensor) -> Tensor | None:
    """Return the mask over sink, chosen pages and tail, `[B, H, 1, T]`."""
    if problem.mask is None or by_page is None:
        return None
    first, last = problem.key.edges
    heads = numbers.repeat_interleave(problem.ratio, dim=1).long()[..., None]
    of_pages = by_page.expand(-1, problem.heads, -1, -1)
    chosen = of_pages.gather(2, heads.expand(-1, -1, -1, by_page.shape[3])).flatten(2)[:, :, None]
    whole = problem.mask.expand(problem.batch, problem.heads, 1, problem.key.shape[2])
    return torch.cat([whole[..., :first], chosen, whole[..., last:]], dim=-1)
