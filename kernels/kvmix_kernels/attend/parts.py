"""Parts of an attention problem: attention over tokens in tiers is attention over each tier, merged by one softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pages import Channels, Coded, Packed
from ..pooled import PooledTokens
from ..segments import Segments
from ..sorted_tokens import SortedTokens, Tiers, count
from ..summaries import ChosenPages
from .problem import AttentionProblem


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the tokens of a problem: keys and values that are not in tiers, and the mask over them.

    Attributes:
        key: segments of `[B, H_kv, T, D]`, where `T` are this part's tokens.
        value: segments of `[B, H_kv, T, D_v]`.
        mask: broadcastable to `[B, H, S, T]`; None is causal, the queries being the part's last tokens.
    """

    key: Segments
    value: Segments
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Number of tokens, `T`."""
        return self.key.shape[2]

    def all_pages(self) -> Part:
        """Return the part with all pages that are there in place of a choice of them, to tell how they are stored."""
        return replace(self, key=_with_pages(self.key, copy=False), value=_with_pages(self.value, copy=False))

    def gathered(self) -> Part:
        """Return the part with copies of the pages that are chosen, for kernels that take no list of pages."""
        return replace(self, key=_with_pages(self.key, copy=True), value=_with_pages(self.value, copy=True))


def parts_of(problem: AttentionProblem, with_masks: bool = True) -> list[Part]:
    """Return all tokens as one part, or, if they are in tiers, sink and tail and every tier that is not empty.

    Args:
        problem: what to split.
        with_masks: whether to make the masks, which takes time for tiers; without, every mask is None.
    """
    key, value, mask = problem.key, problem.value, problem.mask if with_masks else None
    if not isinstance(key.packed, SortedTokens) or not isinstance(value.packed, SortedTokens):
        return [Part(key, value, mask)]
    parts = [Part(_ends(key), _ends(value), _mask_of_ends(mask, key))]
    for index, (keys, values) in enumerate(zip(_forms(key.packed), _forms(value.packed), strict=True)):
        if count(keys):
            of_tier = _weighed(problem, key.packed, index) if with_masks else None
            parts.append(Part(_alone(keys, key.tail), _alone(values, value.tail), of_tier))
    return parts


def uncoded_parts_of(problem: AttentionProblem, with_masks: bool = True) -> list[Part]:
    """Return what keys and values in transform codes have in full precision: sink and tail, and the exact tokens.

    What attends to the pages must then leave the exact tokens out. Arguments are those of `parts_of`.
    """
    key, value, mask = problem.key, problem.value, problem.mask if with_masks else None
    parts = [Part(_ends(key), _ends(value), _mask_of_ends(mask, key))]
    coded = key.packed, value.packed
    if not isinstance(coded[0], Coded) or not isinstance(coded[1], Coded):
        raise AssertionError("expected keys and values in transform codes")
    places = coded[0].places
    if places is not None and coded[0].exact is not None and coded[1].exact is not None and places.shape[2]:
        of_places = _mask_of_places(problem, places.long()) if with_masks else None
        keys, values = coded[0].exact, coded[1].exact
        parts.append(Part(_alone(keys, key.tail), _alone(values, value.tail), of_places))
    return parts


def _mask_of_places(problem: AttentionProblem, places: Tensor) -> Tensor:
    """Return the mask of the packed tokens at `places` `[B, H_kv, N]`, which hides those below 0."""
    first, last = problem.key.edges
    mask = problem.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = _columns(problem, mask[..., first:last], places.clamp(min=0))
    return _hiding(mask, places >= 0, problem)


def _hiding(mask: Tensor | None, are_tokens: Tensor, problem: AttentionProblem) -> Tensor:
    """Return a mask of older tokens that hides those that are none, given `[B, H_kv, n]`; None hides nothing."""
    is_token = are_tokens.repeat_interleave(problem.ratio, dim=1)[:, :, None]
    if mask is None:
        return is_token
    return mask & is_token if mask.dtype == torch.bool else mask.masked_fill(~is_token, -torch.inf)


def _forms(packed: SortedTokens) -> tuple[Packed | Channels | ChosenPages | Tensor, ...]:
    """Return the tokens of each form, `[B, H_kv, ...]`."""
    return (packed.of_heads,) if isinstance(packed, PooledTokens) else packed.held


def _with_pages(tensor: Segments, copy: bool) -> Segments:
    """Return segments with all pages, or a copy of the chosen ones, in place of a choice of pages."""
    packed = tensor.packed
    if not isinstance(packed, ChosenPages):
        return tensor
    return replace(tensor, packed=packed.gathered() if copy else packed.held)


def _ends(tensor: Segments) -> Segments:
    """Return sink and tail, without the tokens between them."""
    return Segments(tensor.sink, None, tensor.tail)


def _alone(held: Packed | Channels | ChosenPages | Tensor, tail: Tensor) -> Segments:
    """Return a tier's tokens as segments; those in full precision are all tail."""
    return Segments(None, None, held) if isinstance(held, Tensor) else Segments(None, held, tail[:, :, :0])


def _mask_of_ends(mask: Tensor | None, key: Segments) -> Tensor | None:
    if mask is None or mask.shape[-1] == 1:
        return mask
    first, last = key.edges
    return torch.cat([mask[..., :first], mask[..., last:]], dim=-1) if first else mask[..., last:]


def _weighed(problem: AttentionProblem, tiers: SortedTokens, index: int) -> Tensor | None:
    """Return a tier's mask, with the logarithm of the number of tokens that each of its tokens counts for."""
    mask = _mask_of_tier(problem, tiers, index)
    more = tiers.log_weight if isinstance(tiers, Tiers) and index == len(tiers.held) - 1 else 0.0
    if not more:
        return mask
    if mask is None or mask.dtype == torch.bool:
        shape = (1, 1, 1, 1) if mask is None else mask.shape
        weights = torch.full(shape, more, device=problem.query.device)
        return weights if mask is None else weights.masked_fill_(~mask, -torch.inf)
    return mask + more


def _mask_of_tier(problem: AttentionProblem, tiers: SortedTokens, index: int) -> Tensor | None:
    """Return the mask's columns of a tier's tokens, which are older than all queries: nothing causal is left."""
    mask, queries = problem.mask, problem.queries
    if mask is not None and mask.shape[-1] > 1:
        first, last = problem.key.edges
        mask = _columns(problem, mask[..., first:last], tiers.places(index))
    if isinstance(tiers, PooledTokens):
        return _hiding(mask, tiers.are_tokens, problem)
    if mask is None and queries > 1:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=problem.query.device)
    return mask


def _columns(problem: AttentionProblem, mask: Tensor, places: Tensor) -> Tensor:
    """Return the columns of a mask over packed tokens at places `[B, H_kv, n]`, `[B, H, S, n]`."""
    columns = mask.expand(problem.batch, problem.heads, problem.queries, mask.shape[-1])
    columns = columns.unflatten(1, (problem.kv_heads, problem.ratio))
    chosen = columns.gather(-1, places[:, :, None, None].expand(*columns.shape[:-1], -1))
    flat: Tensor = chosen.flatten(1, 2)
    return flat
