"""An engine that plans can be exported to, and the checks of plans that engines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ExportError
from ..plan import Plan
from ..plan.geometry import format_ranges

FP8_CAUTION = (
    "8 bits are fp8 (e4m3, one scale a tensor) there, not integers in groups, and there is no sink and no window in "
    "full precision: measure the quality again there"
)


@dataclass(frozen=True)
class Target:
    """An engine that plans can be exported to.

    Attributes:
        name: name of the engine.
        express: function that returns a plan of widths as the engine's configuration.
        caution: differences between the engine's cache and the one that was measured here.
    """

    name: str
    express: Callable[[Plan], str]
    caution: str

    def write(self, plan: Plan) -> str:
        """Return a plan as the engine's configuration. Raises ExportError if the engine cannot express it."""
        sizes = {index: plan.model.heads(index) for index in plan.layers}
        uneven = {index: f"heads of {heads}" for index, heads in sizes.items() if heads.key_dim != heads.value_dim}
        rule = "exports are of keys and values of one size, as a latent and its rotary part are one tensor of one width"
        refuse(self.name, rule, uneven, "use this plan with kvmix itself")
        coded = {index: "transform codes" for index, layer in plan.layers.items() if layer.is_coded}
        rule = "it has widths of whole tensors only"
        refuse(self.name, rule, coded, "allocate with another --method, such as rank")
        grouped = {index: "groups of KV heads" for index, layer in plan.layers.items() if layer.head_groups}
        refuse(self.name, rule, grouped, "allocate without --by-head")
        if axes := plan.cache.axes:
            raise ExportError(
                f"{self.name} cannot express this plan: it knows widths, but not {' and '.join(axes)} of the plan's "
                "cache; allocate without --with"
            )
        return self.express(plan)


def refuse(engine: str, rule: str, layers: Mapping[int, str], remedy: str) -> None:
    """Raise ExportError if there is any layer that breaks the engine's rule.

    Args:
        engine: name of the engine.
        rule: sentence about the plans that it can express.
        layers: storage that it cannot express, by layer.
        remedy: what to do instead.
    """
    if not layers:
        return
    alike: dict[str, list[int]] = {}
    for layer, what in sorted(layers.items()):
        alike.setdefault(what, []).append(layer)
    found = ", ".join(f"{what} in layers {format_ranges(indices)}" for what, indices in alike.items())
    raise ExportError(f"{engine} cannot express this plan: {rule}, but the plan has {found}; {remedy}")


def fp8_layers(plan: Plan, engine: str) -> list[int]:
    """Return the layers to store in 8-bit floats; the others stay in full precision. Raises ExportError."""
    rule = "it stores the keys and values of a layer both in fp8 (k8v8) or both in full precision (k16v16)"
    wrong = {index: layer.short for index, layer in plan.layers.items() if layer.short not in ("k8v8", "k16v16")}
    refuse(engine, rule, wrong, "allocate with --k-bits 8 --v-bits 8 and --pin LAYERS:k16v16")
    return [index for index, layer in sorted(plan.layers.items()) if layer.short == "k8v8"]
