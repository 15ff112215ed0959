"""A rule by which only values are merged."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import MERGES, LeavingTokens, Merge, Merging


@MERGES.register("cam")
class ValueMerging(Merging):
    """Values of dropped tokens are spread over the next 32 that stay; keys are not merged (CaM, ICML 2024).

    `v_j <- v_j + p_i v_i / m` for the `m` next tokens that stay, `p_i = min(1, a_i / mean_j a_j)` by the attention `a`
    that tokens have received (section 3.2; 32 as in the released code). Differs: what is expected is added, where the
    paper draws it with `p_i`, and its code adds it where `p_i` is 1; there the mean is over all tokens that stay.
    """

    weighs = True
    next: ClassVar[int] = 32

    def merge(self, leaving: LeavingTokens) -> Merge:
        if leaving.attention is None:
            raise AssertionError("this rule reads the attention of tokens")
        attention = leaving.attention.float()
        ranks = leaving.stays.cumsum(2).gather(2, leaving.dropped)[..., None]  # of the next one among those that stay
        ranks = ranks + torch.arange(self.next, device=ranks.device)
        is_there = ranks < leaving.kept.shape[2]
        last = max(0, leaving.kept.shape[2] - 1)
        into = leaving.kept.gather(2, ranks.clamp(max=last).flatten(2)).view_as(ranks)
        count = is_there.sum(-1).clamp(min=1)
        received = attention.gather(2, into.flatten(2)).view_as(ranks) * is_there
        chance = attention.gather(2, leaving.dropped) * count / received.sum(-1)
        chance = chance.nan_to_num(0.0, posinf=1.0).clamp(max=1.0) * leaving.are_tokens(leaving.dropped)
        weights = is_there * (chance / count)[..., None]
        return Merge(torch.ones_like(attention), leaving.dropped, into, weights, has_keys=False)
