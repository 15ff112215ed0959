"""The plan: what the cache does with every layer's keys and values. See docs/plan-format.md.

A plan is frozen and complete: it names the model it was made for, each layer's bits, and how pages, groups, sinks
and the full-precision window are cut. It loads from its own YAML, from the short form `"0-3:k4v4,4-31:k2v2"`, and
from KVTuner's preset YAML.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from kvmix_kernels.layout import Kind
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from . import budget
from .axes import WIDTHS, ChannelPolicy, known_width
from .errors import PlanError
from .files import Document, Fault, Faults, flow, head_comment, read_yaml, reason, validate, write_text
from .settings import CacheSettings, GroupSize

FORMAT: Final = "kvmix-plan/1"
BITS_TOLERANCE = 0.005
"""Files may state their bits rounded to two decimals."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelInfo(_Frozen):
    """The model that a profile or plan belongs to, as far as its cache goes.

    Attributes:
        id: hub id, local folder or `builtin:` name.
        layers: decoder layers.
        kv_heads, head_dim: of one layer.
        config_sha256: of what shapes the model (see `geometry.fingerprint`).
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

    _known = field_validator("bits")(known_width)


class LayerPlan(_Frozen):
    """Keys and values of one layer."""

    k: TensorPlan
    v: TensorPlan

    @property
    def tensors(self) -> tuple[tuple[TensorPlan, Kind], tuple[TensorPlan, Kind]]:
        """Both, each with its kind."""
        return (self.k, "key"), (self.v, "value")

    @property
    def short(self) -> str:
        """The widths, `k4v2`."""
        return f"k{self.k.bits}v{self.v.bits}"


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
        faults = [(("layers", *at), message) for at, message in coverage(self.model, self.layers)]
        faults += misfits(self.cache.channels, self.model)
        if faults := faults or list(self._misstated()):
            raise Faults(faults)
        return self

    def _misstated(self) -> Iterator[Fault]:
        """Bits at the head of a file that are not those of its layers, or that no layer can have."""
        for name in ("nominal", "stored"):
            try:
                real = budget.mean_bits(self.layers, self.cache, self.model, name)
            except ValueError as error:
                yield ("model",), str(error)
                return
            stated = getattr(self.bits, name)
            if not abs(stated - real) < BITS_TOLERANCE:
                yield ("bits", name), f"bits.{name} is {stated:g} but the layers amount to {real:.4f}"

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
            bits = Bits(**_count_bits(layers, cache, model))
            return cls(model=model, layers=layers, cache=cache, provenance=provenance or {}, bits=bits)
        except ValueError as error:
            raise PlanError(f"no plan for {model.id}: {reason(error)}") from error

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
            raise PlanError(f"'{text}' is no plan: {reason(error)}") from error
        layers = {index: layer for index, layer in layers.items() if index not in model.stock}
        return cls.build(model, layers, cache, {"method": "short form"})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file. Raises DocumentError with every fault and its line."""
        document = read_yaml(path)
        document.check_format(FORMAT)
        _expand_short(document)
        return validate(document, cls, _misfits_model(document.data))

    @classmethod
    def from_kvtuner(cls, path: Path, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read KVTuner's preset YAML (`0: {nbits_key: 8, nbits_value: 4}`) for a model.

        Layers with a stock cache may be covered; they keep it.

        Raises:
            DocumentError: with every fault and its line.
            PlanError: if the model's heads cannot be packed.
        """
        document = read_yaml(path)
        if not is_kvtuner(document):
            raise document.error([((), "not a KVTuner preset: expected `LAYER: {nbits_key: N, nbits_value: N}`")])
        pairs = {int(index): pair for index, pair in document.data.items() if int(index) not in model.stock}
        faults = list(coverage(model, pairs))
        faults += [
            ((index, key), f"{index}.{key}: must be one of {_known_widths()}, got {bits!r}")
            for index, pair in document.data.items()
            for key, bits in pair.items()
            if type(bits) is not int or bits not in WIDTHS
        ]
        if faults:
            raise document.error(faults)
        layers = {index: _layer(pair["nbits_key"], pair["nbits_value"]) for index, pair in sorted(pairs.items())}
        return cls.build(model, layers, cache, {"method": "kvtuner"})

    def save(self, path: Path, command: str = "") -> Path:
        """Write the plan file; `command` becomes its head comment. Raises OutputError."""
        return write_text(path, self.to_yaml(command))

    def to_yaml(self, command: str = "") -> str:
        """The plan as it is written to files."""
        data = self.model_dump(exclude_none=True, exclude={"layers"})
        if not self.model.stock:
            data["model"].pop("stock")
        lines = head_comment(command)
        lines += [f"{key}: {flow(value)}" for key, value in data.items()]
        lines.append("layers:")
        for index, layer in sorted(self.layers.items()):
            lines.append(f"  {index}: {flow(layer.model_dump(exclude_none=True))}")
        return "\n".join(lines) + "\n"

    @property
    def runs(self) -> list[tuple[int, int, LayerPlan]]:
        """Neighbouring layers that are stored alike: first, last and how."""
        runs: list[tuple[int, int, LayerPlan]] = []
        for index, layer in sorted(self.layers.items()):
            if runs and runs[-1][1:] == (index - 1, layer):
                runs[-1] = (runs[-1][0], index, layer)
            else:
                runs.append((index, index, layer))
        return runs

    @property
    def short(self) -> str:
        """The plan's widths in the short form; layers with a stock cache are left out."""
        return ",".join(
            f"{first}:{layer.short}" if first == last else f"{first}-{last}:{layer.short}"
            for first, last, layer in self.runs
        )

    @property
    def sha256(self) -> str:
        """Of everything that changes what the cache does."""
        decided = self.model_dump(include={"model", "cache", "layers"})
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


def coverage(model: ModelInfo, layers: Collection[int]) -> Iterator[Fault]:
    """What keeps a set of layers from being exactly the ones that a plan or profile of this model is about."""
    expected = set(model.quantizable)
    if missing := sorted(expected - set(layers)):
        yield (), f"no entry for layer {ranges(missing)}"
    for layer in sorted(set(layers) - expected):
        kind = model.stock.get(layer)
        keeps = f"it keeps its {kind} cache" if kind else f"the model has layers 0-{model.layers - 1}"
        yield (layer,), f"layer {layer} cannot be planned: {keeps}"


def misfits(channels: ChannelPolicy | None, model: ModelInfo) -> Iterator[Fault]:
    """Why the heads of a model cannot be cut into a policy's runs of channels."""
    try:
        if channels is not None:
            channels.widths(model.head_dim)
    except ValueError as error:
        yield ("cache", "channels"), f"cache.channels: {error}"


def _misfits_model(data: Any) -> list[Fault]:
    """What does not fit the model of a file that may have other faults, as far as it can be told."""
    layers, cache = data.get("layers"), data.get("cache")
    faults: list[Fault] = []
    try:
        info = ModelInfo.model_validate(data.get("model"))
        if isinstance(layers, dict) and all(type(layer) is int for layer in layers):
            faults += [(("layers", *at), message) for at, message in coverage(info, layers)]
        if isinstance(cache, dict) and "channels" in cache:
            faults += misfits(ChannelPolicy.model_validate(cache["channels"]), info)
    except ValueError:
        pass
    return faults


def _layer(k_bits: int, v_bits: int) -> LayerPlan:
    return LayerPlan(k=TensorPlan(bits=k_bits), v=TensorPlan(bits=v_bits))


def _parse_short(text: str) -> dict[int, LayerPlan]:
    layers: dict[int, LayerPlan] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?:k(\d{1,2})v(\d{1,2})\s*", part, re.ASCII)
        if not match:
            raise ValueError(f"'{part.strip()}' is not of the form FIRST-LAST:kBITSvBITS")
        first, k_bits, v_bits = (int(match[group]) for group in (1, 3, 4))
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"'{part.strip()}' ends before it begins")
        if twice := sorted(layers.keys() & range(first, last + 1)):
            raise ValueError(f"layer {ranges(twice)} is given twice")
        layers.update(dict.fromkeys(range(first, last + 1), _layer(k_bits, v_bits)))
    return layers


def _expand_short(document: Document) -> None:
    """A file may give its layers in the short form, and then need not state the bits."""
    data = document.data
    if not isinstance(data.get("layers"), str):
        return
    try:
        layers = _parse_short(data["layers"])
    except ValueError as error:
        raise document.error([(("layers",), f"layers: {reason(error)}")]) from error
    stock = data["model"].get("stock") if isinstance(data.get("model"), dict) else None
    layers = {index: layer for index, layer in layers.items() if not isinstance(stock, dict) or index not in stock}
    data["layers"] = {index: layer.model_dump() for index, layer in layers.items()}
    if "bits" not in data:
        data["bits"] = _bits_if_valid(layers, data)


def _bits_if_valid(layers: dict[int, LayerPlan], data: dict[str, Any]) -> dict[str, float]:
    """Bits of a file that does not state them; anything, if validation is going to refuse the file."""
    try:
        cache = CacheSettings.model_validate(data.get("cache", {}))
        return _count_bits(layers, cache, ModelInfo.model_validate(data.get("model")))
    except ValueError:
        return {"nominal": 0.0, "stored": 0.0}


def _count_bits(layers: dict[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> dict[str, float]:
    counts: tuple[budget.Count, ...] = ("nominal", "stored")
    return {count: round(budget.mean_bits(layers, cache, model, count), 6) for count in counts}


def _known_widths() -> str:
    return ", ".join(map(str, WIDTHS))


def ranges(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
