"""The plan: what the cache does with every layer's keys and values. See docs/plan-format.md.

A plan is frozen and complete: it names the model it was made for, each layer's bits, and how pages, groups, sinks
and the full-precision window are cut. It loads from its own YAML, from the short form `"0-3:k4v4,4-31:k2v2"`, and
from KVTuner's preset YAML.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from kvmix_kernels.layout import BITS, FULL_PRECISION_BITS
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from . import budget
from .errors import DocumentError, PlanError
from .files import Document, flow, parse_yaml, read_yaml, validate, write_text
from .windows import Recent, Window

FORMAT = "kvmix-plan/1"
WIDTHS = (*BITS, FULL_PRECISION_BITS)
GroupSize = int | Literal["row"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelInfo(_Frozen):
    """The model that a profile or plan belongs to, as far as its cache goes.

    Attributes:
        id: hub id, local folder or `builtin:` name.
        layers: decoder layers.
        kv_heads, head_dim: of one layer.
        config_sha256: of what shapes the model (see `models.fingerprint`).
        stock: layers that keep the transformers cache layer of their kind, e.g. `{1: "sliding_attention"}`.
    """

    id: str
    revision: str | None = None
    layers: int = Field(ge=1, le=10_000)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    config_sha256: str | None = None
    stock: dict[int, str] = Field(default_factory=dict)

    @property
    def quantizable(self) -> list[int]:
        """Indices of the layers whose keys and values a plan decides about."""
        return [layer for layer in range(self.layers) if layer not in self.stock]


class TensorPlan(_Frozen):
    """How one layer's keys, or values, are stored."""

    bits: int
    group_size: GroupSize | None = None

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int) -> int:
        if bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
        return bits

    @field_validator("group_size")
    @classmethod
    def _positive(cls, size: GroupSize | None) -> GroupSize | None:
        return _check_group(size)


class LayerPlan(_Frozen):
    """Keys and values of one layer."""

    k: TensorPlan
    v: TensorPlan


class CacheSettings(_Frozen):
    """How every layer's cache is cut: `sink | packed pages | tail`.

    Attributes:
        page: tokens that are quantized together, once; a multiple of 16.
        sink: first tokens that stay in full precision.
        group_size: elements that share a scale and a zero; `"row"` for a whole page row or head.
        scale_dtype: of scales and zeros.
        window: which recent tokens stay in full precision.
    """

    page: int = Field(default=128, ge=16, multiple_of=16)
    sink: int = Field(default=4, ge=0)
    group_size: GroupSize = 64
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    window: Window = Field(default_factory=Recent)

    @field_validator("group_size")
    @classmethod
    def _positive(cls, size: GroupSize) -> GroupSize:
        checked = _check_group(size)
        return size if checked is None else checked


class Bits(_Frozen):
    """Mean bits per element over a plan's layers; see `budget`."""

    nominal: float
    stored: float


class Plan(_Frozen):
    """A complete decision for one model."""

    format: Literal["kvmix-plan/1"] = FORMAT
    model: ModelInfo
    provenance: dict[str, Any] = Field(default_factory=dict)
    bits: Bits
    cache: CacheSettings = Field(default_factory=CacheSettings)
    layers: dict[int, LayerPlan]

    @model_validator(mode="after")
    def _complete(self) -> Plan:
        expected = set(self.model.quantizable)
        faults = []
        if missing := sorted(expected - set(self.layers)):
            faults.append(f"no entry for layer {_ranges(missing)}")
        if extra := sorted(set(self.layers) - expected):
            faults.append(f"layer {_ranges(extra)} cannot be planned: the model has layers 0-{self.model.layers - 1}")
        if faults:
            raise ValueError("; ".join(faults))
        for name in ("nominal", "stored"):
            stated, real = getattr(self.bits, name), budget.mean_bits(self.layers, self.cache, self.model, name)
            if not abs(stated - real) < 0.005:
                raise ValueError(f"bits.{name} is {stated:g} but the layers amount to {real:.4f}")
        return self

    @classmethod
    def build(
        cls,
        model: ModelInfo,
        layers: dict[int, LayerPlan],
        cache: CacheSettings | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Plan:
        """A plan from its decisions; the bits are worked out. Raises PlanError if they do not fit together."""
        cache = cache or CacheSettings()
        try:
            stated = {
                name: round(budget.mean_bits(layers, cache, model, name), 4) for name in ("nominal", "stored")
            }
            return cls(model=model, layers=layers, cache=cache, provenance=provenance or {}, bits=Bits(**stated))
        except ValueError as error:
            raise PlanError(f"no plan for {model.id}: {_reason(error)}") from error

    @classmethod
    def uniform(cls, model: ModelInfo, k_bits: int, v_bits: int, cache: CacheSettings | None = None) -> Plan:
        """The same widths everywhere. Raises PlanError."""
        return cls.from_short(f"0-{model.layers - 1}:k{k_bits}v{v_bits}", model, cache)

    @classmethod
    def from_short(cls, text: str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """A plan from its short form, `"0-3:k4v4,4-31:k2v2"`. Layers with a stock cache may be covered; they keep it.

        Raises:
            PlanError: if the text is malformed, names a layer twice, or leaves one out.
        """
        try:
            layers = _parse_short(text)
        except ValueError as error:
            raise PlanError(f"'{text}' is no plan: {error}") from error
        layers = {index: layer for index, layer in layers.items() if index not in model.stock}
        return cls.build(model, layers, cache, {"method": "short form"})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file. Raises DocumentError with every fault and its line."""
        document = read_yaml(path)
        _expand_short(document)
        if isinstance(document.data, dict) and document.data.get("format") != FORMAT:
            found = document.data.get("format")
            document.fail([(("format",), f"format must be '{FORMAT}', got {found!r}")])
        return validate(document, cls)

    @classmethod
    def from_kvtuner(cls, path: Path, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read KVTuner's preset YAML (`0: {nbits_key: 8, nbits_value: 4}`) for a model. Raises DocumentError."""
        document = read_yaml(path)
        if not is_kvtuner(document):
            document.fail([((), "not a KVTuner preset: expected `LAYER: {nbits_key: N, nbits_value: N}`")])
        layers = {
            int(index): LayerPlan(k=TensorPlan(bits=pair["nbits_key"]), v=TensorPlan(bits=pair["nbits_value"]))
            for index, pair in document.data.items()
        }
        return cls.build(model, layers, cache, {"method": "kvtuner"})

    def save(self, path: Path, command: str = "") -> Path:
        """Write the plan file; `command` becomes its head comment. Raises OutputError."""
        return write_text(path, self.to_yaml(command))

    def to_yaml(self, command: str = "") -> str:
        """The plan as it is written to files."""
        data = self.model_dump(mode="json", exclude_none=True, exclude={"layers"})
        if not self.model.stock:
            data["model"].pop("stock")
        lines = [f"# {line}" for line in command.splitlines()]
        lines += [f"{key}: {flow(value)}" for key, value in data.items()]
        lines.append("layers:")
        for index, layer in sorted(self.layers.items()):
            lines.append(f"  {index}: {flow(layer.model_dump(exclude_none=True))}")
        return "\n".join(lines) + "\n"

    @property
    def short(self) -> str:
        """The plan's widths in the short form; layers with a stock cache are left out."""
        runs: list[list[Any]] = []
        for index, layer in sorted(self.layers.items()):
            widths = f"k{layer.k.bits}v{layer.v.bits}"
            if runs and runs[-1][2] == widths and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index, widths])
        return ",".join(f"{a}:{w}" if a == b else f"{a}-{b}:{w}" for a, b, w in runs)

    @property
    def sha256(self) -> str:
        """Of everything that changes what the cache does."""
        decided = self.model_dump(mode="json", include={"model", "cache", "layers"})
        return hashlib.sha256(flow(decided).encode()).hexdigest()

    def check_model(self, model: ModelInfo) -> None:
        """Raise PlanError unless the plan was made for this model (same shape, whatever its name)."""
        names = ("layers", "kv_heads", "head_dim", "stock")
        wrong = [
            f"{name} {getattr(self.model, name)} against {getattr(model, name)}"
            for name in names
            if getattr(self.model, name) != getattr(model, name)
        ]
        if self.model.config_sha256 and model.config_sha256 and self.model.config_sha256 != model.config_sha256:
            wrong = wrong or ["same layers, but another configuration"]
        if wrong:
            raise PlanError(
                f"the plan was made for {self.model.id}, not for {model.id}: {', '.join(wrong)}; "
                f"make one with `kvmix profile {model.id}` and `kvmix allocate`"
            )


def is_kvtuner(document: Document) -> bool:
    """Whether a document has the form of KVTuner's presets."""
    data = document.data
    return (
        isinstance(data, dict)
        and bool(data)
        and all(isinstance(pair, dict) and set(pair) == {"nbits_key", "nbits_value"} for pair in data.values())
        and all(str(index).isdecimal() for index in data)
    )


def _check_group(size: GroupSize | None) -> GroupSize | None:
    if isinstance(size, int) and size < 8:
        raise ValueError(f"group_size must be at least 8 or 'row', got {size}")
    return size


def _parse_short(text: str) -> dict[int, LayerPlan]:
    layers: dict[int, LayerPlan] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?:k(\d+)v(\d+)\s*", part)
        if not match:
            raise ValueError(f"'{part.strip()}' is not of the form FIRST-LAST:kBITSvBITS")
        first, last, k_bits, v_bits = (int(number) if number else None for number in match.groups())
        for index in range(first or 0, (first if last is None else last) + 1):  # type: ignore[operator]
            if index in layers:
                raise ValueError(f"layer {index} is given twice")
            layers[index] = LayerPlan(k=TensorPlan(bits=k_bits), v=TensorPlan(bits=v_bits))  # type: ignore[arg-type]
    return layers


def _expand_short(document: Document) -> None:
    """A file may give its layers in the short form, and then need not state the bits."""
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("layers"), str):
        return
    try:
        layers = _parse_short(data["layers"])
        model = ModelInfo.model_validate(data.get("model"))
        cache = CacheSettings.model_validate(data.get("cache", {}))
    except ValueError as error:
        document.fail([(("layers",), _reason(error))])
        raise AssertionError from error
    layers = {index: layer for index, layer in layers.items() if index not in model.stock}
    data["layers"] = {index: layer.model_dump() for index, layer in layers.items()}
    if "bits" not in data:
        data["bits"] = {name: budget.mean_bits(layers, cache, model, name) for name in ("nominal", "stored")}


def _reason(error: ValueError) -> str:
    faults = getattr(error, "errors", None)
    if faults is None:
        return str(error)
    return "; ".join(fault["msg"].removeprefix("Value error, ") for fault in faults())


def _ranges(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
