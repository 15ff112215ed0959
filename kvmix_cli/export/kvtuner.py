"""KVTuner: its preset, `0: {nbits_key: 8, nbits_value: 4}`, which `Plan.from_kvtuner` reads.

Source: KVTuner, `calibration_presets/*.yaml` and `FlexibleQuantizedCacheConfig.per_layer_config`: up to 8 bits in
every layer, and one group size for all (https://github.com/cmd2001/KVTuner, arXiv 2502.04420).
"""

from __future__ import annotations

from ..errors import ExportError
from ..plan import LayerPlan, Plan
from .target import Export, Target, refuse, widths


def express(plan: Plan, form: str | None) -> Export:
    """Return a KVTuner preset, in YAML. Raises ExportError."""
    if form is not None:
        raise ExportError(f"KVTuner has one format, in every width: leave out --format {form}")
    strange = {index: what for index, layer in plan.layers.items() if (what := _inexpressible(layer))}
    rule = "its presets give every layer a width of at most 8 bits and nothing else"
    refuse("KVTuner", rule, strange | plan.model.stock, "allocate with at most 8 bits and one --group-size")
    pairs = widths(plan).items()
    text = "".join(f"{index}: {{nbits_key: {k}, nbits_value: {v}}}\n" for index, (k, v) in pairs)
    there = plan.cache.model_copy(update={"sink": 0, "encode": "minmax"})
    return Export(text, None, Plan.build(plan.model, plan.layers, there, plan.provenance))


def _inexpressible(layer: LayerPlan) -> str:
    """Return the part of a layer's storage that a preset cannot express; empty if there is none."""
    (k, _), (v, _) = layer.affine
    if 16 in (k.bits, v.bits):
        return layer.short
    return "" if k.group_size is v.group_size is None else "a group size of its own"


TARGET = Target(
    "kvtuner",
    express,
    "a preset has widths alone: give KVTuner the plan's group size as q_group_size; it keeps no sink, no encoders",
)
