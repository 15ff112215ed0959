"""Numbers of tokens that the KV heads of a layer keep, by the scores of all of their tokens together."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_by_head(ranking: Tensor, kept: int, sure: float, page: int) -> Tensor:
    """Return how many tokens each KV head keeps, `[B, H_kv]` int64, whole pages, `kept` of them in the mean.

    The best `sure * kept` tokens of every head stay, and of all others those with the best scores, whichever head they
    are of (AdaKV, arXiv 2407.11550, section 3.3). Differs: numbers are rounded to pages, the largest remainders up.

    Args:
        ranking: scores of the tokens, `[B, H_kv, n]`.
        kept: tokens that a head keeps in the mean, whole pages.
        sure: part of the mean that every head keeps.
        page: tokens of a page.
    """
    batch, kv_heads, count = ranking.shape
    best = ranking.sort(dim=-1, descending=True).values
    best[..., : int(sure * kept)] = torch.inf
    heads = best.flatten(1).topk(kv_heads * kept, dim=1).indices // count
    numbers = torch.zeros(batch, kv_heads, dtype=torch.int64, device=ranking.device)
    numbers.scatter_add_(1, heads, torch.ones_like(heads))
    pages, remainders = numbers // page, numbers % page
    left = kv_heads * kept // page - pages.sum(1, keepdim=True)
    places = remainders.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (pages + (places < left)) * page
