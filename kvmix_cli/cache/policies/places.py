"""Scores of tokens by their place alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .tokens import TOKEN_SCORES, Candidates, TokenScore


@TOKEN_SCORES.register("recency")
class Recency(TokenScore):
    """Position: later tokens are more important, as in a second window in a lower precision."""

    queries = "none"

    def importance(self, tokens: Candidates) -> Tensor:
        return tokens.places.float().expand(tokens.keys.shape[:3])


@TOKEN_SCORES.register("random")
class Random(TokenScore):
    """A number that is drawn for each place, KV head and layer, whatever comes with it: what any score must beat."""

    queries = "none"

    def importance(self, tokens: Candidates) -> Tensor:
        heads = torch.arange(tokens.keys.shape[1], device=tokens.keys.device)[:, None]
        number = tokens.places + ((tokens.layer * 4096 + heads) << 24)
        for factor in (0x45D9F3B3335B369, 0x3335B36945D9F3B):  # mixes every bit into the upper ones, modulo 2^64
            number = (number ^ (number >> 31)) * factor
        return (number >> 40).float().expand(tokens.keys.shape[:3])
