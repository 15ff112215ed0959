"""Scores of tokens by the geometry of their keys: they look at no queries, or at little of what these say.

Before RoPE keys differ by what tokens are, after it also by where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .tokens import TOKEN_SCORES, Candidates, TokenScore

RIDGE = 1e-3
"""Share of the mean of a Gram matrix's diagonal that is added to it: with fewer tokens than channels it is singular."""
BLOCK = 1024
"""Tokens among which similarities are computed, all with all."""
LAZY = 3.0
"""`log(1 / eps)` of a stochastic greedy search: each step tries the best of so many times `n / k` candidates."""


@TOKEN_SCORES.register("keydiff")
class KeyDifference(TokenScore):
    """Keys that differ from the mean key: `S_i = -cos(k_i, mean over j of k_j / |k_j|)` (KeyDiff, arXiv 2504.15364).

    Differs: keys are taken before RoPE.
    """

    queries = "none"
    before_rope = True

    def importance(self, tokens: Candidates) -> Tensor:
        unit = normalize(tokens.keys_before_rope, dim=-1)
        return -(unit * normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1)


@TOKEN_SCORES.register("leverage")
class Leverage(TokenScore):
    """Keys that the others do not span: `S_i = x_i^T (X^T X + r I)^-1 x_i`, x centred keys before RoPE, max pool 7.

    After Compactor (arXiv 2507.08143, section 3), which estimates it with a random sketch; here it is exact.
    """

    queries = "none"
    pool = ("max", 7)
    before_rope = True

    def importance(self, tokens: Candidates) -> Tensor:
        x = tokens.keys_before_rope - tokens.keys_before_rope.mean(2, keepdim=True)
        gram = x.mT @ x
        ridge = (RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=1e-12)
        factor = torch.linalg.cholesky(gram + ridge[..., None, None] * torch.eye(x.shape[3], device=x.device))
        spanned: Tensor = torch.linalg.solve_triangular(factor, x.mT, upper=False)
        return spanned.square().sum(2)


@TOKEN_SCORES.register("key-norm")
class SmallKeys(TokenScore):
    """Small keys: `S_i = -|k_i|` (Devoto et al., arXiv 2406.11430, section 3)."""

    queries = "none"

    def importance(self, tokens: Candidates) -> Tensor:
        sizes: Tensor = tokens.keys.float().norm(dim=-1)
        return -sizes


@TOKEN_SCORES.register("bumblebee")
class FacilityLocation(TokenScore):
    """Keys that stand for all others, and attention, greedily (BumbleBee, COLM 2024).

    Maximizes `sum_i max over j in S of cos(k_i, k_j) + sqrt(n sum over j in S of a_j)`, k before RoPE, a the share of
    the attention received. Tokens are chosen one after the other, each the best of a random few (stochastic greedy,
    arXiv 1409.7938), within blocks of 1024; the earlier, the more important. Differs: no streaming, equal weights.
    """

    before_rope = True

    def importance(self, tokens: Candidates) -> Tensor:
        count = tokens.keys.shape[2]
        unit, share = normalize(tokens.keys_before_rope, dim=-1), normalize(tokens.received, p=1, dim=-1)
        blocks = zip(unit.split(BLOCK, dim=2), share.split(BLOCK, dim=2), strict=True)
        return torch.cat([_greedy(keys, of, math.ceil(keys.shape[2] * tokens.kept / count)) for keys, of in blocks], 2)


def _greedy(unit: Tensor, share: Tensor, picks: int) -> Tensor:
    """Return minus the turn in which each of some tokens is chosen, as a share of all turns; -2 for those that are not.

    Args:
        unit: `[B, H, n, D]`, keys of length 1.
        share: `[B, H, n]`, attention of each.
        picks: tokens to choose.
    """
    similar, count = (unit @ unit.mT).clamp(min=0), unit.shape[2]
    turns, covered = torch.full_like(share, -2.0), torch.zeros_like(share)
    attended = torch.zeros_like(share[..., :1])
    generator = torch.Generator().manual_seed(0)
    tries = min(count, math.ceil(LAZY * count / max(1, picks)))
    for turn in range(picks):
        draw = torch.rand(count, generator=generator).to(share)  # the same for every sequence, whatever its neighbours
        few = torch.where(turns > -2.0, -1.0, draw).topk(tries, dim=-1).indices
        rows = similar.gather(2, few[..., None].expand(*few.shape, count))
        gain = (rows - covered[:, :, None]).clamp(min=0).sum(-1)
        gain = gain + (count * (attended + share.gather(2, few))).sqrt() - (count * attended).sqrt()
        best = gain.masked_fill(turns.gather(2, few) > -2.0, -1.0).argmax(-1, keepdim=True)
        token = few.gather(2, best)
        covered = torch.maximum(covered, similar.gather(2, token[..., None].expand(*token.shape, count))[:, :, 0])
        attended = attended + share.gather(2, token)
        turns = turns.scatter(2, token, -turn / picks)
    return turns
