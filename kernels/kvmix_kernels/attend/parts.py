"""Attention over tokens in several tiers is attention over each, put together by one softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments
from ..tiers import Tiers


class Part(NamedTuple):
    """Some of the tokens: keys and values that are not in tiers, and who may see them.

    Attributes:
        mask: broadcastable to `[B, H, S, T]` of this part's tokens; None is causal, the queries being its last tokens.
    """

    key: Segments
    value: Segments
    mask: Tensor | None


def parts_of(query: Tensor, key: Segments, value: Segments, mask: Tensor | None) -> list[Part]:
    """Keys and values as parts: one, or sink and tail and every tier that holds something.

    Args:
        mask: as `Part` has it, of all tokens, those that are gone included.

    Raises:
        ValueError: if keys and values are not in the same tiers.
    """
    if not isinstance(key.packed, Tiers) and not isinstance(value.packed, Tiers):
        return [Part(key, value, mask)]
    check_tiers(key, value)
    parts = [Part(_ends(key), _ends(value), _mask_of_ends(mask, key))]
    for index, (keys, values) in enumerate(zip(key.packed.held, value.packed.held, strict=True)):  # type: ignore[union-attr]
        part = Part(_alone(keys, key.tail), _alone(values, value.tail), _mask_of_tier(query, key, index, mask))
        if part.key.shape[2]:
            parts.append(part)
    return parts


def check_tiers(key: Segments, value: Segments) -> None:
    """Raise ValueError unless keys and values are in the same tiers, or in none."""
    tiered = [isinstance(x.packed, Tiers) for x in (key, value)]
    if tiered[0] != tiered[1] or (tiered[0] and key.edges != value.edges):
        raise ValueError("keys and values are not in the same tiers")


def _ends(tensor: Segments) -> Segments:
    return Segments(tensor.sink, None, tensor.tail)


def _alone(held: object, tail: Tensor) -> Segments:
    """A tier's tokens as segments; those in full precision are all tail."""
    if isinstance(held, Tensor):
        return Segments(None, None, held)
    return Segments(None, held, tail[:, :, :0])  # type: ignore[arg-type]


def _mask_of_ends(mask: Tensor | None, key: Segments) -> Tensor | None:
    if mask is None or mask.shape[-1] == 1:
        return mask
    first, last = key.edges
    return torch.cat([mask[..., :first], mask[..., last:]], dim=-1) if first else mask[..., last:]


def _mask_of_tier(query: Tensor, key: Segments, tier: int, mask: Tensor | None) -> Tensor | None:
    """The mask's columns of the tokens in a tier. They are older than all queries, so nothing causal is left."""
    if mask is None:
        return None if query.shape[2] == 1 else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    if mask.shape[-1] == 1:
        return mask
    (first, last), (batch, heads, queries, _), kv_heads = key.edges, query.shape, key.shape[1]
    places = key.packed.places(tier)[:, :, None, None]  # type: ignore[union-attr]
    columns = mask[..., first:last].expand(batch, heads, queries, last - first).unflatten(1, (kv_heads, -1))
    chosen = columns.gather(-1, places.expand(*columns.shape[:-1], -1))
    return chosen.flatten(1, 2)
