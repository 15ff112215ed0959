"""Published methods as plans: preset files, their settings by depth, and presets at a given size. No torch."""

from .preset import (
    ALIASES,
    FORMAT,
    KVTUNER,
    Preset,
    by_depth,
    find_preset,
    has_preset,
    plan_of,
    preset_path,
    presets,
    put_on,
    split,
)

__all__ = [
    "ALIASES",
    "FORMAT",
    "KVTUNER",
    "Preset",
    "by_depth",
    "find_preset",
    "has_preset",
    "plan_of",
    "preset_path",
    "presets",
    "put_on",
    "split",
]
