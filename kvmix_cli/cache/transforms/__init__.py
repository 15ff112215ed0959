"""Transforms of keys and values before they are stored: rotation, centering, balancing, in any order.

None of them touches what is packed. `query` transforms queries to meet the stored keys, and `output` transforms the
attention output over stored values back.
"""

from .base import TRANSFORMS, Transform
from .chain import Chain, build

__all__ = ["TRANSFORMS", "Chain", "Transform", "build"]
