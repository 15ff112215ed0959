"""Results of probes in one sample, as the journal keeps them; `profile.Score` holds their means over all samples."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

from kvmix_kernels.layout import Kind
from pydantic import ConfigDict, Field

Labels = Literal["text", "model"]
"""Labels of the loss: the text's own next tokens, or tokens drawn from the model's predictions."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class TensorResult:
    """One probe's result for one layer's keys, or values.

    Attributes:
        value: importance.
        curve: cost of every choice, by `choice_key`; empty for a probe that does not look at widths.
        heads: importance of every KV head, if it was asked for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    value: Finite
    curve: dict[str, Finite] = field(default_factory=dict)
    heads: tuple[Finite, ...] = ()


class LayerResult(NamedTuple):
    """One probe's results for one layer."""

    k: TensorResult
    v: TensorResult


@dataclass(frozen=True)
class SampleResult:
    """One probe's results for one sample, in every layer that can be quantized.

    Attributes:
        seconds: time it took, with that of the passes that it shared.
        evict: of each layer the cost of evicting shares of its tokens, by share; empty if it was not asked for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    layers: dict[int, LayerResult]
    evict: dict[int, dict[float, Finite]] = field(default_factory=dict)


@dataclass
class PassResults:
    """Results of a shared pass while it goes on.

    Attributes:
        labels: labels of the current backward pass, None outside of one.
        scale: factor of the loss in that pass, by which its gradients are too large.
        found: results by probe, layer and kind.
        seconds: time that each probe took.
    """

    labels: Labels | None = None
    scale: float = 1.0
    found: dict[tuple[str, int, Kind], TensorResult] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, probe: str) -> Iterator[None]:
        """Add the time of this block to a probe's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[probe] += time.perf_counter() - start
