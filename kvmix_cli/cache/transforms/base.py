"""What a transform is: something done to keys or values before they are stored, and taken back by attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Transform(ABC):
    """Of one layer's keys, or of its values. What it learns from the first prompt is its state, a row a sequence.

    Everything returned has the dtype of what was given; what happens in between is float32, or float64 for float64.
    Query head `h` reads KV head `h // (H / H_kv)`.

    Attributes:
        needs_queries: `fit` wants the queries of the prompt.
        shifts_scores: of keys: every score of a query changes by the same number. Softmax cancels it; a soft-cap
            and sink logits do not.
        shifts_output: of values: `output` is right only where attention weights add up to 1; with sink logits they
            do not.
    """

    needs_queries: bool = False
    shifts_scores: bool = False
    shifts_output: bool = False
    _state: Tensor | None = None

    @abstractmethod
    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Learn from the first prompt, once.

        Args:
            states: its keys, or values, `[B, H_kv, S, D]`.
            query: its queries `[B, H, S, D]`; None where nobody knows them.

        Raises:
            PlanError: if what the plan brings does not fit this model.
            PolicyError: if this model's attention cannot go with it.
        """

    @abstractmethod
    def store(self, states: Tensor) -> Tensor:
        """What the cache stores of `[B, H_kv, S, D]`."""

    @abstractmethod
    def restore(self, stored: Tensor) -> Tensor:
        """The inverse of `store`."""

    @abstractmethod
    def query(self, query: Tensor) -> Tensor:
        """Of keys: `[B, H, S, D]` such that `query(q) . store(k)` is `q . k`, or that plus a number for each query."""

    @abstractmethod
    def output(self, output: Tensor) -> Tensor:
        """Of values: the attention output `[B, H, S, D]` of stored values, as it would be of the values themselves."""

    def tensors(self) -> list[Tensor]:
        """The state, `[B, ...]` each. What all sequences share, such as a matrix, is not part of it."""
        return [] if self._state is None else [self._state]

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to the state."""
        if self._state is not None:
            self._state = change(self._state)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def for_query_heads(state: Tensor, heads: int) -> Tensor:
    """`[B, H_kv, 1, D]` as `[B, H, 1, D]`: each query head's own."""
    return state.repeat_interleave(heads // state.shape[1], dim=1)
