"""Tokens that are sorted by importance as they leave the window: into tiers, or to be kept in a budget of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from kvmix_kernels.pages import Channels, Packed
from kvmix_kernels.sorted_tokens import KeptTokens, SortedTokens, Tiers
from torch import Tensor

from ...errors import PlanError
from ..archive import Archive
from ..buffer import Buffer
from .base import Packing


class FullPacking(Packing):
    """A tier in full precision, of any number of tokens.

    Args:
        reserve: tokens to make room for at first.
    """

    unit = 1

    def __init__(self, reserve: int = 0) -> None:
        self._states = Buffer(reserve)

    @property
    def tokens(self) -> int:
        return self._states.length

    @property
    def view(self) -> Tensor:
        return self._states.view

    def pack(self, states: Tensor) -> None:
        self._states.append(states)

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        self._states.truncate(keep)
        return self._states.view[:, :, :0]

    def select(self, places: Tensor) -> None:
        self._states.select(places)

    def exchange(self, archive: Archive) -> None:
        archive.buffer("states", self._states, (*archive.rows, None, archive.example.shape[3]))

    def buffers(self) -> Iterator[Buffer]:
        yield self._states


class SortedPacking(Packing):
    """Tokens in forms of their own storage, sorted by importance; some may be evicted.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        forms: storage of each form.
        flush: tokens that are packed together; each form then gets whole units of its own.
    """

    def __init__(self, name: str, forms: Sequence[Packing], flush: int) -> None:
        self.unit = flush
        self._name = name
        self._forms = forms
        self._tokens = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    @abstractmethod
    def view(self) -> SortedTokens:
        """Return what is held, without a copy; there must be something."""

    def pack(self, states: Tensor) -> None:
        self._pack(states)
        self._tokens += states.shape[2]

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        """Forget every token and return the first `keep`: they are in every form, so all have to be read.

        Raises:
            PlanError: if some tokens have been evicted.
        """
        view = self.view
        if view.kept < view.tokens:
            raise PlanError(
                f"{self._name}: the cache cannot go back to {keep} packed tokens, since a token policy has evicted "
                f"{view.tokens - view.kept} of {view.tokens}; use a policy without `evict` and `keep`"
            )
        rest = view.read(0, keep, dtype)
        for form in self._forms:
            form.reopen(0, dtype)
        self._tokens = 0
        return rest

    def cut(self, tokens: int) -> int:
        """Return 0: kept tokens are in every form, so others cannot be forgotten without decoding all."""
        return 0

    def exchange(self, archive: Archive) -> None:
        """Give everything held to an archive, or take it, but for what belongs to the layer: where its tokens are."""
        self._tokens = archive.number("tokens", self._tokens)
        for number, form in enumerate(self._forms):
            form.exchange(archive.part(f"{number}"))

    def buffers(self) -> Iterator[Buffer]:
        for form in self._forms:
            yield from form.buffers()

    @abstractmethod
    def _pack(self, states: Tensor) -> None:
        """Append tokens `[B, H_kv, n, D]` to the forms."""

    @property
    def _held(self) -> tuple[Packed | Channels | Tensor, ...]:
        return tuple(form.view for form in self._forms)  # type: ignore[misc]


class TierPacking(SortedPacking):
    """Tokens in tiers, each of which takes its share once (MiKV, ZipCache).

    Args:
        tiers_of: the tiers `[B, H_kv, n]` uint8 of the tokens `[B, H_kv, n, D]` that are packed next.
        tier_of_token: the tiers of all tokens so far; shared by keys and values, so no part of `buffers`.
        merged: the same tokens, with those that are dropped in those that stay; None where none are merged.
        log_weight: logarithm of the number of tokens that each token of the last tier counts for.
    """

    def __init__(
        self,
        name: str,
        forms: Sequence[Packing],
        flush: int,
        tiers_of: Callable[[Tensor], Tensor],
        tier_of_token: Buffer,
        merged: Callable[[Tensor], Tensor] | None = None,
        log_weight: float = 0.0,
    ) -> None:
        super().__init__(name, forms, flush)
        self._tiers_of = tiers_of
        self._tier_of_token = tier_of_token
        self._merged = merged
        self._log_weight = log_weight

    @property
    def view(self) -> Tiers:
        return Tiers(self._tier_of_token.view[:, :, : self._tokens], self._held, self._log_weight)

    def _pack(self, states: Tensor) -> None:
        tiers = self._tiers_of(states)
        states = states if self._merged is None else self._merged(states)
        for index, form in enumerate(self._forms):
            form.pack(states[tiers == index].view(*states.shape[:2], -1, states.shape[3]))


@dataclass(frozen=True)
class KeptUnits:
    """A choice of what a budget of tokens keeps, of the units that are held and of new tokens.

    Attributes:
        tokens: `[B, H_kv, n]`, the new tokens that are packed, in the order of their units.
        units: `[B, H_kv, m]`, the units that stay, of all that are held after that, in order; None for all of them.
    """

    tokens: Tensor
    units: Tensor | None


class BudgetPacking(SortedPacking):
    """The most important tokens, as many as a budget has; when others take their place, whole units are dropped.

    Args:
        form: storage of the tokens.
        unit: tokens that are kept or dropped together.
        choose: what is kept, given the tokens `[B, H_kv, n, D]` that are packed next.
        positions: of all tokens that are kept; shared by keys and values, so no part of `buffers`.
    """

    def __init__(
        self,
        name: str,
        form: Packing,
        flush: int,
        unit: int,
        choose: Callable[[Tensor], KeptUnits],
        positions: Buffer,
    ) -> None:
        super().__init__(name, [form], flush)
        self._unit = unit
        self._choose = choose
        self._positions = positions

    @property
    def view(self) -> KeptTokens:
        return KeptTokens(self._positions.view, self._held, self._tokens)

    def _pack(self, states: Tensor) -> None:
        choice, form = self._choose(states), self._forms[0]
        form.pack(states.gather(2, choice.tokens[..., None].expand(-1, -1, -1, states.shape[3])))
        if choice.units is None:
            return
        parts = self._unit // form.unit
        within = torch.arange(parts, device=states.device)
        form.select((choice.units[..., None] * parts + within).flatten(2))
