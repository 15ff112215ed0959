"""A layer that does more than quantize: it transforms what it stores, sorts tokens into tiers or channels into runs.

Attention does three things more for it (`attention.py`): queries are transformed to meet the stored keys, the output is
transformed back, and whoever goes by attention is shown the queries. Until a prompt's queries have been seen, its keys
and values wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..errors import PolicyError
from ..plan import CacheSettings
from .buffer import Buffer
from .handle import Handle
from .layer import MixedLayer
from .observing import Attention, rows_of
from .packing import Packing, Sorts
from .policies import CHANNEL_SCORES, ChannelScore, ChannelStatistics
from .sorting import TokenSorter
from .store import ROLLBACK, Store
from .tally import Tally
from .transforms import Chain, build


def is_composed(settings: CacheSettings) -> bool:
    """Whether a plan's settings ask for more than quantizing."""
    return not (settings.transforms is None and settings.tokens is None and settings.channels is None)


class ComposedLayer(MixedLayer):
    """Keys and values of one layer with the transforms and policies of its plan.

    Raises:
        PolicyError: in `update`, if a policy looks at queries and the model's attention has not shown them.
    """

    _keys: Chain
    _values: Chain
    _sorter: TokenSorter | None = None
    _channels: ChannelScore | None = None
    _waiting: tuple[Tensor, Tensor] | None = None
    _unseen = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make stores, transforms and sorters. Raises PlanError."""
        transforms, policy, channels = self.settings.transforms, self.settings.tokens, self.settings.channels
        states = key_states.shape[-1], key_states.device, key_states.dtype
        self._keys = build(transforms, "key", self.index, *states)
        self._values = build(transforms, "value", self.index, value_states.shape[-1], *states[1:])
        self._sorter = None if policy is None else TokenSorter(policy)
        self._channels = None if channels is None else CHANNEL_SCORES.find(channels.score)()
        self._queries = Tally()
        super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values; returns all of them, `[B, H_kv, T, D]`."""
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
        self._check_seen()
        self._unseen = self._needs_queries
        if self.get_seq_length() == 0:
            prompt = key_states.detach(), value_states.detach()
            if self._needs_queries:
                self._waiting = prompt
            else:
                self._begin(*prompt, None)
                self._pack_early()
            return tuple(Handle(Segments(None, None, states), self) for states in (key_states, value_states))  # type: ignore[return-value]
        keys, values = self._add(key_states, value_states)
        if not self._needs_queries:
            self._pack_early()
        return Handle(keys, self, self._keys.restore), Handle(values, self, self._values.restore)

    def check(self, softcap: float | None, sinks: Tensor | None) -> None:
        """Raise PolicyError if a transform would change what this kind of attention computes."""
        kind = "soft-caps its scores" if softcap is not None else "has sink logits" if sinks is not None else None
        if kind is not None and self._keys.shifts_scores:
            raise PolicyError(f"layer {self.index}: this model {kind}, so its keys cannot be centered; leave that out")
        if sinks is not None and self._values.shifts_output:
            raise PolicyError(
                f"layer {self.index}: this model {kind}, so its values cannot be centered; leave that out"
            )

    def query(self, query: Tensor) -> Tensor:
        """Queries `[B, H, S, D]` as they meet the stored keys."""
        return self._keys.query(query)

    def output(self, output: Tensor) -> Tensor:
        """What attention to the stored values, `[B, H, S, D_v]`, stands for."""
        return self._values.output(output)

    def observe(self, attention: Attention) -> None:
        """See the queries of a forward, before or after they are transformed as its keys were."""
        if not self._needs_queries:
            return
        self._unseen = False
        if self._waiting is not None:
            (keys, values), self._waiting = self._waiting, None
            self._begin(keys, values, attention.query)
            self._look(attention, keys, self._keys.query)
        else:
            self._look(attention, self.stores[0].segments().tail, _as_it_is)
        self._pack_early()

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._extra_bytes + (0 if self._sorter is None else self._sorter.nbytes)

    @property
    def allocated_bytes(self) -> int:
        sorter = 0 if self._sorter is None else self._sorter.allocated_bytes
        return super().allocated_bytes + self._extra_bytes + sorter

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._waiting is None else self._waiting[0].shape[2]

    def reset(self) -> None:
        super().reset()
        self._waiting, self._unseen = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. Tiers that a long prompt has chosen stay chosen."""
        self._check_seen()
        super().crop(tokens_to_remove)
        if self._stores is None or not tokens_to_remove:
            return
        self._queries.take_back(-tokens_to_remove)
        if self._sorter is not None:
            self._sorter.crop(-tokens_to_remove, self.stores[0].tail_tokens, self.stores[0].packed_tokens)

    @property
    def _needs_queries(self) -> bool:
        scores = (self._sorter.score if self._sorter else None, self._channels)
        return self._keys.needs_queries or any(score is not None and score.needs_queries for score in scores)

    @property
    def _extra_bytes(self) -> int:
        """Bytes of what transforms and channel scores keep for each sequence."""
        if self._stores is None:
            return 0
        tensors = [*self._keys.tensors(), *self._values.tensors()]
        return self._queries.nbytes + sum(tensor.nbytes for tensor in tensors)

    def _check_seen(self) -> None:
        if self._unseen:
            raise PolicyError(
                f"layer {self.index}: the plan goes by attention, and its model's attention has not shown queries; "
                "load it with attn_implementation='kvmix' (if it has an attention of its own, use a plan without)"
            )

    def _sorts(self) -> tuple[Sorts, Sorts]:
        sorter = self._sorter
        if sorter is None:
            nothing = Sorts(_unsorted, Buffer(), self._channel_importance)
            return nothing, nothing
        keys = Sorts(sorter.sort, sorter.tiers, self._channel_importance)
        return keys, Sorts(sorter.sort_alike, sorter.tiers, self._channel_importance)

    def _store(self, packing: Packing | None, bits: int) -> Store:
        """With tiers, keys and values leave the window together."""
        if self._sorter is not None:
            bits = max(self.plan.k.bits, self.plan.v.bits)
        return super()._store(packing, bits)

    def _channel_importance(self, keys: Tensor) -> Tensor:
        assert self._channels is not None
        return self._channels.importance(ChannelStatistics(keys, self._queries.total))

    def _begin(self, keys: Tensor, values: Tensor, query: Tensor | None) -> None:
        """Store the first tokens; transforms learn from them, and from their queries if any needs these."""
        self._keys.fit(keys, query)
        self._values.fit(values, query)
        self._add(keys, values)

    def _add(self, keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
        """Put new tokens into the stores, and settle what the last ones left to do."""
        self._in_step(Store.settle)
        return self.stores[0].add(self._keys.store(keys)), self.stores[1].add(self._values.store(values))

    def _pack_early(self) -> None:
        self._in_step(Store.pack_early)

    def _in_step(self, pack: Callable[[Store], int]) -> None:
        """Let keys and values pack, and tell the sorter which tokens have left the tail."""
        counts = [pack(store) for store in self.stores]
        if self._sorter is not None:
            self._sorter.left(counts[0])

    def _look(self, attention: Attention, keys: Tensor, stored: Callable[[Tensor], Tensor]) -> None:
        """Take in what the queries say.

        Args:
            attention: with queries that fit `keys`, the last of all tokens, of which some may be sinks.
            stored: makes of its queries what meets the stored keys.
        """
        if self._channels is not None and self._channels.needs_queries:
            rows = stored(attention.query).abs().unflatten(1, (keys.shape[1], -1)).sum(2, dtype=torch.float32)
            self._queries.add(rows, for_good=rows.shape[2] > ROLLBACK)
        if self._sorter is not None and self._sorter.score.needs_queries:
            rows = rows_of(attention, keys, self.get_seq_length(), self._sorter.score.extrapolates)
            tail = self.stores[0].tail_tokens
            self._sorter.observe(rows.last(tail))

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._apply(change)
        if self._stores is None:
            return
        self._keys.apply(change)
        self._values.apply(change)
        self._queries.apply(change)
        if self._sorter is not None:
            self._sorter.apply(change)


def _as_it_is(query: Tensor) -> Tensor:
    return query


def _unsorted(states: Tensor) -> Tensor:
    raise AssertionError("nothing is sorted without a token policy")
