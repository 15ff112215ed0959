"""Rules that merge tokens which a token policy drops into tokens that stay, by name."""

from . import runs, similar, values  # noqa: F401 - they register their rules
from .base import MERGES, LeavingTokens, Merge, Merging, left_padding

__all__ = ["MERGES", "LeavingTokens", "Merge", "Merging", "left_padding"]
