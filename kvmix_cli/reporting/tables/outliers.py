"""Outliers of a profile in words and as a table: layers whose keys or values are hard to quantize."""

from __future__ import annotations

from collections.abc import Iterator

from ...evaluation.results import Table
from ...plan.document.geometry import format_ranges
from ...profile import Profile

CHANNEL = 16.0
"""Ratio of key channels from which on a layer is named. With one channel 8, 16 or 32 times the others, the squared
error of scores at 2 bits is 2, 5 or 17 times as large in heads of 64 channels; 4 bits divide it by 25 (normal keys of
4096 tokens, groups of 64, normal queries). Layers of builtin:tiny have 1.8 to 3.7, those of SmolLM2-135M up to 13.4."""
TOKEN = 5.0
"""Ratio of tokens from which on a layer is named. With one token 4.8 times the others in each group of 64, the squared
error of the others at 2 bits is 1.9 times as large. Layers of builtin:tiny have 1.2 to 2.3,
those of SmolLM2-135M up to 3.1."""
_KINDS = {
    "key_channel": (CHANNEL, "keys have outlier channels", "4 bits or a transform"),
    "key_token": (TOKEN, "keys have massive tokens", "4 bits or a larger sink"),
    "value_token": (TOKEN, "values have massive tokens", "4 bits or a larger sink"),
}


def outlier_notices(profile: Profile) -> Iterator[str]:
    """Yield a sentence for each kind of outlier: `layer 0 keys have outlier channels 40x the rest: ...`."""
    for name, (threshold, what, advice) in _KINDS.items():
        ratios = {index: getattr(each, name) for index, each in (profile.outliers or {}).items()}
        found = sorted(index for index, ratio in ratios.items() if ratio > threshold)
        if found:
            layers = f"layer {found[0]}" if len(found) == 1 else f"layers {format_ranges(found)}:"
            most = "" if len(found) == 1 else "up to "
            yield f"{layers} {what} {most}{max(ratios[index] for index in found):.0f}x the rest: {advice}"


def outlier_table(profile: Profile) -> Table | None:
    """Return how far channels and tokens stand out by layer; None for a profile that did not measure it."""
    if profile.outliers is None:
        return None
    rows = [
        [f"{index}", *(f"{getattr(each, name):.1f}" for name in _KINDS)]
        for index, each in sorted(profile.outliers.items())
    ]
    title = f"outliers of {profile.model.id}, largest over median"
    return Table(title, ["layer", "K channels", "K tokens", "V tokens"], rows, "\n".join(outlier_notices(profile)))
