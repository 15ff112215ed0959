"""What happens to keys and values before they are stored: rotation, centering, balancing, in any order.

None of it touches what is packed. Queries meet the stored keys as `query` makes them, and `output` takes back what was
done to the values.
"""

from .base import Transform
from .build import build
from .chain import Chain

__all__ = ["Chain", "Transform", "build"]
