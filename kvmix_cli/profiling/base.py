"""What a probe is. There are three kinds, by what they look at:

    WeightProbe     the loss gradient of each layer's K and V projection               grad-norm
    ChangeProbe     what storing a layer's keys, or values, at a choice would change   taylor, fisher, error
    CacheProbe      a document that is read back through the real cache                loss, kl

Weight and change probes share one forward pass, and one backward pass for each kind of labels. A probe is a small
frozen class in a file of its own, and a line in the registry; see docs/add-a-probe.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from torch import Tensor

from ..models.loading import LoadedModel
from .choices import Grid

if TYPE_CHECKING:
    from transformers import Cache

    from .change import Change

Labels = Literal["text", "model"]
"""What the loss compares the predictions with: the text's own next tokens, or tokens drawn from the model."""


@dataclass(frozen=True)
class Numbers:
    """What one sample says of one layer's keys, or values; `profile.TensorScore` holds their means.

    Attributes:
        value: importance.
        curve: cost of every choice, by `choice_key`; empty for a probe that does not look at widths.
        heads: importance of every KV head, if it was asked for.
    """

    value: float
    curve: dict[str, float] = field(default_factory=dict)
    heads: tuple[float, ...] = ()


class KV(NamedTuple):
    """One layer's numbers for one sample."""

    k: Numbers
    v: Numbers


@dataclass(frozen=True)
class Measured:
    """What a probe finds in one sample, in every layer that can be quantized.

    Attributes:
        seconds: that it took, with those of the passes that it shared.
    """

    seconds: float
    layers: dict[int, KV]


@dataclass(frozen=True)
class Probe(ABC):
    """A way to score.

    Attributes:
        name: in profiles and on the command line.
        unit: of its numbers; `"nats"` for what predicts an increase of the mean loss a token.
    """

    name: ClassVar[str]
    unit: ClassVar[str]


class WeightProbe(Probe):
    """Looks at the loss gradient of the projections that make keys and values."""

    labels: ClassVar[Labels] = "text"

    @abstractmethod
    def score(self, gradient: Tensor) -> Tensor:
        """Importance, a scalar, from the gradient of a projection or of one head's part of it, a matrix."""


class ChangeProbe(Probe):
    """Looks at what each choice changes in one layer, and how the loss reacts to that layer.

    Attributes:
        labels: of the loss; None if gradients are not looked at. A run of such probes alone has no backward pass.
        grid: choices by default.
    """

    labels: ClassVar[Labels | None]
    grid: ClassVar[Grid] = Grid(bits=(1, 2, 3, 4, 8), group_sizes=(32, 64, 128))

    @abstractmethod
    def cost(self, change: Change) -> Tensor:
        """Cost of one choice, a scalar; of all KV heads, or of those that `change` is about."""


class CacheProbe(Probe):
    """Reads documents back through the real cache, with one tensor quantized at a time: exact, and slow.

    Attributes:
        grid: choices by default; few, since each costs a forward pass a tensor.
    """

    grid: ClassVar[Grid] = Grid(bits=(2, 3, 4, 8), group_sizes=(64,))

    @abstractmethod
    def prepared(self, loaded: LoadedModel, ids: Sequence[int], grid: Grid) -> Callable[[Cache], float]:
        """For one document, the function from an empty cache to what reading through it costs."""
