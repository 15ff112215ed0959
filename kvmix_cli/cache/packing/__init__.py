"""How tokens that leave the window are held: as pages, in runs of channels, in tiers."""

from __future__ import annotations

from dataclasses import dataclass

from kvmix_kernels.layout import PageLayout

from ...plan import CacheSettings
from ...plan.sizes import StorageForm
from ..buffer import Buffer
from .base import Packing
from .channels import ChannelPages
from .pages import Pages
from .runs import Sort
from .tiers import Full, TieredTokens

__all__ = ["Packing", "Sorts", "packing_of"]


def packing_of(
    name: str, found: tuple[StorageForm, ...], settings: CacheSettings, reserve: int, sorts: Sorts | None
) -> Packing | None:
    """What holds a layer's keys or values by the settings of its plan; None if all stay in full precision.

    Args:
        name: for errors, e.g. `layer 3 keys`.
        found: their forms, see `forms.forms`.
        reserve: tokens that the layer will hold in all, if known.
        sorts: needed for tiers and for runs of channels.
    """
    room = max(0, reserve - settings.sink)
    if settings.tokens is None:
        return None if found[0].is_full else _pages(name, found[0], settings, room // settings.page, sorts)
    tiers = []
    for form in found:
        share = int(room * form.share)
        tiers.append(Full(share) if form.is_full else _pages(name, form, settings, share // settings.page, sorts))
    assert sorts is not None
    return TieredTokens(name, tiers, settings.tokens.flush, sorts.tokens, sorts.tiers)


@dataclass(frozen=True)
class Sorts:
    """Who sorts: tokens into tiers (and where these are kept), and channels by their importance."""

    tokens: Sort
    tiers: Buffer
    channels: Sort


def _pages(name: str, form: StorageForm, settings: CacheSettings, reserve: int, sorts: Sorts | None) -> Packing:
    only = form.groups[0]
    if len(form.groups) == 1 and isinstance(only, PageLayout):
        return Pages(name, only, reserve)
    assert sorts is not None
    refresh = settings.channels.refresh if settings.channels else 0
    return ChannelPages(name, form.groups, settings.page, refresh, sorts.channels, reserve)
