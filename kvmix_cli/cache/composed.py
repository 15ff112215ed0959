"""A layer that does more than quantize: it transforms what it stores, and puts tokens into tiers or channels in groups.

The attention function does three things more for it (`attention.py`): it transforms queries to meet the stored keys,
transforms the output back, and shows the layer its queries, which some policies and transforms learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..errors import PolicyError
from ..plan import CacheSettings
from ..plan.policies import TokenPolicy
from ..plan.sizes import budget_unit
from .archive import Archive
from .observation import AttentionCall, QuerySum
from .packing import PolicyFunctions
from .policies import CHANNEL_SCORES, ChannelScore, ChannelStatistics
from .store import ROLLBACK, Store
from .token_budget import TokenBudget
from .token_tiers import TokenTiers
from .transforms import Chain, build
from .watching import WatchingLayer


def is_composed(settings: CacheSettings) -> bool:
    """Return whether a plan's settings ask for more than quantizing."""
    return not (settings.transforms is None and settings.tokens is None and settings.channels is None)


class ComposedLayer(WatchingLayer):
    """Keys and values of one layer with the transforms and policies of its plan.

    Raises:
        PolicyError: in `update`, if a policy needs queries and the model's attention has not shown them.
    """

    _keys: Chain
    _values: Chain
    _queries: QuerySum
    _tokens: TokenTiers | TokenBudget | None = None
    _channels: ChannelScore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make stores, transforms and policies. Raises PlanError."""
        transforms, policy, channels = self.settings.transforms, self.settings.tokens, self.settings.channels
        device, dtype = key_states.device, key_states.dtype
        self._keys = build(transforms, "key", self.index, key_states.shape[-1], device, dtype)
        self._values = build(transforms, "value", self.index, value_states.shape[-1], device, dtype)
        self._tokens = None if policy is None else self._token_choice(policy)
        self._channels = None if channels is None else CHANNEL_SCORES[channels.score]()
        self._queries = QuerySum()
        super().lazy_initialization(key_states, value_states)

    def check(self, softcap: float | None, sinks: Tensor | None) -> None:
        """Raise PolicyError if a transform would change what this kind of attention computes."""
        kind = "soft-caps its scores" if softcap is not None else "has sink logits"
        fault = None
        if self._keys.shifts_scores and not (softcap is None and sinks is None):
            fault = "keys"
        elif self._values.shifts_output and sinks is not None:
            fault, kind = "values", "has sink logits"
        if fault is not None:
            raise PolicyError(
                f"layer {self.index}: this model {kind}, so its {fault} cannot be centered; "
                f"take `center` out of the {fault}' transforms"
            )

    def query(self, query: Tensor) -> Tensor:
        """Return queries `[B, H, S, D]` transformed to meet the stored keys."""
        return self._keys.query(query)

    def output(self, output: Tensor) -> Tensor:
        """Return the output `[B, H, S, D_v]` over stored values, transformed back."""
        return self._values.output(output)

    def restore(self, index: int, states: Tensor) -> Tensor:
        """Return the model's own keys (index 0) or values (1) `[B, H_kv, T, D]` of stored ones."""
        return (self._keys, self._values)[index].restore(states)

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return super().nbytes + self._extra_bytes + (0 if self._tokens is None else self._tokens.nbytes)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        tokens = 0 if self._tokens is None else self._tokens.allocated_bytes
        return super().allocated_bytes + self._extra_bytes + tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._tokens = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. What a long prompt has chosen stays chosen."""
        super().crop(tokens_to_remove)
        if self._stores is None or not tokens_to_remove:
            return
        self._queries.take_back(-tokens_to_remove)
        if self._tokens is not None:
            self._tokens.crop(-tokens_to_remove, self.stores[0].tail_tokens, self.stores[0].packed_tokens)

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        super().exchange(archive, examples)
        for name, chain, example in zip(("k", "v"), (self._keys, self._values), examples, strict=True):
            chain.exchange(archive.part(f"transforms.{name}", example))
        self._queries.exchange(archive.part("queries", examples[0]))
        if self._tokens is not None:
            self._tokens.exchange(archive.part("tiers", examples[0]), self.stores[0].packed_tokens)

    @property
    def _needs_queries(self) -> bool:
        scores = (self._tokens.score if self._tokens else None, self._channels)
        return self._keys.needs_queries or any(score is not None and score.needs_queries for score in scores)

    @property
    def _extra_bytes(self) -> int:
        """Return the bytes that transforms and channel scores keep for each sequence."""
        if self._stores is None:
            return 0
        tensors = [*self._keys.tensors(), *self._values.tensors()]
        return self._queries.nbytes + sum(tensor.nbytes for tensor in tensors)

    def _unshown(self) -> None:
        raise PolicyError(
            f"layer {self.index}: the plan needs the model's queries, and its attention has not shown them; "
            "load the model with attn_implementation='kvmix' (if it has an attention of its own, use a plan whose "
            "policies need no queries)"
        )

    def _token_choice(self, policy: TokenPolicy) -> TokenTiers | TokenBudget:
        kept = self.settings.kept
        return TokenTiers(policy) if kept is None else TokenBudget(policy, kept, budget_unit(self.plan, self.settings))

    def _policy_functions(self) -> tuple[PolicyFunctions, PolicyFunctions]:
        """Return the functions of the plan's policies: values get what was chosen for their keys."""
        keys = values = PolicyFunctions(self._channel_importance)
        tokens, unit = self._tokens, budget_unit(self.plan, self.settings)
        if isinstance(tokens, TokenTiers):
            keys = replace(keys, tiers_of=tokens.choose, sorted=tokens.sorted)
            values = replace(keys, tiers_of=tokens.chosen_for_keys)
        elif tokens is not None:
            keys = replace(keys, kept_of=tokens.choose, sorted=tokens.sorted, unit=unit)
            values = replace(keys, kept_of=tokens.chosen_for_keys)
        return keys, values

    def _channel_importance(self, keys: Tensor) -> Tensor:
        if self._channels is None:
            raise AssertionError("channels have no order without a channel policy")
        return self._channels.importance(ChannelStatistics(keys, self._queries.total))

    def _begin(self, keys: Tensor, values: Tensor, query: Tensor | None) -> None:
        """Store the first tokens; transforms learn from them, and from their queries if any needs these."""
        self._keys.fit(keys, query)
        self._values.fit(values, query)
        self._add(keys, values)

    def _add(self, keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
        segments = super()._add(self._keys.store(keys), self._values.store(values))
        if self._tokens is not None:
            self._tokens.arrive(keys.shape[2])
        return segments

    def _in_step(self, pack: Callable[[Store], int]) -> tuple[int, int]:
        """Let keys and values pack, and forget the statistics of the tokens that have left the tail."""
        counts = super()._in_step(pack)
        if self._tokens is not None:
            self._tokens.forget_oldest(counts[0])
        return counts

    def _learn(self, call: AttentionCall, keys: Tensor, transformed: Callable[[Tensor], Tensor]) -> None:
        """Add a forward's queries to the statistics of the policies."""
        if self._channels is not None and self._channels.needs_queries:
            sizes = transformed(call.query).abs().unflatten(1, (keys.shape[1], -1))
            rows = sizes.sum(2, dtype=torch.float32)
            self._queries.add(rows, final=rows.shape[2] > ROLLBACK)
        if self._tokens is not None and self._tokens.score.needs_queries:
            self._tokens.learn(call, keys, self.get_seq_length(), self.stores[0])

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._apply(change)
        if self._stores is None:
            return
        self._keys.apply(change)
        self._values.apply(change)
        self._queries.apply(change)
        if self._tokens is not None:
            self._tokens.apply(change)
