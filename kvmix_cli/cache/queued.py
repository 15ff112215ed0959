"""Queries of decoding steps that wait to be learned from together: one by one they would cost more than attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .buffer import lasting
from .observation import AttentionCall

AT_ONCE = 16
"""Queries that wait at most; they take as many times the memory of one layer's queries."""


@dataclass(frozen=True)
class QueuedCall:
    """A call, with what it could attend to.

    Attributes:
        call: of one query or of several.
        keys: `[B, H_kv, n, D]`, the last `n` of all tokens that there were.
        tokens: number of all of them.
        tail: how many of them were in the tail.
    """

    call: AttentionCall
    keys: Tensor
    tokens: int
    tail: int


class QueryQueue:
    """The calls of decoding steps that have not been learned from yet, oldest first.

    Their keys are views of a tail that grows. Before it packs anything, and before whatever else changes what it holds,
    the queue has to be emptied. What is learned is what would have been learned from each step at once. The first step
    after a longer forward does not wait: it makes one row of that forward's rows, which can no longer be taken back.
    """

    def __init__(self) -> None:
        self._calls: list[QueuedCall] = []
        self._is_decoding = False  # the last call was such a step

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def nbytes(self) -> int:
        """Return the bytes held: of queries and logarithms."""
        return sum(each.nbytes for queued in self._calls for each in _tensors(queued.call))

    def add(self, new: QueuedCall) -> list[QueuedCall]:
        """Let a call wait if it can; return those that are to be learned from now, in order."""
        new = replace(new, call=replace(new.call, query=new.call.query.detach()))
        is_first, self._is_decoding = not self._is_decoding, _can_wait(new.call)
        if is_first or not self._is_decoding:
            return [*self.take(), new]
        due = [] if not self._calls or _is_alike(new.call, self._calls[0].call) else self.take()
        self._calls.append(new)
        return due if len(self._calls) < AT_ONCE else [*due, *self.take()]

    @lasting
    def take(self) -> list[QueuedCall]:
        """Return what waits, and forget it: the last call, which can be taken back, and those before it as one."""
        calls, self._calls = self._calls, []
        if len(calls) < 2:
            return calls
        return [replace(calls[-2], call=_joined([queued.call for queued in calls[:-1]])), calls[-1]]


def _can_wait(call: AttentionCall) -> bool:
    """Return whether a call is of one query that saw all tokens, whatever they were."""
    return call.query.shape[2] == 1 and call.mask is None and call.logarithms is not None


def _is_alike(one: AttentionCall, other: AttentionCall) -> bool:
    """Return whether two calls that can wait can be put together."""
    is_scored_alike = one.scaling == other.scaling and one.softcap == other.softcap
    return is_scored_alike and one.query.shape == other.query.shape and one.query.device == other.query.device


def _joined(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Return calls of one query each as the call of one forward that had all of them."""
    queries, logarithms = zip(*(_tensors(call) for call in calls), strict=True)
    return replace(calls[0], query=torch.cat(queries, dim=2), logarithms=torch.cat(logarithms, dim=2))


def _tensors(call: AttentionCall) -> tuple[Tensor, Tensor]:
    if call.logarithms is None:
        raise AssertionError("calls that wait have logarithms")
    return call.query, call.logarithms
