"""Choices that a curve covers, widths and group sizes, and the tokens that the cache has packed by when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import ClassVar, NamedTuple

from kvmix_kernels.layout import Kind, PageLayout

from ..errors import ModelError
from ..plan import CacheSettings, GroupSize, ModelInfo, TensorPlan
from ..plan.document.strict_yaml import reason
from ..plan.engine_blocks import engine_cache
from ..plan.forms import page_layout
from ..profile import choice_key

REFERENCE = (2, 64)
"""Width and group size where plans begin: a curve's cost there, or as near as there is, counts as importance."""


class Span(NamedTuple):
    """Positions `[start, stop)` whose queries find the same number of packed tokens."""

    start: int
    stop: int
    packed: int


@dataclass(frozen=True)
class Grid:
    """Choices of a curve, and the cache that they are choices of.

    Attributes:
        bits, group_sizes: every pair of them is a choice.
        cache: pages, sinks, window and scale dtype of that cache.
        keeps_exact: that cache keeps some packed tokens exact, if they have transform codes.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[GroupSize, ...]
    cache: CacheSettings = field(default_factory=CacheSettings)
    keeps_exact: ClassVar[bool] = True

    def layouts(self, kind: Kind, head_dim: int) -> dict[str, PageLayout]:
        """Return the layout of every choice by its key, narrowest first.

        A group ends with its row, so several group sizes may be one choice: the key has the size that it really is.

        Raises:
            ModelError: if the heads cannot be packed so.
        """
        try:
            tensors = [TensorPlan(bits=bits, group_size=size) for bits in self.bits for size in self.group_sizes]
            layouts = [page_layout(tensor, kind, self.cache, head_dim) for tensor in tensors]
        except ValueError as error:
            raise ModelError(f"cannot measure what quantizing {kind}s costs: {reason(error)}") from error
        packed = [layout for layout in layouts if layout is not None]
        ordered = sorted(packed, key=lambda layout: (layout.bits, layout.group))
        return {choice_key(layout.bits, layout.group): layout for layout in ordered}

    def check(self, model: ModelInfo) -> None:
        """Raise ModelError if a layer's heads cannot be packed so."""
        for heads in model.geometries:
            self.layouts("key", heads.key_dim)
            self.layouts("value", heads.value_dim)

    def spans(self, tokens: int) -> list[Span]:
        """Return the spans of `tokens` decoded singly whose queries read packed tokens; none if there are too few."""
        found = []
        for packed, positions in groupby(range(tokens), self._packed):
            start, *rest = positions
            found += [Span(start, start + 1 + len(rest), packed)] if packed else []
        return found

    @property
    def shortest(self) -> int:
        """Return the tokens of the shortest text with a prediction that has read something packed."""
        return next(position for position in count() if self._packed(position)) + 2

    def _packed(self, position: int) -> int:
        """Return the tokens after the sinks that are packed when the token at a position is decoded."""
        return self.cache.window.due(max(0, position - self.cache.sink), REFERENCE[0], self.cache.page)


@dataclass(frozen=True)
class EveryPair(Grid):
    """A grid for a serving engine, which packs every token as it is written: each query finds all, its own included.

    Only the first token of a sequence stays as it is, as `plan.engine_blocks` has it.
    """

    cache: CacheSettings = field(default_factory=engine_cache)
    keeps_exact: ClassVar[bool] = False

    def spans(self, tokens: int) -> list[Span]:
        """Return the one span of all queries; each finds the tokens up to its own, as attention is causal."""
        return [Span(0, tokens, tokens - self.cache.sink)]

    @property
    def shortest(self) -> int:
        """Return the tokens of the shortest text with a prediction that has read something packed."""
        return self.cache.sink + 2


def reference(layouts: Mapping[str, PageLayout]) -> str:
    """Return the choice whose cost counts as importance."""

    def distance(key: str) -> tuple[bool, int, int]:
        layout = layouts[key]
        return layout.bits != REFERENCE[0], layout.bits, abs(layout.group - REFERENCE[1])

    return min(layouts, key=distance)
