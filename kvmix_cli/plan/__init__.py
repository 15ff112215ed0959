"""Plans: model geometry, layers, cache settings, windows, policies, presets, pins, sizes in bytes, YAML. No torch."""

from .geometry import ModelInfo
from .layers import LayerPlan, TensorPlan
from .plan import Bits, Plan
from .policies import WIDTHS
from .settings import CacheSettings, GroupSize

__all__ = ["WIDTHS", "Bits", "CacheSettings", "GroupSize", "LayerPlan", "ModelInfo", "Plan", "TensorPlan"]
