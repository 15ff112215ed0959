"""`kvmix recommend`: the smallest plan that is safe at a context, with its proof."""

from .bench import Purpose
from .cost import Forecast, forecast
from .study import Recommendation, recommend

__all__ = ["Forecast", "Purpose", "Recommendation", "forecast", "recommend"]
