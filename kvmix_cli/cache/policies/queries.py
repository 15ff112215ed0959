"""A score of tokens by the queries that are to come."""

from __future__ import annotations

import torch
from torch import Tensor

from .tokens import TOKEN_SCORES, Candidates, TokenScore, at_positions

FUTURE = range(0, 512, 16)
"""Positions after the tokens over which the rotation of queries is averaged."""


@TOKEN_SCORES.register("expected-attention")
class ExpectedAttention(TokenScore):
    """Attention that is to be expected from queries to come (Expected Attention, arXiv 2510.00636, section 3).

    `S_i = softmax(m_i + s_i / 2) |v_i|`, with m and s the mean and variance of `q·k_i / sqrt d` over queries of
    the prompt, their rotation averaged over the next 512 positions. Differs: the moments are those of a sample of 64
    queries of all heads of a group.
    """

    queries = "prompt"
    before_rope = True

    def importance(self, tokens: Candidates) -> Tensor:
        if tokens.queries is None:
            raise AssertionError("the score `expected-attention` needs queries of the prompt")
        queries, end = tokens.queries, tokens.start + tokens.keys.shape[2]
        places = [torch.full((queries.shape[2],), end + ahead, device=queries.device) for ahead in FUTURE]
        mean = torch.stack([at_positions(queries, tokens.rope, each) for each in places]).mean(0)
        logits = tokens.scaling * mean @ tokens.keys.to(mean.dtype).mT
        expected: Tensor = (logits.mean(2) + logits.var(2, correction=0) / 2).softmax(-1)
        sizes: Tensor = tokens.values.float().norm(dim=-1)
        return expected * sizes
