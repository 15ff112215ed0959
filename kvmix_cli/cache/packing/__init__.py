"""Storage of the tokens that leave the window: pages, with channel groups, of transform codes, and sorted tokens.

Keys may have a summary of each page, by which a decoded token chooses what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmix_kernels.layout import PageLayout
from torch import Tensor

from ...codecs import PageCodec
from ...plan import CacheSettings
from ...plan.forms import StorageForm
from ..buffer import Buffer
from .base import Packing
from .channels import ChannelPacking
from .codes import CodePacking
from .encoded import CodecPacking
from .pages import PagePacking
from .pooled import PooledPacking
from .sorted import BudgetPacking, FullPacking, KeptUnits, TierPacking
from .summaries import SummaryPacking

__all__ = ["CodePacking", "CodecPacking", "KeptUnits", "Packing", "PolicyFunctions", "SummaryPacking", "packing_of"]


@dataclass(frozen=True)
class PolicyFunctions:
    """The decisions of a layer's policies about tokens that are packed next.

    Attributes:
        channel_importance: importance `[B, H_kv, D]` of the channels of tokens `[B, H_kv, n, D]`.
        tiers_of: tiers `[B, H_kv, n]` uint8 of tokens `[B, H_kv, n, D]`.
        merged: the same tokens `[B, H_kv, n, D]`, once their tiers are known, the dropped ones in those that stay.
        kept_of: what a budget keeps, of what is held and of tokens `[B, H_kv, n, D]`.
        sorted: the tiers of all tokens packed so far, or the positions of those that a budget keeps, shared by keys
            and values.
        unit: tokens that a budget keeps or drops together.
        heads: the KV head of each page that is held, shared by keys and values, where heads keep different numbers.
    """

    channel_importance: Callable[[Tensor], Tensor]
    tiers_of: Callable[[Tensor], Tensor] | None = None
    merged: Callable[[Tensor], Tensor] | None = None
    kept_of: Callable[[Tensor], KeptUnits] | None = None
    sorted: Buffer | None = None
    unit: int = 1
    heads: Buffer | None = None


def packing_of(
    name: str, forms: tuple[StorageForm, ...], settings: CacheSettings, reserve: int, functions: PolicyFunctions | None
) -> Packing | None:
    """Return the storage of a layer's keys or values by its plan's settings; None if all stay in full precision.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        forms: one for each tier, see `plan.sizes.storage_forms`.
        settings: of the cache.
        reserve: tokens that the layer will hold in all, if known.
        functions: needed for tokens that are sorted and for channel groups.
    """
    room, kept = max(0, reserve - settings.sink), settings.kept
    if settings.tokens is None:
        return None if forms[0].is_full else _pages(name, forms[0], settings, room // settings.page, functions)
    if functions is None or functions.sorted is None:
        raise AssertionError("tokens are sorted by a token policy")
    room, flush = room if kept is None else min(room, kept), settings.tokens.flush
    if settings.tokens.sure is not None and functions.tiers_of is not None and functions.heads is not None:
        form = _part(name, forms[0], settings, 0, functions)  # its row is of all heads, whose number is not known here
        return PooledPacking(name, form, flush, settings.page, functions.tiers_of, functions.sorted, functions.heads)
    parts = [_part(name, form, settings, int(room * form.share), functions) for form in forms]
    if functions.tiers_of is not None:
        weight = settings.tokens.log_weight
        return TierPacking(name, parts, flush, functions.tiers_of, functions.sorted, functions.merged, weight)
    if functions.kept_of is not None:
        return BudgetPacking(name, parts[0], flush, functions.unit, functions.kept_of, functions.sorted)
    raise AssertionError("a token policy has tiers, or a number of tokens to keep")


def _part(name: str, form: StorageForm, settings: CacheSettings, reserve: int, functions: PolicyFunctions) -> Packing:
    """Return the storage of a form, with room for `reserve` tokens."""
    if form.is_full:
        return FullPacking(reserve)
    return _pages(name, form, settings, reserve // settings.page, functions)


def _pages(
    name: str, form: StorageForm, settings: CacheSettings, reserve: int, functions: PolicyFunctions | None
) -> Packing:
    only = form.groups[0]
    if len(form.groups) == 1 and isinstance(only, PageLayout):
        return PagePacking(name, only, reserve, form.encoder)
    if isinstance(only, PageCodec):
        return CodecPacking(name, only, reserve)
    if functions is None:
        raise AssertionError("channel groups need a channel policy")
    groups = tuple(group for group in form.groups if not isinstance(group, PageCodec))
    if len(groups) < len(form.groups):
        raise AssertionError("page codecs do not combine with channel groups")
    refresh = settings.channels.refresh if settings.channels else 0
    return ChannelPacking(name, groups, settings.page, refresh, functions.channel_importance, reserve, form.encoder)
