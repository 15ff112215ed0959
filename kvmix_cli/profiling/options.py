"""How to measure, apart from what on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvmix_kernels.layout import BITS

from ..errors import KvmixError
from ..plan import GroupSize
from .base import CacheProbe, ChangeProbe, Probe
from .choices import Grid


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        bits, group_sizes: choices of every curve; None for each probe's own.
        per_head: also score every KV head.
        checkpointing: recompute activations in the backward pass to save memory; None decides by size.
    """

    bits: tuple[int, ...] | None = None
    group_sizes: tuple[GroupSize, ...] | None = None
    per_head: bool = False
    checkpointing: bool | None = None

    def grid(self, probe: Probe) -> Grid | None:
        """The choices of a probe's curve; None for a probe that does not look at widths."""
        if not isinstance(probe, ChangeProbe | CacheProbe):
            return None
        own = probe.grid
        return replace(own, bits=self.bits or own.bits, group_sizes=self.group_sizes or own.group_sizes)

    def check(self, probes: Sequence[Probe]) -> None:
        """Raise KvmixError for an option that these probes have no use for."""
        names = ", ".join(probe.name for probe in probes)
        if wrong := sorted(set(self.bits or ()) - set(BITS)):
            raise KvmixError(f"nothing is stored at {wrong[0]} bits; choose from {', '.join(map(str, BITS))}")
        if (self.bits or self.group_sizes) and not any(map(self.grid, probes)):
            raise KvmixError(f"score {names} does not look at widths; leave out --bits and --group-size")
        if self.checkpointing is not None and not any(getattr(probe, "labels", None) for probe in probes):
            raise KvmixError(f"score {names} has no backward pass; leave out --checkpointing")
        if self.per_head and (whole := [probe.name for probe in probes if isinstance(probe, CacheProbe)]):
            raise KvmixError(f"score {', '.join(whole)} has no scores per head; leave out --granularity head")
