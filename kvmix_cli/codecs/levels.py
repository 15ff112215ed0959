"""Codes without a zero: levels about 0, times one scale of each token and KV head. `b + 16 / D` stored bits.

They suit channels that are alike, as those of rotated keys and values are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final

import torch
from torch import Tensor

from .base import PageCodec, StoredPart
from .packed import pack, unpack

CLIPS: Final = (1.0, 0.85, 0.7, 0.55)
"""Shares of the largest magnitude that even levels may begin from; as of the affine encoder `search`."""
STEPS: Final = 2
"""Times that a scale is fitted to the codes that it gave."""
LLOYD_STEPS: Final = 300


class ScaledLevels(PageCodec):
    """A table of levels and one scale a token, by least squares: `<x, c> / <c, c>`, `c` the nearest levels.

    That scale is EDEN's (arXiv 2604.18555 compares it with TurboQuant's norm) and costs no byte.
    """

    @property
    def parts(self) -> Mapping[str, StoredPart]:
        return {"codes": StoredPart((self.code_bytes,)), "scales": StoredPart((self.page,), self.scale_dtype)}

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """Return the levels `[2^bits]`, ascending."""

    @abstractmethod
    def starts(self, states: Tensor) -> Iterator[Tensor]:
        """Yield scales `[..., page, 1]` to begin from for states `[..., page, head_dim]`."""

    def encode(self, pages: Tensor) -> Mapping[str, Tensor]:
        pages, levels = pages.contiguous(), self.levels.to(pages.device)
        found = [self._fitted(pages, start, levels) for start in self.starts(pages)]
        scales, codes, errors = (torch.stack(each) for each in zip(*found, strict=True))
        best = errors.argmin(0, keepdim=True)
        scale = scales.gather(0, best).squeeze(0)
        code = codes.gather(0, best.expand_as(codes[:1])).squeeze(0)
        return {"codes": pack(code.flatten(-2), self.bits), "scales": scale.squeeze(-1)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(parts["codes"], self.bits, self.page * self.head_dim)
        levels: Tensor = self.levels.to(codes.device)[codes.long()].unflatten(-1, (self.page, self.head_dim))
        return levels * parts["scales"].float()[..., None]

    def _fitted(self, states: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales `[..., page, 1]` as stored, codes `[..., page, head_dim]`, and squared errors of tokens."""
        dtype, middles = getattr(torch, self.scale_dtype), (levels[1:] + levels[:-1]) / 2
        for _ in range(STEPS):
            chosen = levels[_nearest(states, scale, middles)]
            scale = (states * chosen).sum(-1, keepdim=True) / (chosen * chosen).sum(-1, keepdim=True)
        scale = scale.to(dtype)
        codes = _nearest(states, scale.float(), middles)
        errors = (levels[codes] * scale.float() - states).square().sum(-1, keepdim=True)
        return scale, codes, errors


class EvenLevels(ScaledLevels):
    """Evenly spaced levels, symmetric about 0, from the best of four shares of the token's largest magnitude."""

    @property
    def levels(self) -> Tensor:
        count = 1 << self.bits
        return torch.arange(count).float() - (count - 1) / 2

    def starts(self, states: Tensor) -> Iterator[Tensor]:
        largest = states.abs().amax(-1, keepdim=True) / ((1 << self.bits) - 1) * 2
        yield from (clip * largest for clip in CLIPS)


class GaussianLevels(ScaledLevels):
    """Lloyd-Max levels of a normal distribution, from the token's norm (TurboQuant-MSE, arXiv 2504.19874)."""

    @property
    def levels(self) -> Tensor:
        return gaussian_levels(self.bits)

    def starts(self, states: Tensor) -> Iterator[Tensor]:
        yield states.square().mean(-1, keepdim=True).sqrt()


@cache
def gaussian_levels(bits: int) -> Tensor:
    """Return the `2^bits` levels of least squared error for a standard normal distribution, float32, ascending.

    Lloyd's algorithm in closed form: every level is the mean of the distribution between the middles to its
    neighbours. It begins with the quantiles of a normal distribution of variance 3, optimal for many levels.
    """
    count = 1 << bits
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = torch.special.ndtri(places) * 3**0.5
    for _ in range(LLOYD_STEPS):
        edges = torch.cat(
            [levels.new_tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])]
        )
        density = (-edges.square() / 2).exp() / (2 * torch.pi) ** 0.5
        levels = -density.diff() / torch.special.ndtr(edges).diff()
    found: Tensor = levels.float()
    return found


def _nearest(states: Tensor, scale: Tensor, middles: Tensor) -> Tensor:
    """Return the codes of the levels nearest to `states / scale`; of a token without a scale, those nearest to 0."""
    return torch.bucketize(states / torch.where(scale == 0, 1.0, scale), middles)
