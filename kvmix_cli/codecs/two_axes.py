"""Scales along both axes of a page: groups with scale and zero along one, one scale a row of the other.

Keys in groups along tokens have a scale of each token beside, so that one long token does not coarsen its group;
values in groups along channels have a scale of each channel of the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from kvmix_kernels.layout import PageLayout
from torch import Tensor

from .base import PageCodec, StoredPart
from .packed import pack, unpack


class TwoAxes(PageCodec):
    """Affine codes of `m / a`, where `m` `[rows, columns]` is a page of values, or one of keys transposed.

    `a` has a number for each column, float16 beside the scales: a token of keys, a channel of values. Scale and zero
    of every group are fitted to the codes once, as by the affine encoder `refit`.

    Attributes:
        rounds: times that columns and rows are brought to a root mean square of 1 in turn; what rows need is then in
            the scales of their groups.
    """

    rounds: ClassVar[int]

    @cached_property
    def layout(self) -> PageLayout:
        """Return the rows, columns and groups of a page: those of affine codes."""
        return PageLayout(self.kind, self.bits, self.head_dim, self.page, self.group_size, self.scale_dtype)

    @property
    def parts(self) -> Mapping[str, StoredPart]:
        layout = self.layout
        return {
            "codes": StoredPart((self.code_bytes,)),
            "scales": StoredPart((2, layout.rows, layout.groups), self.scale_dtype),
            "columns": StoredPart((layout.columns,), self.scale_dtype),
        }

    def encode(self, pages: Tensor) -> Mapping[str, Tensor]:
        matrix = self._turned(pages)
        columns = self._column_scales(matrix).to(getattr(torch, self.scale_dtype))
        groups = (matrix / columns.float()).split(self.layout.group, dim=-1)
        scales, codes = zip(*map(self._fitted, groups), strict=True)
        return {
            "codes": pack(torch.cat(codes, dim=-1).flatten(-2), self.bits),
            "scales": torch.stack([torch.cat(each, dim=-1) for each in zip(*scales, strict=True)], dim=-3),
            "columns": columns.squeeze(-2),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = self.layout.rows, self.layout.columns
        codes = unpack(parts["codes"], self.bits, rows * columns).unflatten(-1, (rows, columns))
        scale, zero = (self._spread(each) for each in parts["scales"].float().unbind(-3))
        return self._turned((codes * scale + zero) * parts["columns"].float()[..., None, :])

    def _column_scales(self, matrix: Tensor) -> Tensor:
        """Return the numbers `[..., 1, columns]` that columns are divided by."""
        columns = _rms(matrix, -2)
        for _ in range(self.rounds - 1):
            rows = _rms(matrix / columns, -1)
            columns = _rms(matrix / rows, -2)
        return columns

    def _fitted(self, group: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return scale and zero `[..., rows, 1]` as stored, and codes of a group `[..., rows, n]`."""
        most = (1 << self.bits) - 1
        low, high = group.aminmax(dim=-1, keepdim=True)
        codes = _codes(group, (high - low) / most, low, most)
        deviation = codes - codes.mean(-1, keepdim=True)
        fitted = (deviation * group).sum(-1, keepdim=True) / deviation.square().sum(-1, keepdim=True)
        scale = torch.where(fitted > 0, fitted, (high - low) / most)
        zero = torch.where(fitted > 0, group.mean(-1, keepdim=True) - scale * codes.mean(-1, keepdim=True), low)
        dtype = getattr(torch, self.scale_dtype)
        scale, zero = scale.to(dtype), zero.to(dtype)
        return (scale, zero), _codes(group, scale.float(), zero.float(), most).int()

    def _spread(self, of_groups: Tensor) -> Tensor:
        """Return numbers of groups `[..., rows, groups]` for each of their elements, `[..., rows, columns]`."""
        return of_groups.repeat_interleave(self.layout.group, dim=-1)[..., : self.layout.columns]

    def _turned(self, pages: Tensor) -> Tensor:
        """Swap between `[page, head_dim]` and `[rows, columns]`."""
        return pages.mT if self.kind == "key" else pages


class TokenNorm(TwoAxes):
    """Keys divided by each token's norm (OScaR, arXiv 2605.19660), that of one KV head; there, of all together."""

    rounds = 1

    def check(self) -> None:
        super().check()
        if self.kind == "value":
            raise ValueError("the codec token-norm is for keys: the groups of values have scales of each token anyway")


class BothAxes(TwoAxes):
    """Both axes brought to one size in turn (KVarN, arXiv 2606.03458): rows end in scale and zero."""

    rounds = 8


def _rms(matrix: Tensor, dim: int) -> Tensor:
    """Return root mean squares along an axis, kept with size 1; 1 in place of 0."""
    found = matrix.square().mean(dim, keepdim=True).sqrt()
    return torch.where(found == 0, 1.0, found)


def _codes(group: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    return ((group - zero) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, most)
