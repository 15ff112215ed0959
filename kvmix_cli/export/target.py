"""An engine that plans can be exported to, what an export stores, and the rules that engines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ExportError
from ..plan import Plan
from ..plan.document.geometry import format_ranges
from ..plan.engine_blocks import stored_bits
from ..plan.engines.formats import EngineFormat

FP8_CAUTION = (
    "8 bits are fp8 (e4m3, one scale a tensor) there, not integers in groups, and there is no sink and no window in "
    "full precision"
)
AGAIN = "measure the quality again there"

FormatPair = tuple[EngineFormat, EngineFormat]
"""Formats of a layer's keys and of its values."""


@dataclass(frozen=True)
class Export:
    """A plan as an engine stores it.

    Attributes:
        text: configuration of the engine.
        formats: of each layer of the plan; None where the engine stores widths as kvmix does.
        plan: the plan that was exported, or, without formats, the one that kvmix would store as the engine does.
        in_blocks: whether the engine stores every token by itself, in blocks; see `plan.engine_blocks`.
        losses: what beside widths is not as the plan has it, in words.
    """

    text: str
    formats: Mapping[int, FormatPair] | None
    plan: Plan
    in_blocks: bool = False
    losses: tuple[str, ...] = ()

    @property
    def stored_bits(self) -> float:
        """Return the bits of a mean element of the plan's layers, scales included."""
        if self.formats is None:
            return stored_bits(self.plan) if self.in_blocks else self.plan.bits.stored
        heads = {layer: self.plan.model.heads(layer) for layer in self.formats}
        nbytes = sum(
            heads[layer].kv_heads * (k.nbytes(heads[layer].key_dim) + v.nbytes(heads[layer].value_dim))
            for layer, (k, v) in self.formats.items()
        )
        return 8 * nbytes / sum(each.token_elements for each in heads.values())

    @property
    def nominal_bits(self) -> float:
        """Return the mean width of the codes."""
        if self.formats is None:
            return self.plan.bits.nominal
        return sum(k.bits + v.bits for k, v in self.formats.values()) / (2 * len(self.formats))

    @property
    def rounded(self) -> list[str]:
        """Return the layers that the engine stores at other widths than the plan, in words."""
        changed: dict[str, list[int]] = {}
        for layer, (k, v) in sorted((self.formats or {}).items()):
            asked = tuple(tensor.bits for tensor, _ in self.plan.layers[layer].affine)
            if asked != (k.bits, v.bits):
                name = k.name if k.name == v.name else f"{k.name} and {v.name}"
                changed.setdefault(f"{self.plan.layers[layer].short} as k{k.bits}v{v.bits} ({name})", []).append(layer)
        return [f"{what} in layers {format_ranges(layers)}" for what, layers in changed.items()]


OR_PLUGIN = ", or use --to vllm-plugin"
"""End of the reason why an engine cannot express transform codes."""
Express = Callable[[Plan, "str | None"], Export]


@dataclass(frozen=True)
class Target:
    """An engine that plans can be exported to.

    Attributes:
        name: name of the engine.
        express: function that returns a plan of widths, in a format of the engine or in the one that suits the plan.
        caution: differences between the engine's cache and the one that was measured here.
    """

    name: str
    express: Express
    caution: str

    def export(self, plan: Plan, form: str | None = None) -> Export:
        """Return a plan as the engine stores it.

        Args:
            form: name of a format of the engine for all layers that it does not leave alone. None for the one of
                fewest bytes in which no layer has fewer bits than in the plan.

        Raises:
            ExportError: if the engine cannot express it.
        """
        sizes = {index: plan.model.heads(index) for index in plan.layers}
        uneven = {index: f"heads of {heads}" for index, heads in sizes.items() if heads.key_dim != heads.value_dim}
        rule = "exports are of keys and values of one size, as a latent and its rotary part are one tensor of one width"
        refuse(self.name, rule, uneven, "use this plan with kvmix itself")
        coded = {index: "transform codes" for index, layer in plan.layers.items() if layer.is_coded}
        rule = "it has widths of whole tensors only"
        refuse(self.name, rule, coded, f"allocate with another --method, such as rank{OR_PLUGIN}")
        grouped = {index: "groups of KV heads" for index, layer in plan.layers.items() if layer.head_groups}
        refuse(self.name, rule, grouped, "allocate without --by-head")
        if axes := plan.cache.axes:
            raise ExportError(
                f"{self.name} cannot express this plan: it knows widths, but not {' and '.join(axes)} of the plan's "
                "cache; allocate without --with"
            )
        return self.express(plan, form)


def widths(plan: Plan) -> dict[int, tuple[int, int]]:
    """Return the widths of each layer's keys and values."""
    return {layer: (each.affine[0][0].bits, each.affine[1][0].bits) for layer, each in sorted(plan.layers.items())}


def quantizes(plan: Plan) -> bool:
    """Return whether any layer of a plan is stored in less than full precision."""
    return any(bits < 16 for pair in widths(plan).values() for bits in pair)


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
