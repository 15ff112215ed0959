"""Setting of a plan that stores important key channels in groups wider than their layer's bits."""

from __future__ import annotations

from collections.abc import Iterator

from kvmix_kernels.layout import WORD_BITS
from pydantic import Field, field_validator, model_validator

from .document.fields import MOST_TOKENS, PolicySetting, Several, known_width

MOST_CHANNELS = 256
"""Channels of a head that can be sorted: their order is stored as uint8."""


class ChannelGroup(PolicySetting):
    """Some of the key channels and their bits: a number of channels, or a share rounded to a multiple of 16."""

    channels: int | None = Field(default=None, ge=WORD_BITS, le=MOST_CHANNELS)
    share: float | None = Field(default=None, gt=0, lt=1)
    bits: int

    _width = field_validator("bits")(known_width)

    @model_validator(mode="after")
    def _has_one_size(self) -> ChannelGroup:
        if (self.channels is None) == (self.share is None):
            raise ValueError("a run needs either channels or a share")
        return self

    def width(self, head_dim: int) -> int:
        """Return the number of channels in a head of `head_dim`."""
        if self.channels is not None:
            return self.channels
        return max(WORD_BITS, round((self.share or 0) * head_dim / WORD_BITS) * WORD_BITS)


class ChannelPolicy(PolicySetting):
    """A sorting of every KV head's key channels into groups by importance.

    Attributes:
        score: measure of importance, a name of `cache/policies`.
        runs: channel groups, the most important channels first. The remaining channels have the layer's own bits.
        refresh: packed tokens after which channels are sorted anew, a multiple of the page; 0 is never.
    """

    score: str = "query-range"
    runs: Several[ChannelGroup]
    refresh: int = Field(default=0, ge=0, le=MOST_TOKENS)

    @field_validator("runs")
    @classmethod
    def _some(cls, runs: tuple[ChannelGroup, ...]) -> tuple[ChannelGroup, ...]:
        if not runs:
            raise ValueError("a channel policy needs runs")
        return runs

    @property
    def weighs_queries(self) -> bool:
        """Return whether every KV head keeps a statistic of its queries for each channel."""
        return self.score == "query-range"

    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Return the channels of each group and the number that remain. Raises ValueError if the head is too small."""
        if head_dim > MOST_CHANNELS:
            raise ValueError(f"channels can be sorted in heads of up to {MOST_CHANNELS}, not of {head_dim}")
        groups = [group.width(head_dim) for group in self.runs]
        rest = head_dim - sum(groups)
        if rest < WORD_BITS or any(width % WORD_BITS for width in (*groups, rest)):
            raise ValueError(
                f"runs of {' + '.join(map(str, groups))} channels do not fit heads of {head_dim}: each run, and the "
                f"channels that remain, must be a multiple of {WORD_BITS}"
            )
        return (*groups, rest)

    def faults(self, page: int) -> Iterator[str]:
        """Yield why channels cannot be sorted anew with pages of `page` tokens."""
        if self.refresh % page:
            yield f"refresh must be a multiple of the page of {page} tokens, got {self.refresh}"
