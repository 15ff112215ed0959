"""Selective reading: the setting of a plan by which a decoded token reads some of the pages."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from .document.fields import MOST_TOKENS, PolicySetting

PARTS, ENTRIES = 2, 64
"""Parts of a key that have a code each, and what a code chooses from; a code takes a byte (PQCache: 2 of 6 bits)."""


class SelectiveReading(PolicySetting):
    """A choice of the packed pages that a decoded token reads, by a summary of their keys; all of them stay.

    Sinks and tail are always read, and a forward of several tokens reads everything.

    Attributes:
        tokens: tokens in the pages that are read, rounded down to whole pages; None for a share.
        share: share of the pages that is read, rounded up; None for a number of tokens.
        summary: the mean of a page's keys, the smallest and the largest number of each channel, or codes of all keys.
        sharing: query heads that choose together: those of a KV head, by their largest weight (`max`) or its sum, or
            all heads of the layer, by the sum.
        skip: first layers of the model, which read everything.
    """

    tokens: int | None = Field(default=None, ge=16, le=MOST_TOKENS)
    share: float | None = Field(default=None, gt=0, le=1)
    summary: Literal["mean", "range", "codes"] = "mean"
    sharing: Literal["max", "sum", "layer"] = "max"
    skip: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_one_size(self) -> SelectiveReading:
        if (self.tokens is None) == (self.share is None):
            raise ValueError("reading needs either tokens or a share of the pages")
        return self

    @property
    def is_coded(self) -> bool:
        """Return whether pages are summarized by codes of their keys."""
        return self.summary == "codes"

    @property
    def numbers(self) -> int:
        """Return the numbers that are kept of each page, KV head and channel of keys; none beside codes."""
        return {"mean": 1, "range": 2, "codes": 0}[self.summary]

    def page_bytes(self, page: int, channels: int, element_bytes: int) -> int:
        """Return the bytes that are kept of each page of `page` tokens and KV head."""
        return PARTS * page if self.is_coded else self.numbers * channels * element_bytes

    def book_bytes(self, channels: int, element_bytes: int) -> int:
        """Return the bytes that are kept of each sequence and KV head: what codes stand for."""
        return ENTRIES * channels * element_bytes if self.is_coded else 0

    def count(self, pages: int, page: int) -> int:
        """Return how many of `pages` pages of `page` tokens are read."""
        if self.tokens is not None:
            return self.tokens // page
        return -int(-Fraction(self.share or 0).limit_denominator(10_000) * pages // 1)

    def faults(self, page: int) -> Iterator[str]:
        """Yield why pages of `page` tokens cannot be read one by one."""
        if self.tokens is not None and self.tokens < page:
            yield f"tokens is {self.tokens}, less than one page of {page}"
