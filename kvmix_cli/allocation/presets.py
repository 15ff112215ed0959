"""Settings that belong together, by name."""

from __future__ import annotations

from typing import NamedTuple

from ..plan import CacheSettings
from ..plan.windows import Rpc
from .budgets import Budget


class Preset(NamedTuple):
    """A budget, the widths to spend it on (None for the method's own), and the cache."""

    budget: Budget
    k_bits: tuple[int, ...] | None
    v_bits: tuple[int, ...] | None
    cache: CacheSettings


PRESETS = {
    "paper": Preset(
        budget=Budget(),
        k_bits=(2, 3),
        v_bits=(2, 4),
        cache=CacheSettings(page=32, sink=0, group_size=32, scale_dtype="float16", window=Rpc()),
    )
}
