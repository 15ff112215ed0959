"""The tokens that one layer keeps of all that have left its window: so many, and of them the most important."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from kvmix_kernels.segments import KeptTokens
from torch import Tensor

from ..plan.policies import TokenPolicy
from .archive import Archive
from .observation import AttentionCall, QuerySample, QuerySum, visible_at, weight_rows
from .packing import KeptUnits
from .store import Store
from .token_tiers import TokenChoice

SAMPLE = QuerySample()
"""Queries of a prompt that are looked at."""


class TokenBudget(TokenChoice):
    """A choice of units of tokens; `sorted` is `[B, H_kv, n]` int32, the positions of the tokens that are kept.

    A unit is a page, whose codes are never rewritten: it is kept or dropped as a whole. New tokens are put into units
    by importance, so that the tokens of a unit are about as important as each other. The importance of a unit is the
    sum over its tokens; with the score `attention` it goes on growing while the unit is kept (H2O, arXiv 2306.14048,
    section 4), with other scores it is that of the moment at which the tokens left the window.

    Args:
        policy: token policy with a number of tokens to keep.
        kept: tokens between sinks and window.
        unit: tokens that are kept or dropped together; a flush and `kept` are multiples of it.
    """

    def __init__(self, policy: TokenPolicy, kept: int, unit: int) -> None:
        super().__init__(policy)
        self._kept = kept
        self._unit = unit
        self._tokens = 0
        self._units = QuerySum()  # importance [B, H_kv, n / unit]
        self._latest: tuple[int, KeptUnits] | None = None  # number of tokens, and the choice

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return super().nbytes + self._units.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return super().allocated_bytes + self._units.nbytes

    @property
    def sorted_tokens(self) -> int:
        return self._tokens

    def choose(self, keys: Tensor) -> KeptUnits:
        """Choose and return what is kept, of the units held and of the tail's oldest tokens, keys `[B, H_kv, n, D]`."""
        batch, heads, count, _ = keys.shape
        importance = self._importance(keys).float()
        if self.score.counts_places:
            importance = importance + self._tokens
        tokens = torch.arange(count, device=keys.device).expand(batch, heads, count)
        if self.is_sorting:
            best = importance.argsort(dim=-1, descending=True, stable=True)[..., : min(count, self._kept)]
            tokens = best.unflatten(2, (best.shape[2] // self._unit, self._unit)).sort(dim=-1).values.flatten(2)
        new = importance.gather(2, tokens).unflatten(2, (tokens.shape[2] // self._unit, self._unit)).sum(-1)
        held = self._units.total
        units = new if held is None else torch.cat([held, new], dim=2)
        limit, places = self._kept // self._unit, None
        if self.is_sorting and units.shape[2] > limit:
            places = units.topk(limit, dim=2).indices.sort(dim=2).values
            units = units.gather(2, places)
        self._units.start(units)
        self._place((tokens + self._tokens).int(), places)
        self._tokens += count
        choice = KeptUnits(tokens, places)
        self._latest = count, choice
        return choice

    def chosen_for_keys(self, values: Tensor) -> KeptUnits:
        """Return what `choose` has just chosen for the keys of these tokens."""
        if self._latest is None or self._latest[0] != values.shape[2]:
            raise AssertionError("values leave the tail right after the keys of the same tokens")
        return self._latest[1]

    def learn(self, call: AttentionCall, keys: Tensor, tokens: int, store: Store) -> None:
        """Add the attention that tokens in the tail, and those that are kept, receive; see `TokenChoice.learn`."""
        super().learn(call, keys, tokens, store)
        packed = store.segments().packed
        if not self.policy.follows_attention or call.logarithms is None or not isinstance(packed, KeptTokens):
            return
        form = packed.held[0]
        held = form if isinstance(form, Tensor) else form.read(0, form.tokens, torch.float32)
        if not held.shape[2]:
            return
        call = replace(call, mask=visible_at(call, packed.places(0) + store.sinks))
        rows = weight_rows(call, held, held.shape[2], True, SAMPLE)
        self._units.add(rows.weights.unflatten(3, (-1, self._unit)).sum(-1), rows.is_sum)

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        super().forget_oldest(count)
        self._latest = None

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back; see `TokenChoice.crop`. If any come back from pages, all do."""
        super().crop(count, tail, packed)
        self._units.take_back(count)
        if packed < self._tokens:
            self._tokens, self._units = packed, QuerySum()
            self.sorted.truncate(packed)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        super().apply(change)
        self._units.apply(change)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give the positions of what is kept of `tokens` to an archive, and the statistics, or take them."""
        archive.buffer("positions", self.sorted, (*archive.rows, None), torch.int32, below=max(1, tokens))
        self._tokens = tokens
        self._units.exchange(archive.part("units"))
        super().exchange(archive, tokens)

    def _place(self, positions: Tensor, units: Tensor | None) -> None:
        """Append the positions of new tokens, and keep only those of `units`."""
        self.sorted.append(positions)
        if units is not None:
            within = torch.arange(self._unit, device=positions.device)
            self.sorted.select((units[..., None] * self._unit + within).flatten(2))
