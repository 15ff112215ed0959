"""Page codecs: storage of whole pages of keys or values in a form of its own, by name.

`CODECS` is for a user's own, too (docs/add-a-method.md). This room loads torch when a codec is first used.
"""

from __future__ import annotations

from ..errors import PlanError
from ..registry import Registry
from .base import PageCodec, StoredPart

__all__ = ["CODECS", "PageCodec", "StoredPart"]

CODECS: Registry[type[PageCodec]] = Registry(
    "codec",
    PlanError,
    __package__,
    {
        "symmetric": "levels:EvenLevels",
        "lloyd-max": "levels:GaussianLevels",
        "token-norm": "two_axes:TokenNorm",
        "two-axes": "two_axes:BothAxes",
        "vectors": "vectors:Vectors",
    },
)
"""Codecs of pages by name."""
