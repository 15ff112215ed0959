"""A rule by which dropped tokens join a neighbour that stays."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import MERGES, LeavingTokens, Merge, Merging, at


@MERGES.register("kvmerger")
class RunMerging(Merging):
    """Dropped tokens join the most attended one that stays of their run of similar keys (KVMerger, arXiv 2407.08454).

    A run are neighbouring tokens, each of a cosine over 0.75 with the next one. The pivot of a run is its most attended
    token. Weights are those of a Gaussian kernel, `exp(-d_i^2 / 2 s^2)`, with the distance `d_i` of the keys (0 of the
    pivot itself) and `s` the mean distance of those that join it over the square root of 2; values have the weights of
    their keys (section 4; no code of the authors is there to compare the constants with). Differs: the score of tokens
    decides what stays, several of a run perhaps, where the paper keeps the pivot of each run and all tokens that are in
    none; a run in which nothing stays is dropped. Under a score that looks at no queries, the nearest token that stays
    is the pivot.
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
        steps = (leaving.directions[:, :, 1:] * leaving.directions[:, :, :-1]).sum(-1) <= self.similar
        runs = pad(steps.long().cumsum(2), (1, 0))
        into = (
            _nearest(leaving, runs) if leaving.attention is None else _most_attended(leaving, leaving.attention, runs)
        )
        is_joining = ~leaving.stays & leaving.is_token & (into >= 0)
        return into.clamp(min=0).gather(2, leaving.dropped), is_joining.gather(2, leaving.dropped)


def _most_attended(leaving: LeavingTokens, attention: Tensor, runs: Tensor) -> Tensor:
    """Return the place of the most attended token that stays of each token's run `[B, H_kv, n]`; -1 for none."""
    places = torch.arange(runs.shape[2], device=runs.device).expand_as(runs)
    received = attention.masked_fill(~(leaving.stays & leaving.is_token), -torch.inf)
    most = torch.full_like(received, -torch.inf).scatter_reduce(2, runs, received, "amax").gather(2, runs)
    is_pivot = (received == most) & (most > -torch.inf)
    last = torch.full_like(runs, -1).scatter_reduce(2, runs, places.masked_fill(~is_pivot, -1), "amax")
    return last.gather(2, runs)


def _nearest(leaving: LeavingTokens, runs: Tensor) -> Tensor:
    """Return the place of the nearest token that stays of each token's run `[B, H_kv, n]`; -1 for none."""
    count = runs.shape[2]
    places = torch.arange(count, device=runs.device).expand_as(runs)
    is_pivot = leaving.stays & leaving.is_token
    before = places.masked_fill(~is_pivot, -1).cummax(2).values
    after = places.masked_fill(~is_pivot, count).flip(2).cummin(2).values.flip(2)
    distances = []
    for pivots in (before, after):
        inside = pivots.clamp(0, count - 1)
        is_near = (pivots == inside) & (runs.gather(2, inside) == runs)
        distances.append((pivots - places).abs().masked_fill(~is_near, count))
    into = torch.where(distances[0] <= distances[1], before, after)
    return into.masked_fill(torch.minimum(*distances) == count, -1)
