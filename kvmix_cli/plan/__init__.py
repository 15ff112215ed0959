"""Plans: model geometry, layers, cache settings, windows, policies, presets, pins, sizes in bytes, YAML. No torch."""

from .codec import TransformSettings, TransformTensor
from .document.fields import WIDTHS
from .document.geometry import HeadGeometry, ModelInfo
from .layers import AnyTensor, LayerPlan, TensorPlan
from .plan import Bits, Plan
from .settings import CacheSettings, GroupSize

__all__ = [
    "WIDTHS",
    "AnyTensor",
    "Bits",
    "CacheSettings",
    "GroupSize",
    "HeadGeometry",
    "LayerPlan",
    "ModelInfo",
    "Plan",
    "TensorPlan",
    "TransformSettings",
    "TransformTensor",
]
