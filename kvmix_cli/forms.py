"""In which forms keys or values are stored, by the plan's settings. Budgets and the cache read the same. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind, PageLayout

if TYPE_CHECKING:
    from .plan import CacheSettings, TensorPlan


@dataclass(frozen=True)
class Form:
    """How some of the tokens between sinks and window are stored.

    Attributes:
        share: of those tokens.
        runs: runs of channels, each as packed pages, or as a number of channels in full precision. One run, but for
            keys that a channel policy cuts.
    """

    share: Fraction
    runs: tuple[PageLayout | int, ...]

    @property
    def is_sorted(self) -> bool:
        """Whether its channels are in an order of their own, which has to be stored."""
        return len(self.runs) > 1 and not self.is_full

    @property
    def is_full(self) -> bool:
        """Whether nothing of it is quantized."""
        return all(isinstance(run, int) for run in self.runs)


def forms(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> tuple[Form, ...]:
    """The forms of a layer's keys or values: those of the tiers, then that of the layer's own bits.

    Raises:
        ValueError: if the head cannot be packed so (its size, or that of a run of channels, is no multiple of 16).
    """
    if cache.tokens is None:
        return (Form(Fraction(1), _runs(tensor, kind, cache, head_dim)),)
    widths = [tier.k if kind == "key" else tier.v for tier in cache.tokens.tiers]
    tensors = [tensor.model_copy(update={"bits": max(bits, tensor.bits)}) for bits in widths]
    shares = cache.tokens.shares[:-1]
    return tuple(
        Form(share, _runs(each, kind, cache, head_dim)) for share, each in zip(shares, (*tensors, tensor), strict=True)
    )


def _runs(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> tuple[PageLayout | int, ...]:
    if kind == "value" or cache.channels is None:
        return (run(tensor, kind, cache, head_dim),)
    bits = [max(run.bits, tensor.bits) for run in cache.channels.runs]
    widths = cache.channels.widths(head_dim)
    tensors = [tensor.model_copy(update={"bits": each}) for each in (*bits, tensor.bits)]
    return tuple(run(each, kind, cache, width) for each, width in zip(tensors, widths, strict=True))


def run(tensor: TensorPlan, kind: Kind, cache: CacheSettings, width: int) -> PageLayout | int:
    """A run of so many channels at a tensor's own bits. Raises ValueError if it cannot be packed."""
    if tensor.bits == FULL_PRECISION_BITS:
        return width
    size = cache.group_size if tensor.group_size is None else tensor.group_size
    return PageLayout(
        kind=kind,
        bits=tensor.bits,
        head_dim=width,
        page=cache.page,
        group_size=None if size == "row" else size,
        scale_dtype=cache.scale_dtype,
    )
