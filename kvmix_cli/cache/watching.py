"""A layer that learns from the queries of its model before it packs.

The attention function shows it the queries of each forward (`attention.py`). Until a prompt's queries have been seen,
its keys and values wait. What is learned, and what it decides, is up to the kinds of layer in `composed.py` and
`coded.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from kvmix_kernels.segments import Segments
from torch import Tensor

from .archive import Archive
from .handle import Handle
from .layer import MixedLayer
from .observation import AttentionCall


class WatchingLayer(MixedLayer):
    """Keys and values of one layer that wait for the queries of their forward."""

    _waiting: tuple[Tensor, Tensor] | None = None
    _unseen = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values and return all of them, `[B, H_kv, T, D]`; see `MixedLayer.update`."""
        self._check_seen()
        self._prepare(key_states, value_states)
        self._unseen = self._needs_queries
        if self.get_seq_length() == 0:
            prompt = key_states.detach(), value_states.detach()
            if self._needs_queries:
                self._waiting = prompt
            else:
                self._begin(*prompt, None)
                self._pack_early()
            return self._raw(key_states), self._raw(value_states)
        keys, values = self._add(key_states, value_states)
        if not self._needs_queries:
            self._pack_early()
        return self._stored(0, keys), self._stored(1, values)

    def check(self, softcap: float | None, sinks: Tensor | None) -> None:
        """Raise PolicyError if this kind of attention cannot read the layer."""

    def query(self, query: Tensor) -> Tensor:
        """Return queries `[B, H, S, D]` as they meet the stored keys."""
        return query

    def output(self, output: Tensor) -> Tensor:
        """Return the output `[B, H, S, D_v]` over stored values as the model expects it."""
        return output

    def restore(self, index: int, states: Tensor) -> Tensor:
        """Return the model's own keys (index 0) or values (1) `[B, H_kv, T, D]` of stored ones."""
        return states

    def observe(self, call: AttentionCall) -> None:
        """Learn from the queries of a forward: a prompt's as the model made them, later ones as `query` gave them."""
        if not self._needs_queries:
            return
        self._unseen = False
        if self._waiting is not None:
            (keys, values), self._waiting = self._waiting, None
            self._begin(keys, values, call.query)
            self._learn(call, keys, self.query)
        else:
            self._learn(call, self.stores[0].segments().tail, lambda query: query)
        self._pack_early()

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return super().get_seq_length() if self._waiting is None else self._waiting[0].shape[2]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._waiting, self._unseen = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. What a long prompt has chosen stays chosen."""
        self._check_seen()
        super().crop(tokens_to_remove)

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        self._check_seen()
        super().exchange(archive, examples)

    @property
    @abstractmethod
    def _needs_queries(self) -> bool:
        """Return whether anything is learned from queries."""

    @abstractmethod
    def _learn(self, call: AttentionCall, keys: Tensor, transformed: Callable[[Tensor], Tensor]) -> None:
        """Learn from a forward's queries.

        Args:
            call: with queries that fit `keys`, the last of all tokens, of which some may be sinks.
            keys: `[B, H_kv, n, D]`.
            transformed: transforms its queries to meet the stored keys.
        """

    @abstractmethod
    def _unshown(self) -> None:
        """Go on after a forward whose attention has not shown its queries, or raise PolicyError."""

    def _check_seen(self) -> None:
        if self._unseen:
            self._unshown()

    def _begin(self, keys: Tensor, values: Tensor, query: Tensor | None) -> None:
        """Store the first tokens."""
        self._add(keys, values)

    def _read(self, index: int) -> Tensor | None:
        if self._waiting is None:
            return super()._read(index)
        waiting = self._waiting
        return Handle(Segments(None, None, waiting[index]), self, is_current=lambda: self._waiting is waiting)

    def _handle(self, index: int, segments: Segments, is_current: Callable[[], bool] | None) -> Handle:
        return Handle(segments, self, lambda states: self.restore(index, states), is_current)

    def _stored(self, index: int, segments: Segments) -> Handle:
        return self._handle(index, segments, None)

    def _raw(self, states: Tensor) -> Handle:
        return Handle(Segments(None, None, states), self)

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._apply(change)
        if self._waiting is not None:
            self._waiting = change(self._waiting[0]), change(self._waiting[1])
