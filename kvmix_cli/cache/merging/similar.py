"""Rules by which each dropped token joins the one with the most similar key."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..archive import Archive
from ..buffer import lasting
from ..observation import AttentionCall
from .base import MERGES, LeavingTokens, Merge, Merging


@MERGES.register("d2o")
class SimilarMerging(Merging):
    """Each dropped token joins the one with the most similar key, if it is similar enough (D2O, arXiv 2406.13035).

    With cosines `u_i` of the dropped keys, the threshold is `t = mean u_i` at first and `t <- (t + mean u_i) / 2`
    whenever tokens are dropped (section 3.3, both factors 1/2 as in its code). Those with `u_i >= t` are merged, keys
    and values alike: `k <- (e k + sum exp(u_i) k_i) / (e + sum exp(u_i))`. Differs: each KV head has a threshold of
    its own, and a threshold moves once a flush, not once a token. The released code is not the paper's rule: its
    weights are `u_i` beside 1 of the token that stays, over their number, and heads are compared in their mean.
    """

    of_head = 1

    def __init__(self) -> None:
        super().__init__()
        self.threshold: Tensor | None = None  # [B, H_kv] float32, NaN before anything has been dropped

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.threshold is None else self.threshold.nbytes)

    @lasting
    def see(self, call: AttentionCall, kv_heads: int) -> None:
        """Note the padding, see `Merging.see`, and start without a threshold."""
        super().see(call, kv_heads)
        if self.threshold is None:
            self.threshold = torch.full((call.query.shape[0], kv_heads), torch.nan, device=call.query.device)

    def merge(self, leaving: LeavingTokens) -> Merge:
        into, cosines = leaving.nearest()
        enough = cosines >= self._moved(cosines)[..., None]
        return Merge.of_shares(leaving, into, torch.where(enough, cosines.exp(), 0.0), own=math.e)

    def exchange(self, archive: Archive) -> None:
        """Give padding and thresholds to an archive, or take them from one."""
        super().exchange(archive)
        self.threshold = archive.tensor("threshold", self.threshold, archive.rows, torch.float32)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to padding and thresholds."""
        super().apply(change)
        self.threshold = None if self.threshold is None else change(self.threshold)

    @lasting
    def _moved(self, cosines: Tensor) -> Tensor:
        """Return the thresholds `[B, H_kv]`, moved towards the mean of finite cosines, if there are any."""
        if self.threshold is None:
            raise AssertionError("the layer has been shown a forward")
        mean = cosines.masked_fill(cosines == -torch.inf, torch.nan).nanmean(-1).float()
        old = torch.where(self.threshold.isnan(), mean, self.threshold)
        self.threshold = torch.where(mean.isnan(), old, (old + mean) / 2)
        return self.threshold


@MERGES.register("look-m")
class AveragedMerging(Merging):
    """Each dropped token joins the one with the most similar key, in a plain mean (LOOK-M, arXiv 2406.18139).

    `k <- (k + sum k_i) / (1 + m)` over the `m` that join it, and values alike: its averaged merging (section 3.3, and
    one of three in the released code, whose pivotal merging first takes the mean of each `k_i` and `k`).
    """

    def merge(self, leaving: LeavingTokens) -> Merge:
        into, cosines = leaving.nearest()
        return Merge.of_shares(leaving, into, (cosines > -torch.inf).to(cosines.dtype))
