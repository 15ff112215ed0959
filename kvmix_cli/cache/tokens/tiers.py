"""The tiers of one layer's tokens, chosen once, when tokens leave the window; keys and values alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvmix_kernels.sorted_tokens import EVICTED
from torch import Tensor

from ...errors import PolicyError
from ...plan.tensors.moments import Rope
from ...plan.tokens import TokenPolicy
from ..archive import Archive
from ..buffer import Buffer
from ..merging import MERGES, LeavingTokens, Merge
from ..observation import AttentionCall
from ..packing.pooled import heads_of_pages
from ..policies.heads import kept_by_head
from .choice import TokenChoice
from .labels import ImageLabels
from .shares import LayerShares


class TokenTiers(TokenChoice):
    """Tiers by shares; `sorted` is `[B, H_kv, T]` uint8, the tier of every token that has left the tail.

    Tokens that are dropped may be merged into those that stay, of the same flush.

    Args:
        policy: token policy with shares.
        page: tokens of a page.
        layer: index of the layer.
        rope: its rotary positions, if the score reads keys before RoPE.

    Attributes:
        shares: of the layers together, if these follow the prompt.
        heads: `[B, 1, N]` int16, the KV head of each page that is held, if heads keep different numbers of tokens.
    """

    _latest: Tensor | None = None
    _merge: Merge | None = None
    shares: LayerShares | None = None

    def __init__(self, policy: TokenPolicy, page: int, layer: int = 0, rope: Rope | None = None) -> None:
        super().__init__(policy, layer, rope)
        self.heads = Buffer()
        self._page = page
        self._labels = None if policy.images is None else ImageLabels()
        self._merging = None if policy.merge is None else MERGES[policy.merge]()
        if self._merging is not None and self._merging.weighs and not self.score.weighs:
            raise PolicyError(
                f"layer {layer}: merge: {policy.merge} weighs by the attention that tokens have received, which the "
                f"score {policy.score} does not look at; use the score attention"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return super().nbytes + self._own_bytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return super().allocated_bytes + self._own_bytes

    @property
    def sorted_tokens(self) -> int:
        return self.sorted.length

    @property
    def needs_queries(self) -> bool:
        """Return whether the model must show its queries, and with them the padding, which is never merged."""
        return super().needs_queries or self._merging is not None

    @property
    def merge(self) -> Merge | None:
        """Return the merge of the tokens that `choose` has just sorted; None if they stay as they are."""
        return self._merge

    def label(self, keys: Tensor, told: Tensor | None) -> None:
        """Note which of the tokens with new keys `[B, H_kv, S, D]` are of an image: those that are told, `[B, m]`."""
        if self._labels is not None:
            self._labels.arrive(keys.shape[0], keys.shape[2], told, keys.device)

    def see(self, call: AttentionCall, kv_heads: int) -> None:
        """Note the padding of a forward's sequences, if tokens are merged."""
        if self._merging is not None:
            self._merging.see(call, kv_heads)

    def choose(self, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Choose and return the tiers `[B, H_kv, n]` uint8 of the tail's oldest tokens.

        Args:
            keys: `[B, H_kv, n, D]`, as the model made them.
            values: `[B, H_kv, n, D_v]`, likewise.
            start: place of the first.
        """
        batch, heads, count, _ = keys.shape
        *counts, evicted = self._counts(count)
        self._merge = None
        if not self.is_sorting:
            own = torch.tensor(len(counts) - 1, dtype=torch.uint8, device=keys.device)
            self._latest = own.expand(batch, heads, count)
        else:
            kept = count - evicted if self.policy.evict else count - counts[-1]
            candidates = self._candidates(keys, values, start, kept)
            ranking = self.score.ranking(candidates, self.policy.granularity)
            order = self._with_images(ranking, start).argsort(dim=-1, descending=True, stable=True)
            in_order = self._in_order(ranking, [*counts, evicted])
            self._latest = torch.empty_like(order, dtype=torch.uint8).scatter_(-1, order, in_order)
            if self._merging is not None and evicted:
                are_tokens = self._merging.are_tokens(candidates.places)
                stays = self._latest != EVICTED
                leaving = LeavingTokens(keys, stays, evicted, are_tokens, candidates.attention)
                self._merge = self._merging.merge(leaving)
        if self._labels is not None:
            self._labels.forget_before(start + count)
        self.sorted.append(self._latest)
        if self.policy.sure is not None:
            self.heads.append(heads_of_pages(self._latest, self._page))
        return self._latest

    def chosen_for_keys(self, values: Tensor) -> Tensor:
        """Return the tiers that `choose` has just chosen for the keys of these tokens."""
        if self._latest is None or self._latest.shape[2] != values.shape[2]:
            raise AssertionError("values leave the tail right after the keys of the same tokens")
        return self._latest

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        super().forget_oldest(count)
        self._latest = self._merge = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        super().apply(change)
        self.heads.apply(change)
        for part in (self._merging, self._labels):
            if part is not None:
                part.apply(change)

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back; see `TokenChoice.crop`."""
        super().crop(count, tail, packed)
        if packed < self.sorted_tokens:  # then all of them have come back
            self.heads.truncate(0)
        self.sorted.truncate(packed)
        if self._labels is not None:
            self._labels.crop(self._arrived, self._arrived - tail)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give the tiers of all `tokens` that have left the tail to an archive, and the statistics, or take them."""
        archive.buffer("tiers", self.sorted, (*archive.rows, tokens), torch.uint8)
        if self.policy.sure is not None:
            batch, kv_heads = archive.rows
            archive.buffer("heads", self.heads, (batch, 1, None), torch.int16, below=kv_heads)
        super().exchange(archive, tokens)
        for name, part in (("merging", self._merging), ("labels", self._labels)):
            if part is not None:
                part.exchange(archive.part(name))

    @property
    def _own_bytes(self) -> int:
        return self.heads.nbytes + sum(part.nbytes for part in (self._merging, self._labels) if part is not None)

    def _counts(self, count: int) -> tuple[int, ...]:
        """Return how many of `count` tokens are in each tier, at the layer's own bits, and evicted."""
        if self.shares is None or not self.is_sorting:
            return self.policy.counts(count)
        first = self.shares.pages(self._layer, count) * self._page
        return (first, count - first) if self.policy.evict else (first, count - first, 0)

    def _in_order(self, ranking: Tensor, counts: list[int]) -> Tensor:
        """Return the tier of each place in the order of a ranking `[B, H_kv, n]`, given each tier's tokens."""
        *tiers, evicted = counts
        if self.policy.sure is not None:
            kept = kept_by_head(ranking, tiers[0], self.policy.sure, self._page)[..., None]
            places = torch.arange(ranking.shape[2], device=ranking.device)
            return torch.where(places < kept, 0, EVICTED).to(torch.uint8)
        sizes = torch.tensor([*tiers, evicted], device=ranking.device)
        numbers = torch.tensor([*range(len(tiers)), EVICTED], dtype=torch.uint8, device=ranking.device)
        in_order = numbers.repeat_interleave(sizes, output_size=ranking.shape[2])
        return in_order.expand_as(ranking)

    def _with_images(self, ranking: Tensor, start: int) -> Tensor:
        """Return a ranking `[B, H_kv, n]` with tokens of an image before, or after, all others: chunks as most are."""
        if self._labels is None:
            return ranking
        count, chunk = ranking.shape[2], self.policy.granularity
        is_image = self._labels.of(start, count).unflatten(1, (count // chunk, chunk)).float().mean(-1) > 0.5
        is_first = is_image.repeat_interleave(chunk, dim=1)[:, None] == (self.policy.images == "first")
        places = ranking.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        ahead: Tensor = is_first.long() * count - places
        return ahead
