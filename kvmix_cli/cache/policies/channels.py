"""Scores of key channels by importance, one small class for each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import PlanError
from ...registry import Registry


@dataclass(frozen=True)
class ChannelStatistics:
    """The data that the channels of a KV head are ordered by.

    Attributes:
        keys: `[B, H_kv, n, D]`, the tokens that are packed next, as they are stored.
        query: `[B, H_kv, D]`, mean magnitude of the queries so far, as they meet the stored keys; None for a score
            that needs no queries.
    """

    keys: Tensor
    query: Tensor | None = None


class ChannelScore:
    """A score of key channels: subclass it, and register the subclass in `CHANNEL_SCORES`.

    Attributes:
        needs_queries: the score reads `query`, so the model must attend through kvmix.
    """

    needs_queries: ClassVar[bool] = False

    def importance(self, channels: ChannelStatistics) -> Tensor:
        """Return `[B, H_kv, D]`; more is more important."""
        raise NotImplementedError


CHANNEL_SCORES: Registry[type[ChannelScore]] = Registry("channel score", PlanError)


@CHANNEL_SCORES.register("query-range")
class QueryRange(ChannelScore):
    """`A_d = mean|q_d| * (max k_d - min k_d)`: what rounding a channel does to scores (MixKVQ, 2025)."""

    needs_queries = True

    def importance(self, channels: ChannelStatistics) -> Tensor:
        if channels.query is None:
            raise AssertionError("the score `query-range` needs queries")
        low, high = channels.keys.float().aminmax(dim=2)
        return channels.query * (high - low)


@CHANNEL_SCORES.register("range")
class Range(ChannelScore):
    """`max k_d - min k_d`: the same without queries, to measure what queries add."""

    def importance(self, channels: ChannelStatistics) -> Tensor:
        low, high = channels.keys.float().aminmax(dim=2)
        return high - low


@CHANNEL_SCORES.register("magnitude")
class Magnitude(ChannelScore):
    """`mean|k_d|` (Kitty, 2025)."""

    def importance(self, channels: ChannelStatistics) -> Tensor:
        return channels.keys.float().abs().mean(dim=2)
