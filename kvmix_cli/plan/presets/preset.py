"""Presets: published methods as settings of this cache, usable without a profile. See docs/presets.md.

A preset is a file, `profiles/presets/NAME.yaml`: widths by layer, and a plan's cache section. Its head comment names
its source and how it differs. Instead of widths it may have a method of allocation and its budget: such a preset is
solved from a profile of the model (`studies/directions.py`). `kvtuner:FILE` also is a preset: widths from KVTuner's
file, with the default cache. A file of the user's own is a preset by its path, if that ends in .yaml.

The paper's preset has two names, `kvmix-paper` and `paper`. It serves twice: as a plan without a profile, whose first
layers stand for the important ones, and as the start of `kvmix allocate`, which chooses these layers by score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from kvmix_kernels.layout import FULL_PRECISION_BITS
from kvmix_kernels.transform_layout import MAX_WIDTH
from pydantic import Field, field_validator, model_validator

from ...errors import PlanError, StateError, did_you_mean
from ...registry import Registry
from ..document.fields import Several, known_width
from ..document.geometry import ModelInfo
from ..document.strict_yaml import StrictModel, read_yaml, validate
from ..layers import LayerPlan
from ..plan import Plan
from ..settings import CacheSettings
from ..tensors.directions import Directions
from .pyramids import Pyramid

FORMAT: Final = "kvmix-preset/1"
KVTUNER: Final = "kvtuner:"
ALIASES: Final = {"paper": "kvmix-paper"}
"""Second names of presets."""
FILE_ENDINGS: Final = (".yaml", ".yml")
"""Ends of the path of a preset file."""
_SHIPPED = Path(__file__).parents[2] / "presets"
_CHECKOUT = Path(__file__).parents[3] / "profiles" / "presets"


class ByLayer(StrictModel):
    """A width for all layers, or one for the first layers and another for the rest; `2` is short for `{bits: 2}`.

    Attributes:
        bits: width of all layers, or of the first ones.
        first: share of the layers, rounded down, that have `bits`.
        rest: width of the other layers.
    """

    bits: int
    first: float | None = Field(default=None, ge=0, le=1)
    rest: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"bits": value} if type(value) is int else value

    @field_validator("bits", "rest")
    @classmethod
    def _known(cls, bits: int | None) -> int | None:
        return None if bits is None else known_width(bits)

    @model_validator(mode="after")
    def _together(self) -> ByLayer:
        if (self.first is None) != (self.rest is None):
            raise ValueError("first and rest go together")
        return self

    def at(self, place: int, layers: int) -> int:
        """Return the bits of the layer at a place, from 0, among `layers` layers."""
        if self.first is None or self.rest is None:
            return self.bits
        return self.bits if place < int(Fraction(self.first).limit_denominator(10_000) * layers) else self.rest


class Widths(StrictModel):
    """Widths of keys and of values."""

    k: ByLayer
    v: ByLayer


@dataclass(frozen=True)
class LayerShare:
    """A share of the layers that is stored at the wider of two widths.

    Attributes:
        share: share of the layers, between 0 and 1.
        k_bits, v_bits: the two widths of keys, and of values, ascending.
    """

    share: float
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]


class Preset(StrictModel):
    """A method's widths and cache settings, or a method of allocation with its budget.

    Attributes:
        bits: widths by layer; None for a method of allocation.
        method: method of allocation, which decides from a profile.
        avg_bits: its budget of nominal bits.
        directions: where the directions of its transform codes come from.
        code_bits: widths that these may have besides 0; None for all.
        codebooks: `profile` for codecs with codebooks that a profile of the model has; None for none, or their own.
        tokens: what the layers have of their own in the token policy of the cache, by depth; None for the same in all.
    """

    format: Literal["kvmix-preset/1"] = FORMAT
    bits: Widths | None = None
    method: Literal["transform"] | None = None
    avg_bits: float | None = Field(default=None, gt=0, le=FULL_PRECISION_BITS)
    directions: Directions = "loss"
    code_bits: Annotated[Several[Annotated[int, Field(ge=1, le=MAX_WIDTH)]], Field(min_length=1)] | None = None
    codebooks: Literal["profile"] | None = None
    tokens: Pyramid | None = None
    cache: CacheSettings

    @model_validator(mode="after")
    def _decided_once(self) -> Preset:
        if self.tokens is not None and self.cache.tokens is None:
            raise ValueError("tokens by depth need a token policy, cache.tokens")
        if (self.method is None) != (self.avg_bits is None):
            raise ValueError("method and avg_bits go together")
        if (self.bits is None) == (self.method is None):
            raise ValueError("must have either bits, or method and avg_bits")
        if self.method is None and self.model_fields_set & {"directions", "code_bits"}:
            raise ValueError("directions and code_bits need a method")
        if self.codebooks is not None and self.cache.codecs is None:
            raise ValueError("codebooks need codecs that take them, cache.codecs")
        return self

    @classmethod
    def load(cls, path: Path | str) -> Preset:
        """Read a preset file. Raises DocumentError with every fault and its line."""
        document = read_yaml(Path(path))
        document.check_format(FORMAT)
        return validate(document, cls)

    def plan(self, model: ModelInfo, name: str) -> Plan:
        """Return the plan of a model.

        Raises:
            PlanError: if the model's heads cannot be packed like this, or a profile has to decide the widths.
        """
        if self.bits is None:
            raise PlanError(
                f"preset '{name}' states no widths: make a plan of it with --preset {name} of kvmix allocate"
            )
        if self.codebooks is not None:
            raise PlanError(f"preset '{name}' has codebooks of a profile: make its plan with a profile that has them")
        count, k, v = len(model.quantizable), self.bits.k, self.bits.v
        layers = {
            layer: LayerPlan.of_bits(k.at(place, count), v.at(place, count))
            for place, layer in enumerate(model.quantizable)
        }
        return Plan.build(model, self.by_depth(layers), self.cache, {"method": "preset", "preset": name})

    def by_depth(self, layers: dict[int, LayerPlan], cache: CacheSettings | None = None) -> dict[int, LayerPlan]:
        """Return layers with what they have of their own in this preset's token policy.

        Args:
            layers: of a plan.
            cache: settings that have the policy; by default the preset's own.
        """
        return layers if self.tokens is None else self.tokens.put_on(layers, cache or self.cache)

    @property
    def layer_share(self) -> LayerShare | None:
        """Return the share of layers that have more bits; None unless keys and values have the same share."""
        if self.bits is None:
            return None
        k, v = self.bits.k, self.bits.v
        if k.first is None or k.rest is None or v.rest is None or k.first != v.first:
            return None
        return LayerShare(k.first, tuple(sorted({k.bits, k.rest})), tuple(sorted({v.bits, v.rest})))


@cache
def presets() -> Registry[Path]:
    """Return the files of all presets by name, second names left out."""
    found: Registry[Path] = Registry("preset", StateError)
    folder = _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT
    for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem):
        found.add(path.stem, path)
    return found


def has_preset(name: str) -> bool:
    """Return whether there is a preset of this name, or second name."""
    return ALIASES.get(name, name) in presets()


def preset_path(name: str) -> Path:
    """Return the file of a preset by one of its names, or its path. Raises StateError if there is none."""
    if name.endswith(FILE_ENDINGS):
        return Path(name)
    if not has_preset(name):
        hint = did_you_mean(name, [*presets(), *ALIASES])
        raise StateError(f"unknown preset '{name}'{hint}; known are {', '.join(presets())} and {KVTUNER}FILE")
    return presets()[ALIASES.get(name, name)]


def find_preset(name: str) -> Preset:
    """Return a preset by one of its names.

    Raises:
        StateError: if there is no such preset, with the nearest names.
        DocumentError: if its file is faulty.
    """
    return Preset.load(preset_path(name))


def plan_of(name: str, model: ModelInfo) -> Plan:
    """Return the plan of a model from a preset, or from `kvtuner:FILE`.

    Raises:
        StateError: if there is no such preset, with the nearest names.
        DocumentError: if its file is faulty.
        PlanError: if it does not fit the model.
    """
    if name.startswith(KVTUNER):
        return Plan.from_kvtuner(Path(name.removeprefix(KVTUNER)), model)
    return find_preset(name).plan(model, name)


def put_on(cache: CacheSettings, name: str, base: str) -> CacheSettings:
    """Return cache settings with the transforms, tokens and channels of a preset added.

    Args:
        cache: settings to add to.
        name: name of the preset.
        base: name of the plan or preset that the settings belong to, for errors.

    Raises:
        StateError, DocumentError: as `plan_of`.
        PlanError: if the settings and the preset cannot be combined.
    """
    try:
        return cache.with_axes(find_preset(name).cache)
    except ValueError as error:
        raise PlanError(f"preset '{name}' cannot be put on {base}: {error}") from error


def by_depth(plan: Plan, names: Sequence[str]) -> Plan:
    """Return a plan with what its layers have of their own in the token policies of presets that were put on it.

    Raises:
        StateError, DocumentError: as `plan_of`.
        PlanError: if shares and the plan's pages do not fit together.
    """
    layers = plan.layers
    for name in names:
        layers = find_preset(name).by_depth(layers, plan.cache)
    return plan if layers is plan.layers else Plan.build(plan.model, layers, plan.cache, plan.provenance)


def split(given: str, is_whole: Callable[[str], bool]) -> tuple[str, tuple[str, ...]]:
    """Return a name without the presets added to it, and these: `rank-2.3+mikv` is `rank-2.3` and `("mikv",)`.

    Args:
        given: the whole name.
        is_whole: test whether something has exactly this name, so that a `+` in it is part of the name.

    Raises:
        StateError: if there is no such preset, with the nearest names.
    """
    base, added = given, tuple[str, ...]()
    while "+" in base and not is_whole(base):
        base, _, last = base.rpartition("+")
        added = (last, *added)
    for preset in added:
        find_preset(preset)
    return base, added
