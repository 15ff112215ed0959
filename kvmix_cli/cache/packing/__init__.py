"""Storage of the tokens that leave the window: pages, with channel groups, of transform codes, and tiers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmix_kernels.layout import PageLayout
from torch import Tensor

from ...plan import CacheSettings
from ...plan.sizes import StorageForm
from ..buffer import Buffer
from .base import Packing
from .channels import ChannelPacking
from .codes import CodePacking
from .pages import PagePacking
from .tiers import FullPacking, TierPacking

__all__ = ["CodePacking", "Packing", "PolicyFunctions", "packing_of"]


@dataclass(frozen=True)
class PolicyFunctions:
    """The decisions of a layer's policies about tokens that are packed next.

    Attributes:
        tiers_of: tiers `[B, H_kv, n]` uint8 of tokens `[B, H_kv, n, D]`.
        tiers: the tiers of all tokens packed so far, shared by keys and values.
        channel_importance: importance `[B, H_kv, D]` of the channels of tokens `[B, H_kv, n, D]`.
    """

    tiers_of: Callable[[Tensor], Tensor]
    tiers: Buffer
    channel_importance: Callable[[Tensor], Tensor]


def packing_of(
    name: str, forms: tuple[StorageForm, ...], settings: CacheSettings, reserve: int, functions: PolicyFunctions | None
) -> Packing | None:
    """Return the storage of a layer's keys or values by its plan's settings; None if all stay in full precision.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        forms: one for each tier, see `plan.sizes.storage_forms`.
        settings: of the cache.
        reserve: tokens that the layer will hold in all, if known.
        functions: needed for tiers and for channel groups.
    """
    room = max(0, reserve - settings.sink)
    if settings.tokens is None:
        return None if forms[0].is_full else _pages(name, forms[0], settings, room // settings.page, functions)
    tiers: list[Packing] = []
    for form in forms:
        share = int(room * form.share)
        if form.is_full:
            tiers.append(FullPacking(share))
        else:
            tiers.append(_pages(name, form, settings, share // settings.page, functions))
    if functions is None:
        raise AssertionError("tiers need a token policy")
    return TierPacking(name, tiers, settings.tokens.flush, functions.tiers_of, functions.tiers)


def _pages(
    name: str, form: StorageForm, settings: CacheSettings, reserve: int, functions: PolicyFunctions | None
) -> Packing:
    only = form.groups[0]
    if len(form.groups) == 1 and isinstance(only, PageLayout):
        return PagePacking(name, only, reserve, form.encoder)
    if functions is None:
        raise AssertionError("channel groups need a channel policy")
    refresh = settings.channels.refresh if settings.channels else 0
    return ChannelPacking(
        name, form.groups, settings.page, refresh, functions.channel_importance, reserve, form.encoder
    )
