"""Presets: published methods as settings of this cache, usable without a profile. See docs/presets.md.

A preset is a readable file, `profiles/presets/NAME.yaml`: widths by layer, and a plan's cache section. Its head comment
names its source and where it differs. `kvtuner:FILE` is one, too: widths from KVTuner's preset, and the default cache.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import PlanError, StateError, did_you_mean
from .document import read_yaml, validate
from .geometry import ModelInfo
from .layers import LayerPlan, TensorPlan
from .plan import Plan
from .policies import known_width
from .settings import CacheSettings

FORMAT: Final = "kvmix-preset/1"
KVTUNER: Final = "kvtuner:"
_SHIPPED = Path(__file__).parents[1] / "presets"
_CHECKOUT = Path(__file__).parents[2] / "profiles" / "presets"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ByLayer(_Frozen):
    """A width for all layers, or one for the first of them and another for the rest; `2` is short for `{bits: 2}`.

    Attributes:
        first: share of the layers, rounded down, that have `bits`.
        rest: bits of the others.
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
        """Bits of the layer at a place among so many."""
        if self.first is None or self.rest is None:
            return self.bits
        return self.bits if place < int(Fraction(self.first).limit_denominator(10_000) * layers) else self.rest


class Widths(_Frozen):
    """Of keys and of values."""

    k: ByLayer
    v: ByLayer


class Preset(_Frozen):
    """A method's widths, and how its cache is cut."""

    format: Literal["kvmix-preset/1"] = FORMAT
    bits: Widths
    cache: CacheSettings

    @classmethod
    def load(cls, path: Path) -> Preset:
        """Read a preset file. Raises DocumentError with every fault and its line."""
        document = read_yaml(path)
        document.check_format(FORMAT)
        return validate(document, cls)

    def plan(self, model: ModelInfo, name: str) -> Plan:
        """The plan of a model. Raises PlanError if its heads cannot be packed so."""
        count = len(model.quantizable)
        layers = {
            layer: LayerPlan(
                k=TensorPlan(bits=self.bits.k.at(place, count)), v=TensorPlan(bits=self.bits.v.at(place, count))
            )
            for place, layer in enumerate(model.quantizable)
        }
        return Plan.build(model, layers, self.cache, {"method": "preset", "preset": name})


def presets() -> dict[str, Path]:
    """All presets by name."""
    folder = _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_preset(name: str) -> Preset:
    """A preset by its name. Raises StateError with the nearest names."""
    known = presets()
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)} and {KVTUNER}FILE"
        raise StateError(f"no preset '{name}'{hint}")
    return Preset.load(known[name])


def plan_of(name: str, model: ModelInfo) -> Plan:
    """The plan of a model from a preset, or from `kvtuner:FILE`.

    Raises:
        StateError: if there is no such preset, with the nearest names.
        DocumentError: if its file is faulty.
        PlanError: if it does not fit the model.
    """
    if name.startswith(KVTUNER):
        return Plan.from_kvtuner(Path(name.removeprefix(KVTUNER)), model)
    return find_preset(name).plan(model, name)


def put_on(cache: CacheSettings, name: str, base: str) -> CacheSettings:
    """A cache with the transforms, tokens and channels of a preset, too.

    Args:
        base: what the cache is of, for errors.

    Raises:
        StateError, DocumentError: as `plan_of`.
        PlanError: if the two do not go together.
    """
    try:
        return cache.with_axes(find_preset(name).cache)
    except ValueError as error:
        raise PlanError(f"preset '{name}' cannot be put on {base}: {error}") from error


def split(given: str, is_whole: Callable[[str], bool]) -> tuple[str, tuple[str, ...]]:
    """What stands before the presets that are put on it: `rank-2.3+mikv` is `rank-2.3` and `("mikv",)`.

    Args:
        is_whole: whether there is something of this very name, with every `+` in it.

    Raises:
        StateError: if there is no such preset, with the nearest names.
    """
    base, presets = given, tuple[str, ...]()
    while "+" in base and not is_whole(base):
        base, _, last = base.rpartition("+")
        presets = (last, *presets)
    for preset in presets:
        find_preset(preset)
    return base, presets
