"""A rule by which dropped tokens join a neighbour that stays."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import MERGES, LeavingTokens, Merge, Merging, at


@MERGES.register("kvmerger")
class RunMerging(Merging):
    """Dropped tokens join the nearest one that stays in their run of similar keys (KVMerger, arXiv 2407.08454).

    A run are neighbouring tokens, each of a cosine over 0.75 with the next one. Weights are those of a Gaussian kernel,
    `exp(-d_i^2 / 2 s^2)`, with the distance `d_i` of the keys (0 of the token itself) and `s` the mean distance of
    those that join it over the square root of 2; values have the weights of their keys (section 4; no code of the
    authors is there to compare the constants with). Differs: what stays
    is decided by the score of tokens, several of a run perhaps, where the paper keeps one of each run and all tokens
    that are in none; a run in which nothing stays is dropped.
    """

    similar: ClassVar[float] = 0.75

    def merge(self, leaving: LeavingTokens) -> Merge:
        into, is_joining = self._pivots(leaving)
        distances = (at(leaving.wide, leaving.dropped) - at(leaving.wide, into)).norm(dim=-1)
        totals = torch.zeros_like(leaving.wide[..., 0])
        sums = totals.scatter_add(2, into, distances * is_joining)
        counts = totals.scatter_add(2, into, is_joining.to(totals.dtype))
        means = (sums / counts.clamp(min=1)).gather(2, into)
        nearness = (-(distances / means.clamp(min=torch.finfo(means.dtype).tiny)).square()).exp()
        return Merge.of_shares(leaving, into, torch.where(is_joining, nearness, 0.0))

    def _pivots(self, leaving: LeavingTokens) -> tuple[Tensor, Tensor]:
        """Return the place that each dropped token goes into, `[B, H_kv, m]`, and whether there is one in its run."""
        count = leaving.stays.shape[2]
        places = torch.arange(count, device=leaving.stays.device).expand_as(leaving.stays)
        is_pivot = leaving.stays & leaving.is_token
        before = places.masked_fill(~is_pivot, -1).cummax(2).values
        after = places.masked_fill(~is_pivot, count).flip(2).cummin(2).values.flip(2)
        steps = (leaving.directions[:, :, 1:] * leaving.directions[:, :, :-1]).sum(-1) <= self.similar
        runs = pad(steps.long().cumsum(2), (1, 0))
        is_dropped = ~leaving.stays & leaving.is_token
        distances = []
        for pivots in (before, after):
            inside = pivots.clamp(0, count - 1)
            is_near = is_dropped & (pivots == inside) & (runs.gather(2, inside) == runs)
            distances.append((pivots - places).abs().masked_fill(~is_near, count))
        into = torch.where(distances[0] <= distances[1], before, after).clamp(0, count - 1)
        is_joining = torch.minimum(*distances) < count
        return into.gather(2, leaving.dropped), is_joining.gather(2, leaving.dropped)
