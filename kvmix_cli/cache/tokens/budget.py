"""The tokens that one layer keeps of all that have left its window: so many, and of them the most important."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from kvmix_kernels.sorted_tokens import KeptTokens
from torch import Tensor

from ...plan.tensors.moments import Rope
from ...plan.tokens import TokenPolicy
from ..archive import Archive
from ..observation import AttentionCall, visible_at, weight_rows
from ..packing import KeptUnits
from ..statistics import LastRows, QuerySum, beside
from ..store import Store
from .choice import TokenChoice, sample_of


class TokenBudget(TokenChoice):
    """A choice of units of tokens; `sorted` is `[B, H_kv, n]` int32, the positions of the tokens that are kept.

    A unit is a page, whose codes are never rewritten: it is kept or dropped as a whole. New tokens are put into units
    by importance, so that the tokens of a unit are about as important as each other. The importance of a unit is the
    sum over its tokens, or the maximum if the score takes one. A score that follows attention goes on adding what is
    received while a unit is kept (H2O, arXiv 2306.14048, section 4), or if it looks at the last queries only, takes
    theirs, whether they came before the choice that the unit was kept by or after it (MorphKV, arXiv 2503.00979,
    section 3). With another score the importance stays that of the moment at which the tokens left the window.

    Args:
        policy: token policy with a number of tokens to keep.
        kept: tokens between sinks and window.
        unit: tokens that are kept or dropped together; a flush and `kept` are multiples of it.
        layer: index of the layer.
        rope: its rotary positions, if the score reads keys before RoPE.
    """

    def __init__(self, policy: TokenPolicy, kept: int, unit: int, layer: int = 0, rope: Rope | None = None) -> None:
        super().__init__(policy, layer, rope)
        self._kept = kept
        self._unit = unit
        self._tokens = 0
        self._units = self._without_attention()  # importance [B, H_kv, n / unit]
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

    def choose(self, keys: Tensor, values: Tensor, start: int) -> KeptUnits:
        """Choose and return what is kept, of units held and the tail's oldest tokens; see `TokenTiers.choose`."""
        batch, heads, count, _ = keys.shape
        most = min(count, self._kept)
        ranking = self.score.ranking(self._candidates(keys, values, start, most), self.policy.granularity).float()
        tokens = torch.arange(count, device=keys.device).expand(batch, heads, count)
        if self.is_sorting:
            best = ranking.argsort(dim=-1, descending=True, stable=True)[..., :most]
            tokens = best.unflatten(2, (most // self._unit, self._unit)).sort(dim=-1).values.flatten(2)
        units, places = torch.cat([self._held(ranking), self._of_units(ranking.gather(2, tokens))], dim=2), None
        rows, limit = self._rows(tokens), self._kept // self._unit
        if self.is_sorting and units.shape[2] > limit:
            places = units.topk(limit, dim=2).indices.sort(dim=2).values
            units = units.gather(2, places)
            rows = None if rows is None else rows.take_along_dim(places[:, :, None], dim=3)
        self._units = self._without_attention()
        if isinstance(self._units, QuerySum):
            self._units.start(units)
        elif rows is not None:
            self._units.start(rows)
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
        """Add what waiting and kept tokens receive from a forward's queries; see `TokenChoice.learn`."""
        super().learn(call, keys, tokens, store)
        packed = store.segments().packed
        if not self._follows or call.logarithms is None or not isinstance(packed, KeptTokens):
            return
        form = packed.held[0]
        held = form if isinstance(form, Tensor) else form.read(0, form.tokens, torch.float32)
        if not held.shape[2]:
            return
        call = replace(call, mask=visible_at(call, packed.places(0) + store.sinks))
        rows = weight_rows(call, held, held.shape[2], True, sample_of(self.score), self.score.reduce)
        self._units.add(self._of_units(rows.weights), rows.is_sum)

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        super().forget_oldest(count)
        self._latest = None

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back; see `TokenChoice.crop`. If any come back from pages, all do."""
        super().crop(count, tail, packed)
        self._units.take_back(count)
        if packed < self._tokens:
            self._tokens, self._units = packed, self._without_attention()
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

    @property
    def _follows(self) -> bool:
        """Return whether what is kept goes on receiving attention, for the next choice."""
        return self.score.follows and self.policy.when == "always"

    def _without_attention(self) -> QuerySum | LastRows:
        """Return the importance of units before any is known."""
        last = self._last if self._follows else 0
        return LastRows(last, self.score.reduce) if last else QuerySum(self.score.reduce)

    def _held(self, ranking: Tensor) -> Tensor:
        """Return the importance of the units that are held, `[B, H_kv, m]`, in the dtype of a ranking of new tokens."""
        held = self._units.total
        if held is None:
            return ranking.new_zeros(*ranking.shape[:2], self.sorted.length // self._unit)
        return held.mean(1, keepdim=True).expand_as(held) if self.score.heads == "shared" else held

    def _rows(self, tokens: Tensor) -> Tensor | None:
        """Return what the last queries give to held units and to those of new tokens `[B, H_kv, n]`, a row each."""
        received = self.attention.last_rows
        if received is None or not isinstance(self._units, LastRows):
            return None
        new = self._of_units(received.take_along_dim(tokens[:, :, None], dim=3))
        held = self._units.rows
        if held is None:
            held = new.new_zeros(*new.shape[:3], self.sorted.length // self._unit)
        return beside(held, new)

    def _of_units(self, numbers: Tensor) -> Tensor:
        """Return the sum, or the maximum, over the tokens of each unit: `[..., n]` becomes `[..., n / unit]`."""
        units: Tensor = numbers.unflatten(-1, (numbers.shape[-1] // self._unit, self._unit))
        return units.amax(-1) if self.score.reduce == "max" else units.sum(-1)

    def _place(self, positions: Tensor, units: Tensor | None) -> None:
        """Append the positions of new tokens, and keep only those of `units`."""
        self.sorted.append(positions)
        if units is not None:
            within = torch.arange(self._unit, device=positions.device)
            self.sorted.select((units[..., None] * self._unit + within).flatten(2))
