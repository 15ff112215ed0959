"""Scores of tokens that choose a sample of all: what stays stands for what is dropped (`weigh` in a plan)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tokens import TOKEN_SCORES, Candidates, TokenScore

BLOCK = 256
"""Most tokens that are compared with each other; blocks are of one size, and are walked through together."""
LARGEST = 20.0
"""Largest logarithm of a ratio of kernel values, so that long keys do not overflow."""


@TOKEN_SCORES.register("balancekv")
class BalancedHalves(TokenScore):
    """Halves whose attention outputs balance, by a self-balancing walk (BalanceKV, arXiv 2502.07861).

    Tokens of a block get a sign one after the other, + with the chance `1/2 - g sum over j before i of s_j K_ij`, where
    `K_ij = exp(k_i k_j / sqrt d) (v_i v_j + 0.025)` over centred keys; those with + stay, and are halved again until as
    few are left as are kept: the score is the number of rounds that a token has stayed in. Differs: `g = 1 / (2 K_ii)`,
    and where rounds leave more or fewer tokens than are kept, chance decides. Chances are the same for every sequence.
    """

    queries = "none"

    def importance(self, tokens: Candidates) -> Tensor:
        count = tokens.keys.shape[2]
        kernel, rounds = _kernel(tokens), max(1, round(math.log2(count / max(1, tokens.kept))))
        chances = torch.rand(rounds + 1, *tokens.keys.shape[1:3], generator=_chances_of(tokens)).to(kernel)
        scores = torch.zeros_like(kernel[..., 0])
        stays = torch.ones_like(scores, dtype=torch.bool)
        for chance in chances[1:]:
            stays = stays & (_signs(kernel, stays, _blocks(chance.expand(tokens.keys.shape[:3]))) > 0)
            scores = scores + stays
        return scores.flatten(2) + chances[0]


@TOKEN_SCORES.register("subgen")
class Centres(TokenScore):
    """Keys that are far from each other: centres of clusters (SubGen, arXiv 2402.06082, section 2).

    In blocks of up to 256 the key that is farthest from all chosen ones is chosen next, beginning with the one that is
    farthest from the mean (Gonzalez's k-center); the earlier, the more important. Differs: the paper finds centres in
    a stream, and adds samples of each cluster and values by their norm; here every centre counts for as many tokens.
    """

    queries = "none"

    def importance(self, tokens: Candidates) -> Tensor:
        keys = _blocks(tokens.keys.float())
        distance = (keys - keys.mean(3, keepdim=True)).square().sum(-1)
        picks = math.ceil(keys.shape[3] * tokens.kept / tokens.keys.shape[2])
        turns = torch.full_like(distance, -float(picks))
        for turn in range(picks):
            chosen = distance.argmax(-1, keepdim=True)
            turns = turns.scatter(3, chosen, -float(turn))
            centre = keys.gather(3, chosen[..., None].expand(*chosen.shape, keys.shape[4]))
            fresh = (keys - centre).square().sum(-1)
            distance = (fresh if turn == 0 else torch.minimum(distance, fresh)).masked_fill(turns > -picks, -1.0)
        return turns.flatten(2)


def _blocks(states: Tensor) -> Tensor:
    """Return `[B, H_kv, n, ...]` in blocks of one size, `[B, H_kv, blocks, size, ...]`."""
    count = states.shape[2]
    size = next(size for size in range(min(BLOCK, count), 0, -1) if count % size == 0)
    blocks: Tensor = states.unflatten(2, (count // size, size))
    return blocks


def _kernel(tokens: Candidates) -> Tensor:
    """Return BalanceKV's kernel of every two tokens of a block over that of the first with itself, `[..., n, n]`."""
    keys, values = tokens.keys.float(), _blocks(tokens.values.float())
    centred = _blocks(keys - keys.mean(2, keepdim=True))
    logits, products = centred @ centred.mT / keys.shape[3] ** 0.5, values @ values.mT + 0.025
    own, size = (x.diagonal(dim1=-2, dim2=-1)[..., None] for x in (logits, products))
    ratios: Tensor = (logits - own).clamp(max=LARGEST).exp() * products / size
    return ratios


def _signs(kernel: Tensor, is_there: Tensor, chances: Tensor) -> Tensor:
    """Return the signs `[B, H_kv, blocks, n]` of a walk through those tokens of each block that are there; 0 of others.

    Args:
        kernel: `[B, H_kv, blocks, n, n]`, rows divided by the diagonal.
        is_there: `[B, H_kv, blocks, n]`.
        chances: `[B, H_kv, blocks, n]`, uniform on [0, 1).
    """
    signs = torch.zeros_like(chances)
    for token in range(kernel.shape[3]):
        excess = (kernel[..., token, :token] * signs[..., :token]).sum(-1)
        sign = torch.where(chances[..., token] < 0.5 - 0.5 * excess, 1.0, -1.0)
        signs[..., token] = sign * is_there[..., token]
    return signs


def _chances_of(tokens: Candidates) -> torch.Generator:
    """Return a generator for a layer and the place of the first token."""
    return torch.Generator().manual_seed(tokens.layer * 2**24 + tokens.start)
