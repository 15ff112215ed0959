"""Pages that a query chooses by their summaries: a float64 reference in loops, and problems to compare with it."""

from dataclasses import replace

import torch
from coded_pages import coded_pair
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.summaries import Summarized
from poisoned import in_a_poisoned_buffer, segments


def summary_of(states, kind):
    """The summary `[B, H_kv, pages, P, D]` of pages `[B, H_kv, pages, page, D]`."""
    if kind == "mean":
        return states.mean(3, keepdim=True)
    return torch.stack([states.amin(3), states.amax(3)], dim=3)


def codes_of(states, parts=2, entries=250):
    """Codes `[B, H_kv, pages, page, P]` of pages by random codebooks `[B, H_kv, P, entries, D / P]`, and these.

    So many entries that hardly any two keys have the same codes, whose pages would be equally good.
    """
    books = torch.randn(*states.shape[:2], parts, entries, states.shape[4] // parts)
    split = states.flatten(2, 3).unflatten(-1, (parts, -1)).transpose(2, 3)
    codes = torch.cdist(split, books).argmin(-1).mT
    return codes.unflatten(2, states.shape[2:4]).to(torch.uint8).contiguous(), books


def keys_of_codes(codes, books):
    """The keys `[n, D]` that codes `[n, P]` of one head stand for, in float64."""
    return torch.stack([torch.cat([book[code] for book, code in zip(books, row, strict=True)]) for row in codes.long()])


def summarized_problem(codec, pages, count, kind, sharing, ratio, mask=None, queries=1, page=64):
    """A problem over two sequences of random pages with random summaries, near those of the pages."""
    if codec == "affine":
        key, value = (segments(which, 4, 3, pages, 10, 64, page, 16) for which in ("key", "value"))
    else:
        frame = 2 * page if codec == "frames" else None
        key, value = coded_pair(["6543", "3322"], 3, pages, 10, page=page, frame=frame, exact=2)
    held = key.packed
    states, books = held.select(0, pages, torch.float32), None
    if kind == "codes":
        summary, books = codes_of(states)
    else:
        summary = in_a_poisoned_buffer(summary_of(states, kind))
    key = replace(key, packed=Summarized(held, summary, count, sharing, books))
    query = torch.randn(2, 2 * ratio, queries, 64)
    return AttentionProblem(query, key, value, 0.3, mask)


def hidden_by_choice(problem):
    """Which tokens `[B, H, 1, T]` the query does not read, and the pages `[B, H_kv]` that it does, as sets."""
    pages, ratio = problem.key.packed, problem.ratio
    start, page = problem.key.sinks, pages.page
    query, summary = problem.query[:, :, 0].double() * problem.scaling, pages.summary.double()
    weights = torch.zeros(problem.batch, problem.heads, pages.pages, dtype=torch.float64)
    for row in range(problem.batch):
        for head in range(problem.heads):
            logits = []
            for number in range(pages.pages):
                own = summary[row, head // ratio, number]
                if pages.books is not None:
                    own = keys_of_codes(own, pages.books[row, head // ratio].double())
                products = query[row, head] * own
                at = start + number * page
                seen = problem.mask is None or problem.mask[row, 0, 0, at : at + page].any()
                best_key = products.amax(0).sum() if pages.books is None else products.sum(-1).max()
                logits.append(best_key if seen else torch.tensor(-torch.inf).double())
            weights[row, head] = torch.stack(logits).softmax(-1)
    hidden = torch.zeros(problem.batch, problem.heads, 1, problem.key.shape[2], dtype=torch.bool)
    hidden[..., start : start + pages.tokens] = True
    chosen = {}
    for row in range(problem.batch):
        for head in range(problem.kv_heads):
            own = weights[row] if pages.sharing == "layer" else weights[row, head * ratio : (head + 1) * ratio]
            worth = own.amax(0) if pages.sharing == "max" else own.sum(0)
            best = sorted(range(pages.pages), key=lambda number: -worth[number])[: pages.count]
            chosen[row, head] = set(best)
            for number in best:
                at = start + number * page
                hidden[row, head * ratio : (head + 1) * ratio, :, at : at + page] = False
    return hidden, chosen
