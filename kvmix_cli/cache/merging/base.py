"""What rules that merge tokens share: tokens that are dropped go into tokens that stay, before these are stored.

Tokens that leave the window together are merged among themselves, as the model made them: keys after RoPE, before
transforms of the cache. A merge is a linear map over such tokens, so that attention, codecs and kernels see ordinary
tokens. Padding is never merged, nor is anything merged into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import PlanError
from ...plan.merges import declare
from ...registry import Registry
from ..archive import Archive
from ..buffer import lasting
from ..observation import AttentionCall

ROWS_AT_ONCE = 256
"""Dropped tokens whose similarities are computed together; bounds the temporaries of a long prompt."""


@dataclass(frozen=True)
class LeavingTokens:
    """Tokens that leave the window together.

    Attributes:
        keys: `[B, H_kv, n, D]`, as the model made them.
        stays: `[B, H_kv, n]`, True for those that stay: as many in every KV head, and not all.
        count: number of those that are dropped, in every KV head.
        is_token: `[B, 1, n]`, False for padding.
        attention: `[B, H_kv, n]` that they have received; None under a score that looks at no queries.
    """

    keys: Tensor
    stays: Tensor
    count: int
    is_token: Tensor
    attention: Tensor | None = None

    @cached_property
    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Return the places of dropped tokens `[B, H_kv, m]`, and of those that stay `[B, H_kv, n - m]`, ascending."""
        order = self.stays.byte().argsort(dim=-1, stable=True)
        return order[..., : self.count], order[..., self.count :]

    @property
    def dropped(self) -> Tensor:
        """Return the places of the tokens that are dropped, `[B, H_kv, m]`."""
        return self._in_order[0]

    @property
    def kept(self) -> Tensor:
        """Return the places of the tokens that stay, `[B, H_kv, n - m]`."""
        return self._in_order[1]

    @cached_property
    def wide(self) -> Tensor:
        """Return the keys in float32 or float64."""
        return self.keys.to(torch.promote_types(self.keys.dtype, torch.float32))

    @cached_property
    def directions(self) -> Tensor:
        """Return the keys at length 1, float32 or float64."""
        return normalize(self.wide, dim=-1)

    def are_tokens(self, places: Tensor) -> Tensor:
        """Return whether there is no padding at `places` `[B, H_kv, m]`."""
        return self.is_token.expand_as(self.stays).gather(2, places)

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Return the places of the tokens that stay with the most similar keys, and the cosines, `[B, H_kv, m]`.

        The cosine is -inf for padding, and where only padding stays.
        """
        kept = at(self.directions, self.kept).transpose(-1, -2)
        hidden = ~self.are_tokens(self.kept)[:, :, None]
        parts = [
            (at(self.directions, rows) @ kept).masked_fill(hidden, -torch.inf).max(dim=-1)
            for rows in self.dropped.split(ROWS_AT_ONCE, dim=2)
        ]
        cosines = torch.cat([part.values for part in parts], dim=2)
        places = self.kept.gather(2, torch.cat([part.indices for part in parts], dim=2))
        return places, cosines.masked_fill(~self.are_tokens(self.dropped), -torch.inf)


@dataclass(frozen=True)
class Merge:
    """A linear map over tokens that leave the window together: each is `own` of itself, and parts of dropped ones.

    Attributes:
        own: `[B, H_kv, n]`, weight of each token for itself.
        dropped: `[B, H_kv, m]`, places of the dropped tokens.
        into: `[B, H_kv, m, R]`, places of the tokens that each goes into.
        weights: `[B, H_kv, m, R]`, weight of the dropped token there; 0 where nothing is merged.
        has_keys: keys are merged as values are; otherwise they stay as they are.
    """

    own: Tensor
    dropped: Tensor
    into: Tensor
    weights: Tensor
    has_keys: bool = True

    @classmethod
    def of_shares(cls, leaving: LeavingTokens, into: Tensor, shares: Tensor, own: float = 1.0) -> Merge:
        """Return the means of tokens that stay, each with a share of `own`, and of what is dropped into them.

        Args:
            leaving: tokens that leave the window.
            into: `[B, H_kv, m]`, the place that each dropped token goes into.
            shares: `[B, H_kv, m]`, of each dropped token; 0 for those that are not merged.
            own: share of a token that stays.
        """
        totals = torch.full_like(leaving.stays, own, dtype=shares.dtype).scatter_add(2, into, shares)
        return cls(own / totals, leaving.dropped, into[..., None], (shares / totals.gather(2, into))[..., None])

    @property
    def is_changed(self) -> Tensor:
        """Return which tokens have others in them, `[B, H_kv, n]`."""
        return torch.zeros_like(self.own).scatter_add(2, self.into.flatten(2), self.weights.flatten(2)) > 0

    def of(self, states: Tensor) -> Tensor:
        """Return keys or values `[B, H_kv, n, D]` with the dropped ones in those that stay, rounded once."""
        wide = states.to(torch.promote_types(states.dtype, self.own.dtype))
        dropped, merged = at(wide, self.dropped), wide * self.own[..., None]
        for into, weights in zip(self.into.unbind(3), self.weights.unbind(3), strict=True):  # bounds the temporaries
            merged.scatter_add_(2, into[..., None].expand_as(dropped), dropped * weights[..., None])
        return merged.to(states.dtype)


class Merging:
    """A rule that merges tokens of one layer, and what it keeps of each sequence.

    Attributes:
        of_head: numbers that it keeps of each KV head, for the count of bytes.
        weighs: it reads the attention that tokens have received, which not every score of tokens looks at.
        padding: `[B, 1]` int32, number of padding tokens on the left; None before the first forward.
    """

    of_head: ClassVar[int] = 0
    weighs: ClassVar[bool] = False

    def __init__(self) -> None:
        self.padding: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return 0 if self.padding is None else self.padding.nbytes

    def merge(self, leaving: LeavingTokens) -> Merge:
        """Return where the dropped ones of some tokens go."""
        raise NotImplementedError

    @lasting
    def see(self, call: AttentionCall, kv_heads: int) -> None:
        """Note the padding, which no query sees, from the mask of a forward; a single query brings none."""
        if self.padding is None or call.query.shape[2] > 1:
            self.padding = left_padding(call)

    def are_tokens(self, places: Tensor) -> Tensor:
        """Return whether there is no padding at places `[n]` of the cache, `[B, 1, n]`."""
        if self.padding is None:
            raise AssertionError("the layer has been shown the mask of the prompt")
        return places >= self.padding[..., None]

    def exchange(self, archive: Archive) -> None:
        """Give what is kept to an archive, or take it from one."""
        self.padding = archive.tensor("padding", self.padding, (archive.rows[0], 1), torch.int32)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to what is kept."""
        self.padding = None if self.padding is None else change(self.padding)


class _MergeRules(Registry[type[Merging]]):
    """Rules by name; what each keeps is declared to the count of bytes."""

    def add(self, name: str, entry: type[Merging] | str) -> None:
        """Register a class of rules. Raises ValueError if the name is taken."""
        super().add(name, entry)
        if not isinstance(entry, str):
            declare(name, entry.of_head)


MERGES: Registry[type[Merging]] = _MergeRules("rule to merge tokens", PlanError)


def at(states: Tensor, places: Tensor) -> Tensor:
    """Return the tokens of `[B, H_kv, n, D]` at places `[B, H_kv, m]`: `[B, H_kv, m, D]`."""
    return states.gather(2, places[..., None].expand(*places.shape, states.shape[3]))


def left_padding(call: AttentionCall) -> Tensor:
    """Return the number of tokens, `[B, 1]` int32, before the first that the newest query of a call sees."""
    batch, mask = call.query.shape[0], call.mask
    if mask is None or mask.shape[3] == 1:
        return torch.zeros(batch, 1, dtype=torch.int32, device=call.query.device)
    newest = mask[:, 0, -1].expand(batch, -1)
    seen = newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min
    return (seen.cumsum(-1) == 0).sum(-1, keepdim=True, dtype=torch.int32)
