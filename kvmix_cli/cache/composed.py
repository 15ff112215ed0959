"""A layer that does more than quantize: it transforms what it stores, and puts tokens into tiers or channels in groups.

The attention function does three things more for it (`attention.py`): it transforms queries to meet the stored keys,
transforms the output back, and shows the layer its queries, which some policies and transforms learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..errors import CacheError, PolicyError
from ..plan import CacheSettings
from ..plan.sizes import budget_unit
from ..plan.tensors.moments import Rope
from ..plan.tokens import TokenPolicy
from .archive import Archive
from .observation import AttentionCall
from .packing import PolicyFunctions
from .policies import CHANNEL_SCORES, ChannelScore, ChannelStatistics
from .statistics import QuerySum
from .store import ROLLBACK, Store
from .tokens.budget import TokenBudget
from .tokens.prompt_scores import PromptScores
from .tokens.shares import LayerShares
from .tokens.tiers import TokenTiers
from .transforms import Chain, build
from .watching import WatchingLayer

Choice = TypeVar("Choice")


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
    _held: PromptScores | None = None
    _told: Tensor | None = None
    rope: Rope | None = None
    """Rotary positions, if the score of tokens reads keys before RoPE."""
    shares: LayerShares | None = None
    """What this layer keeps beside the others, if their shares follow the prompt."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make stores, transforms and policies. Raises PlanError."""
        transforms, policy, channels = self.settings.transforms, self.settings.tokens, self.settings.channels
        device, dtype = key_states.device, key_states.dtype
        self._keys = build(transforms, "key", self.index, key_states.shape[-1], device, dtype)
        self._values = build(transforms, "value", self.index, value_states.shape[-1], device, dtype)
        self._tokens = None if policy is None else self._token_choice(policy)
        self._channels = None if channels is None else CHANNEL_SCORES[channels.score]()
        if isinstance(self._tokens, TokenTiers):
            self._tokens.shares = self.shares
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

    def label(self, is_image: Tensor) -> None:
        """Take which of the tokens that come next are of an image, `[B, m]` bool, if the plan tells them from text."""
        if self.settings.tokens is not None and self.settings.tokens.images is not None:
            self._told = is_image

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H_kv, S, D]`; see `WatchingLayer.update`. A prompt that is held stays as it is.

        Raises:
            PolicyError: if a prompt that is held is not being read again.
        """
        if self._held is None or self._waiting is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self._check_seen()
        if self._held.part is None:
            self._check_scored()
        keys = self._held.read(self._waiting[0], key_states)
        self._unseen = True
        return self._raw(keys), self._raw(torch.cat([self._waiting[1], value_states], dim=2))

    def observe(self, call: AttentionCall) -> None:
        """Learn from the queries of a forward, see `WatchingLayer.observe`; hold a prompt that is to be scored."""
        is_waiting = self._waiting is not None and self._waiting[0].shape[2] > 1
        if self._held is not None:
            self._unseen = False
            self._held.learn(call)
        elif self._tokens is not None and self._tokens.score.waits and is_waiting:
            self._hold(call)
        else:
            super().observe(call)

    @property
    def held(self) -> PromptScores | None:
        """Return the scores that a prompt waits for; None if no prompt is held."""
        return self._held

    @property
    def prompt(self) -> tuple[Tensor, Tensor]:
        """Return keys and values `[B, H_kv, T, D]` of the prompt that is held, as the model made them."""
        if self._held is None or self._waiting is None:
            raise AssertionError("no prompt is held")
        return self._waiting

    def read_again(self, part: slice | None) -> None:
        """Take what comes next for queries that read a part of the held prompt again; None ends it."""
        if self._held is not None:
            self._held.part = part

    def release(self) -> None:
        """Store and pack the prompt that is held, by the scores that it has been given."""
        if self._held is None or self._waiting is None or self._tokens is None:
            return
        held, waiting = self._held, self._waiting
        self._held = self._waiting = None
        self._add(*waiting)
        tail = self.stores[0].tail_tokens
        self._tokens.attention.start(held.scores[..., held.scores.shape[2] - tail :])
        self._pack_early()

    def _check_scored(self) -> None:
        """Raise PolicyError if a prompt is held that has not been scored."""
        if self._held is not None:
            raise PolicyError(
                f"layer {self.index}: the plan's score of tokens waits for the whole prompt to be scored; leave out "
                "--prefill-chunk, and in Python put the prompt into the cache with kvmix_cli.decoding.feed.fill"
            )

    def _hold(self, call: AttentionCall) -> None:
        """Let a prompt wait until it is scored; transforms and channels learn from it now."""
        if self._waiting is None:
            raise AssertionError("no prompt waits")
        keys, values = self._waiting
        self._unseen = False
        self._keys.fit(keys, call.query)
        self._values.fit(values, call.query)
        self._learn_channels(call, keys.shape[1], self.query)
        if isinstance(self._tokens, TokenTiers):
            self._tokens.see(call, keys.shape[1])
        if self.shares is not None:
            self.shares.see(self.index, call, keys, lambda: None)
        self._held = PromptScores.empty(keys, self.settings.sink)

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
        self._tokens = self._held = self._told = None
        if self.shares is not None:
            self.shares.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. What a long prompt has chosen stays chosen."""
        self._check_scored()
        super().crop(tokens_to_remove)
        if self._stores is None or not tokens_to_remove:
            return
        self._queries.take_back(-tokens_to_remove)
        if self._tokens is not None:
            self._tokens.crop(-tokens_to_remove, self.stores[0].tail_tokens, self.stores[0].packed_tokens)

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        self._check_scored()
        super().exchange(archive, examples)
        for name, chain, example in zip(("k", "v"), (self._keys, self._values), examples, strict=True):
            chain.exchange(archive.part(f"transforms.{name}", example))
        self._queries.exchange(archive.part("queries", examples[0]))
        if self._tokens is not None:
            self._tokens.exchange(archive.part("tiers", examples[0]), self.stores[0].packed_tokens)
        if self.shares is not None:
            self.shares.exchange(archive, self.index)

    @property
    def _needs_queries(self) -> bool:
        learning = (self._tokens, self._channels)
        needed = any(each is not None and each.needs_queries for each in learning)
        return self._keys.needs_queries or self.shares is not None or needed

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
        if kept is None:
            return TokenTiers(policy, self.settings.page, self.index, self.rope)
        return TokenBudget(policy, kept, budget_unit(self.plan, self.settings), self.index, self.rope)

    def _policy_functions(self) -> tuple[PolicyFunctions, PolicyFunctions]:
        """Return the functions of the plan's policies: values get what was chosen for their keys.

        They are partial functions and methods, not closures, so that a copy of this layer has those of its own parts.
        """
        keys = values = PolicyFunctions(self._channel_importance)
        tokens, unit = self._tokens, budget_unit(self.plan, self.settings)
        if isinstance(tokens, TokenTiers):
            shared = replace(keys, sorted=tokens.sorted, heads=tokens.heads)
            merged = partial(self._merged, 0, tokens), partial(self._merged, 1, tokens)
            keys = replace(shared, tiers_of=partial(self._chosen, tokens.choose), merged=merged[0])
            values = replace(shared, tiers_of=tokens.chosen_for_keys, merged=merged[1])
        elif tokens is not None:
            shared = replace(keys, sorted=tokens.sorted, unit=unit)
            keys = replace(shared, kept_of=partial(self._chosen, tokens.choose))
            values = replace(shared, kept_of=tokens.chosen_for_keys)
        return keys, values

    def _chosen(self, choose: Callable[[Tensor, Tensor, int], Choice], stored: Tensor) -> Choice:
        """Return a policy's choice among the tail's oldest tokens, whose keys are stored so, `[B, H_kv, n, D]`."""
        return choose(*self._oldest(stored))

    def _merged(self, index: int, tokens: TokenTiers, stored: Tensor) -> Tensor:
        """Return stored keys (index 0) or values (1) `[B, H_kv, n, D]`, the dropped ones in those that stay.

        Those that nothing is merged into stay as they are, bit for bit.
        """
        merge = tokens.merge
        if merge is None or (index == 0 and not merge.has_keys):
            return stored
        chain = (self._keys, self._values)[index]
        return torch.where(merge.is_changed[..., None], chain.store(merge.of(chain.restore(stored))), stored)

    def _oldest(self, stored: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return keys and values of the tail's oldest tokens as the model made them, and the place of the first.

        Args:
            stored: their keys as they are stored, `[B, H_kv, n, D]`.
        """
        keys, values = self.stores
        oldest = values.segments().tail[:, :, : stored.shape[2]]
        return self._keys.restore(stored), self._values.restore(oldest), keys.sinks + keys.packed_tokens

    def _channel_importance(self, keys: Tensor) -> Tensor:
        if self._channels is None:
            raise AssertionError("channels have no order without a channel policy")
        return self._channels.importance(ChannelStatistics(keys, self._queries.total))

    def _prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores, see `MixedLayer._prepare`, and refuse labels of other sequences."""
        super()._prepare(key_states, value_states)
        if self._told is not None and self._told.shape[0] != key_states.shape[0]:
            raise CacheError(
                f"layer {self.index} was told which tokens of {self._told.shape[0]} sequences are of an image, and was "
                f"given {key_states.shape[0]}; label the ids that the model reads"
            )

    def _begin(self, keys: Tensor, values: Tensor, query: Tensor | None) -> None:
        """Store the first tokens; transforms learn from them, and from their queries if any needs these."""
        self._keys.fit(keys, query)
        self._values.fit(values, query)
        self._add(keys, values)

    def _add(self, keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
        segments = super()._add(self._keys.store(keys), self._values.store(values))
        if self._tokens is not None:
            self._tokens.arrive(keys.shape[2])
        if isinstance(self._tokens, TokenTiers):
            told, count = self._told, keys.shape[2]
            self._tokens.label(keys, None if told is None else told[:, :count])
            self._told = None if told is None or told.shape[1] <= count else told[:, count:]
        return segments

    def _pack_early(self) -> None:
        """Pack a long prompt, see `MixedLayer._pack_early`; not before layers that share with this one have seen it."""
        if self.shares is None or self.shares.are_decided:
            super()._pack_early()

    def _in_step(self, pack: Callable[[Store], int]) -> tuple[int, int]:
        """Let keys and values pack, and forget the statistics of the tokens that have left the tail."""
        counts = super()._in_step(pack)
        if self._tokens is not None:
            self._tokens.forget_oldest(counts[0])
        return counts

    def _learn(self, call: AttentionCall, keys: Tensor, transformed: Callable[[Tensor], Tensor]) -> None:
        """Add a forward's queries to the statistics of the policies."""
        self._learn_channels(call, keys.shape[1], transformed)
        if isinstance(self._tokens, TokenTiers):
            self._tokens.see(call, keys.shape[1])
        if self._tokens is not None:
            self._tokens.learn(call, keys, self.get_seq_length(), self.stores[0])
        if self.shares is not None:
            self.shares.see(self.index, call, keys, self._pack_early)

    def _learn_channels(self, call: AttentionCall, kv_heads: int, transformed: Callable[[Tensor], Tensor]) -> None:
        if self._channels is not None and self._channels.needs_queries:
            sizes = transformed(call.query).abs().unflatten(1, (kv_heads, -1))
            rows = sizes.sum(2, dtype=torch.float32)
            self._queries.add(rows, final=rows.shape[2] > ROLLBACK)

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._apply(change)
        if self._stores is None:
            return
        self._keys.apply(change)
        self._values.apply(change)
        self._queries.apply(change)
        if self._tokens is not None:
            self._tokens.apply(change)
        if self._held is not None:
            self._held.apply(change)
