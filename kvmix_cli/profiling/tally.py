"""What the probes of a shared pass have found in the sample in hand."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvmix_kernels.layout import Kind

from .base import Labels, Numbers, Probe


@dataclass
class Tally:
    """Numbers and seconds by score.

    Attributes:
        labels: of the backward pass that is going on, None outside of one.
        scale: what the mean loss was multiplied with before it.
    """

    labels: Labels | None = None
    scale: float = 1.0
    numbers: dict[tuple[str, int, Kind], Numbers] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def note(self, probe: Probe, layer: int, kind: Kind, numbers: Numbers) -> None:
        """Keep a probe's numbers of one layer's keys, or values."""
        self.numbers[probe.name, layer, kind] = numbers

    @contextmanager
    def timed(self, probe: Probe) -> Iterator[None]:
        """Within this block time passes on a probe's account."""
        start = time.perf_counter()
        yield
        self.seconds[probe.name] += time.perf_counter() - start
