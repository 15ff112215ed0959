"""`kvmix recommend`: the smallest plan that is safe at a context, with its proof."""

from .bench import Wanted
from .study import Recommendation, recommend

__all__ = ["Recommendation", "Wanted", "recommend"]
