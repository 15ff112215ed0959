"""`kvmix recommend`: the smallest plan that is safe at a context, with its proof."""

from .bench import Wanted
from .forecast import Forecast, forecast
from .study import Recommendation, recommend

__all__ = ["Forecast", "Recommendation", "Wanted", "forecast", "recommend"]
