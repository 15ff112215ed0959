"""What a probe is: something that gives every layer's K and V a number for one sample of text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from ..models import LoadedModel


class KV(NamedTuple):
    """One layer's numbers for one sample."""

    k: float
    v: float


Measure = Callable[[Tensor], dict[int, KV]]
"""From token ids `[1, T]`, never padded, to the numbers of every layer that can be quantized."""


class Probe(Protocol):
    """A way to score. Implementations are small frozen dataclasses, one a file."""

    def prepared(self, loaded: LoadedModel) -> AbstractContextManager[Measure]:
        """A block in which the model can be measured; whatever it changes about the model is undone at its end."""
        ...
