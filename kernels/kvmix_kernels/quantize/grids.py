"""Definition of the encoders: the scale and zero of each group, from its elements. Every kernel computes the same bits.

`minmax` spans the range of the group. `refit` takes one least-squares step from there: for the codes `q` that the grid
gives the elements `x`, `scale = cov(q, x) / var(q)` and `zero = mean(x) - scale mean(q)` have the least squared error.
`search` takes two such steps from the whole range and from three parts of its middle, and keeps the grid with the least
squared error of all twelve, that of `minmax` among them.

A grid is used as it is stored: rounded to the scale dtype before anything is computed with it. A step that finds only
one code, no positive scale, or nothing finite is not taken. Groups whose `minmax` grid is not finite keep that one,
so that NaN and Inf reach the scales.

Arithmetic is in float32 without contracted multiply-adds. Sums of codes and of their squares are integers; other sums
are in the order of `tree_sum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import Encoder

TINY_SCALE: Final = 2.0**-24
"""The smallest positive float16. Below it a reciprocal may overflow, and the group is constant for all purposes."""
CLIPS: Final = ((1.0, 0.0), (0.85, 0.075), (0.7, 0.15), (0.55, 0.225))
"""Where `search` starts: the share of the range that the grid spans, and the share below it."""
SEARCH_STEPS: Final = 2
"""Least-squares steps from each start of `search`."""


@dataclass(frozen=True)
class AffineGrid:
    """Scale and zero of groups, with the values that are stored, in float32; each `[..., 1]`."""

    scale: Tensor
    zero: Tensor

    @property
    def is_finite(self) -> Tensor:
        """Return which groups have a finite scale and zero."""
        return torch.isfinite(self.scale) & torch.isfinite(self.zero)

    def codes(self, group: Tensor, levels: int) -> Tensor:
        """Return the codes of `[..., n]` elements, in float32; of NaN it is undefined."""
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        return ((group - self.zero) * inverse).round().clamp(0, levels)

    def where(self, condition: Tensor, other: AffineGrid) -> AffineGrid:
        """Return this grid for the groups with the condition, and the other one for the others."""
        return AffineGrid(
            torch.where(condition, self.scale, other.scale), torch.where(condition, self.zero, other.zero)
        )


@dataclass(frozen=True)
class _Group:
    """Groups `[..., n]`, and what every step takes from them."""

    elements: Tensor
    low: Tensor
    levels: int
    dtype: torch.dtype

    def grid(self, scale: Tensor, zero: Tensor) -> AffineGrid:
        """Return the grid that is stored for this scale and zero."""
        scale = torch.where(scale < TINY_SCALE, 0.0, scale)
        zero = zero + 0.0  # of 0 and -0 either may be the minimum: make it 0
        return AffineGrid(scale.to(self.dtype).float(), zero.to(self.dtype).float())

    def step(self, grid: AffineGrid) -> AffineGrid:
        """Return the least-squares grid for the codes of a grid, or that grid where there is none."""
        n, codes, above = self.elements.shape[-1], grid.codes(self.elements, self.levels), self.elements - self.low
        whole = codes.long()
        sum_q, sum_qq = (each.sum(-1, keepdim=True) for each in (whole, whole * whole))
        sum_x, sum_qx = tree_sum(above), tree_sum(codes * above)
        spread = (n * sum_qq - sum_q * sum_q).float()
        scale = self.grid((n * sum_qx - sum_q.float() * sum_x) / spread, self.low).scale
        refitted = self.grid(scale, self.low + (sum_x - scale * sum_q.float()) / n)
        return refitted.where((spread > 0) & (scale > 0) & refitted.is_finite, grid)

    def error(self, grid: AffineGrid) -> Tensor:
        """Return the sum of squared errors, `[..., 1]`."""
        error = grid.codes(self.elements, self.levels) * grid.scale + grid.zero - self.elements
        return tree_sum(error * error)


def grid_of(elements: Tensor, levels: int, dtype: torch.dtype, encoder: Encoder = "minmax") -> AffineGrid:
    """Return the grids of groups.

    Args:
        elements: `[..., n]` float32, a group in each row.
        levels: the largest code.
        dtype: in which scale and zero are stored.
        encoder: how scale and zero are chosen.

    Raises:
        ValueError: for an unknown encoder.
    """
    low, high = elements.aminmax(dim=-1, keepdim=True)
    group = _Group(elements, low, levels, dtype)
    minmax = group.grid((high - low) / levels, low)
    if encoder == "minmax":
        return minmax
    if encoder not in ("refit", "search"):
        raise ValueError(f"encoder must be minmax, refit or search, got {encoder!r}")
    found = group.step(minmax) if encoder == "refit" else _search(group, high - low, minmax)
    return found.where(minmax.is_finite, minmax)


def tree_sum(x: Tensor) -> Tensor:
    """Return the sum over the last axis, `[..., 1]`: the second half is added to the first until one number is left.

    The axis is first filled with zeros to a power of two.
    """
    length = 1 << (x.shape[-1] - 1).bit_length()
    x = pad(x, (0, length - x.shape[-1]))
    while length > 1:
        length //= 2
        x = x[..., :length] + x[..., length:]
    return x


def _search(group: _Group, width: Tensor, minmax: AffineGrid) -> AffineGrid:
    best, least = minmax, torch.full_like(width, torch.inf)
    for share, below in CLIPS:
        grid = group.grid(width * share / group.levels, group.low + width * below)
        for step in range(SEARCH_STEPS + 1):
            grid = group.step(grid) if step else grid
            error = group.error(grid)
            best = grid.where(error < least, best)
            least = torch.where(error < least, error, least)
    return best
