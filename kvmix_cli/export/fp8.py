"""What engines with an 8-bit float cache can express: layers at 8 bits, and layers left alone."""

from __future__ import annotations

from ..plan import Plan
from .refusal import refuse

EXPRESSIBLE = ("k8v8", "k16v16")
CAUTION = (
    "8 bits are fp8 (e4m3, one scale a tensor) there, not integers in groups, and there is no sink and no window in "
    "full precision: measure the quality again there"
)


def fp8_layers(plan: Plan, engine: str) -> list[int]:
    """The layers to store in fp8; the others stay in full precision. Raises ExportError."""
    rule = "it stores the keys and values of a layer both in fp8 (k8v8) or both in full precision (k16v16)"
    wrong = {index: layer.short for index, layer in plan.layers.items() if layer.short not in EXPRESSIBLE}
    refuse(engine, rule, wrong, "--k-bits 8 --v-bits 8 and --pin LAYERS:k16v16")
    return [index for index, layer in sorted(plan.layers.items()) if layer.k.bits == 8]
