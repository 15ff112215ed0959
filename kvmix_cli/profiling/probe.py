"""Probes: ways to score how much each layer's keys and values matter.

There are four kinds, by what they look at:

    WeightProbe     the loss gradient of each layer's K and V projection                  grad-norm
    ChangeProbe     the change that storing a layer's keys, or values, at a choice makes  taylor, fisher, error
    MetricProbe     moments of keys and values, and of the loss gradient for them         fisher-metric, codebooks
    CacheProbe      a document that is read back through the real cache                   loss, kl

All but cache probes share one forward pass, and one backward pass for each kind of labels. A probe is a small
frozen class in a file of its own, and a line in the registry; see docs/add-a-probe.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import Cache

from ..models.loading import LoadedModel
from ..plan.tensors.moments import TensorMoments
from .change import Change
from .grid import Grid
from .results import Labels


@dataclass(frozen=True)
class Probe(ABC):
    """A way to score.

    Attributes:
        name: name in profiles and on the command line.
        unit: unit of the numbers; `"nats"` for a predicted increase of the mean loss a token.
        samples: samples of text by default.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    samples: ClassVar[int] = 30


class WeightProbe(Probe):
    """A probe of the loss gradient of the projections that make keys and values."""

    labels: ClassVar[Labels] = "text"

    @abstractmethod
    def score(self, gradient: Tensor) -> Tensor:
        """Return the importance, a scalar, from the gradient of a projection or of one head's part of it, a matrix."""


class ChangeProbe(Probe):
    """A probe of the change that each choice makes in one layer, and of how the loss reacts to it.

    Attributes:
        labels: labels of the loss; None if gradients are not looked at. A run of such probes alone has no backward
            pass.
        grid: choices by default.
    """

    labels: ClassVar[Labels | None]
    grid: ClassVar[Grid] = Grid(bits=(1, 2, 3, 4, 8), group_sizes=(32, 64, 128))

    @abstractmethod
    def cost(self, change: Change) -> Tensor:
        """Return the cost of one choice, a scalar; of all KV heads, or of those that `change` is about."""


class MetricProbe(Probe):
    """A probe of the moments of each layer's keys and values, which the profile keeps as tensors.

    Attributes:
        labels: labels of the loss.
        grid: the cache; there are no choices.
        samples: samples by default; fewer, since every token of a sample tells about all directions. Plans of ten lose
            an eighth to a quarter more (docs/transform-coding.md).
        keeps_tokens: some tokens of every sample are kept, too, and codebooks are learned from them; moments are not.
    """

    labels: ClassVar[Labels] = "model"
    keeps_tokens: ClassVar[bool] = False
    grid: ClassVar[Grid] = Grid(bits=(), group_sizes=())
    samples = 20

    @abstractmethod
    def score(self, moments: TensorMoments) -> list[float]:
        """Return the importance of every KV head, which add up, from the moments of one sample."""


class CacheProbe(Probe):
    """A probe that reads documents back through the real cache, one tensor quantized at a time: exact, and slow.

    Attributes:
        grid: choices by default; few, since each costs a forward pass a tensor.
    """

    grid: ClassVar[Grid] = Grid(bits=(2, 3, 4, 8), group_sizes=(64,))

    @abstractmethod
    def prepared(self, loaded: LoadedModel, ids: Sequence[int], grid: Grid) -> Callable[[Cache], float]:
        """Return, for one document, the function from an empty cache to the cost of reading through it."""
