"""The base of transforms: a change of keys or values before they are stored, which attention undoes."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import PlanError
from ...registry import Registry
from ..archive import Archive
from ..buffer import lasting


class Transform(ABC):
    """A transform of one layer's keys, or of its values. It learns its state from the first prompt, a row per sequence.

    Results have the dtype of the argument; the arithmetic is in float32, or float64 for float64. Query head `h` reads
    KV head `h // (H / H_kv)`.

    Attributes:
        needs_queries: `fit` needs the queries of the prompt.
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
            query: its queries `[B, H, S, D]`; None where they are not known.

        Raises:
            PlanError: if a tensor of the plan does not fit this model.
            PolicyError: if it needs queries, and they are not known.
        """

    @abstractmethod
    def store(self, states: Tensor) -> Tensor:
        """Return the transformed states `[B, H_kv, S, D]`, which the cache stores."""

    @abstractmethod
    def restore(self, stored: Tensor) -> Tensor:
        """Return the inverse of `store`."""

    @abstractmethod
    def query(self, query: Tensor) -> Tensor:
        """Return queries `[B, H, S, D]`, of keys: `query(q) . store(k)` is `q . k`, plus perhaps a number per query."""

    @abstractmethod
    def output(self, output: Tensor) -> Tensor:
        """Return the attention output `[B, H, S, D]` over stored values as it would be over the values themselves."""

    def tensors(self) -> list[Tensor]:
        """Return the state, `[B, ...]` each. A matrix that all sequences share is not part of it."""
        return [] if self._state is None else [self._state]

    @property
    def constant(self) -> Tensor | None:
        """Return the tensor that the plan or its file gave, the same for all sequences; None if there is none."""
        return None

    def exchange(self, archive: Archive) -> None:
        """Give the state to an archive, or take it. Raises CacheError if the plan gives another constant by now."""
        if self.constant is not None:
            checksum = zlib.crc32(self.constant.cpu().contiguous().numpy().tobytes())
            archive.same("constant", checksum, "a rotation or means of its plan have changed since; put the file back")
        channels, dtype = archive.example.shape[3], wide_dtype(archive.example.dtype)
        self._state = archive.tensor("state", self._state, (*archive.rows, 1, channels), dtype)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to the state."""
        if self._state is not None:
            self._state = change(self._state)


TRANSFORMS: Registry[type[Transform]] = Registry("transform", PlanError)
"""Transforms of a user's own by name, for `kind: own` in plans; each is made without arguments, for one layer."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def for_query_heads(state: Tensor, heads: int) -> Tensor:
    """Return `[B, H_kv, 1, D]` repeated for each query head, `[B, H, 1, D]`."""
    return state.repeat_interleave(heads // state.shape[1], dim=1)
