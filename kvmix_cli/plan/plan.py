"""The plan: storage of every layer's keys and values. See docs/plan-format.md.

A plan is frozen and complete: it names the model it was made for, each layer's bits, and how pages, groups, sinks
and the full-precision window are cut. It loads from its own YAML, from the short form `"0-3:k4v4,4-31:k2v2"`, from
KVTuner's preset YAML, and from ModelOpt's map of formats.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from ..errors import PlanError
from ..files import write_text
from .document.geometry import ModelInfo, coverage_faults
from .document.strict_yaml import Document, Fault, Faults, StrictModel, flow, head_comment, read_yaml, reason, validate
from .engines.kvtuner import kvtuner_widths
from .engines.modelopt import modelopt_widths
from .faults import early_faults, model_faults
from .forms import BitCount
from .layers import LayerPlan, LayerSpan, format_short, parse_short, spans_of
from .settings import CacheSettings, GroupSize
from .sizes import CacheBytes, layer_bytes, mean_bits

FORMAT: Final = "kvmix-plan/1"
BITS_TOLERANCE = 0.005
"""Files may state their bits rounded to two decimals."""
_COUNTS: tuple[BitCount, ...] = ("nominal", "stored")


class Provenance(TypedDict, total=False):
    """Facts about how kvmix made a plan, for its `provenance`; files may have others.

    Attributes:
        kvmix: version of kvmix.
        method: method of allocation, "preset", "shuffled", "short form", "kvtuner" or "modelopt".
        score: score that decided, or that predicts the loss.
        seed: seed of a method that draws at random.
        group_sizes: group sizes to choose from.
        evict: shares of tokens to evict to choose from.
        by_head: what KV heads have of their own.
        budget: limit that was asked for, see `allocation.Budget.summary`.
        pins: widths that were set by hand, in short form by layer.
        predicted_loss: predicted increase of the loss, in nats per token.
        predicted_context: tokens of the contexts that it is predicted for, if that makes a difference.
        trials: number of plans that a search measured.
        measured_loss: the lowest loss that it measured, in nats per token.
        profile_sha256: checksum of the profile.
    """

    kvmix: str
    method: str
    score: str
    seed: int
    group_sizes: list[GroupSize]
    evict: list[float]
    by_head: str
    budget: Mapping[str, float]
    pins: dict[int, str]
    predicted_loss: float
    predicted_context: int
    trials: int
    measured_loss: float
    profile_sha256: str


class Bits(StrictModel):
    """Mean bits per element over a plan's layers; see `sizes`."""

    nominal: float
    stored: float


class Plan(StrictModel):
    """A complete decision for one model.

    Attributes:
        provenance: how the plan was made. kvmix writes a `Provenance`; a file may have anything.
        bits: mean bits per element, checked against the layers.
        cache: settings of every layer's cache.
        layers: storage of each layer that has no stock cache, in order.
    """

    format: Literal["kvmix-plan/1"] = FORMAT
    model: ModelInfo
    provenance: dict[str, Any] = Field(default_factory=dict)
    bits: Bits
    cache: CacheSettings = Field(default_factory=CacheSettings)
    layers: dict[int, LayerPlan]

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: dict[int, LayerPlan]) -> dict[int, LayerPlan]:
        return dict(sorted(layers.items()))

    @model_validator(mode="after")
    def _complete(self) -> Plan:
        faults = [(("layers", *at), message) for at, message in coverage_faults(self.model, self.layers)]
        faults += model_faults(self.layers, self.cache, self.model)
        if faults := faults or list(self._misstated_bits()):
            raise Faults(faults)
        return self

    def _misstated_bits(self) -> Iterator[Fault]:
        """Yield a fault for bits at the head of a file that differ from its layers, or that no layer can have."""
        for name in _COUNTS:
            try:
                real = mean_bits(self.layers, self.cache, self.model, name)
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
        """Return a plan from its decisions, with its bits worked out. Raises PlanError if they do not fit together."""
        cache = cache or CacheSettings()
        try:
            bits = Bits(**_count_bits(layers, cache, model))
            return cls(model=model, layers=layers, cache=cache, provenance=provenance or {}, bits=bits)
        except ValueError as error:
            raise PlanError(f"no plan for {model.id}: {reason(error)}") from error

    @classmethod
    def uniform(cls, model: ModelInfo, k_bits: int, v_bits: int, cache: CacheSettings | None = None) -> Plan:
        """Return a plan with the same widths in every layer. Raises PlanError."""
        return cls.from_short(f"0-{model.layers - 1}:k{k_bits}v{v_bits}", model, cache)

    @classmethod
    def from_short(cls, text: str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Return a plan from its short form, `"0-3:k4v4,4-31:k2v2"`; layers with a stock cache keep it.

        Raises:
            PlanError: if the text is malformed, names a layer twice, or leaves one out.
        """
        try:
            layers = parse_short(text, model.stock)
        except ValueError as error:
            raise PlanError(f"'{text}' is no plan: {reason(error)}") from error
        return cls.build(model, layers, cache, {"method": "short form"})

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file. Raises DocumentError with every fault and its line."""
        document = read_yaml(Path(path))
        document.check_format(FORMAT)
        _expand_short(document)
        return validate(document, cls, early_faults(document.data))

    @classmethod
    def from_kvtuner(cls, path: Path | str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read KVTuner's preset YAML; layers with a stock cache keep it.

        Raises:
            DocumentError: with every fault and its line.
            PlanError: if the model's heads cannot be packed.
        """
        widths = kvtuner_widths(read_yaml(Path(path)), model)
        return cls.build(model, _layers_of(widths), cache, {"method": "kvtuner"})

    @classmethod
    def from_modelopt(cls, path: Path | str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read ModelOpt's `hf_quant_config.json`, or a `config.json` with it: FP8 as 8 bits, NVFP4 as 4 bits.

        Raises:
            DocumentError: with every fault.
            PlanError: if the model's heads cannot be packed.
        """
        widths = modelopt_widths(read_yaml(Path(path)), model)
        return cls.build(model, _layers_of(widths), cache, {"method": "modelopt"})

    def save(self, path: Path | str, command: str = "") -> Path:
        """Write the plan file; `command` becomes its head comment. Raises OutputError."""
        return write_text(Path(path), self.to_yaml(command))

    def to_yaml(self, command: str = "") -> str:
        """Return the plan as it is written to files."""
        data = self.model_dump(exclude_none=True, exclude={"layers"})
        if not self.model.stock:
            data["model"].pop("stock")
        lines = head_comment(command)
        lines += [f"{key}: {flow(value)}" for key, value in data.items()]
        lines.append("layers:")
        for index, layer in self.layers.items():
            lines.append(f"  {index}: {flow(layer.model_dump(exclude_none=True))}")
        return "\n".join(lines) + "\n"

    @property
    def spans(self) -> list[LayerSpan]:
        """Return spans of neighbouring layers that are stored alike: first index, last index and storage."""
        return spans_of(self.layers)

    @property
    def short(self) -> str:
        """Return the plan's widths in the short form; layers with a stock cache are left out."""
        return format_short(self.layers)

    @property
    def evicts(self) -> bool:
        """Return whether any layer drops tokens."""
        parts = (part for index, layer in self.layers.items() for part in self._parts(index, layer))
        policies = (part.settings(self.cache).tokens for part in parts)
        return any(policy is not None and policy.evicts for policy in policies)

    def _parts(self, index: int, layer: LayerPlan) -> list[LayerPlan]:
        """Return the storage of each group of a layer's heads."""
        return [part for _, part in layer.parts(self.model.heads(index).kv_heads)]

    @property
    def sha256(self) -> str:
        """Return the checksum of everything that changes what the cache does.

        Layers, stock layers and ratios are in order in every plan, so equal plans have equal checksums.
        """
        decided = self.model_dump(include={"model", "cache", "layers"})
        return hashlib.sha256(flow(decided).encode()).hexdigest()

    def cache_bytes(self, context: int, batch: int = 1, element_bytes: int = 2) -> CacheBytes:
        """Return the bytes of the planned layers after a prompt of `context` tokens.

        Args:
            context: tokens of the prompt.
            batch: number of sequences.
            element_bytes: size of an unquantized element, 2 for bfloat16 and float16, 4 for float32.
        """
        sizes = (context, batch, element_bytes)
        layers = self.layers.items()
        found = (layer_bytes(layer, self.cache, self.model.heads(index), *sizes) for index, layer in layers)
        return sum(found, CacheBytes(0, 0))

    def unquantized_bytes(self, context: int, batch: int = 1, element_bytes: int = 2) -> int:
        """Return the bytes that the planned layers would take unquantized; arguments as in `cache_bytes`."""
        elements = sum(self.model.heads(index).token_elements for index in self.layers)
        return batch * context * elements * element_bytes

    def check_model(self, model: ModelInfo) -> None:
        """Raise PlanError unless the plan was made for a model of this shape, whatever its name."""
        names = ("layers", "kv_heads", "head_dim", "value_dim", "stock")
        wrong = [
            f"{name} {getattr(self.model, name)} against {getattr(model, name)}"
            for name in names
            if getattr(self.model, name) != getattr(model, name)
        ]
        wrong = (
            wrong
            or [
                f"layer {layer} has KV heads of {self.model.heads(layer)} against {model.heads(layer)}"
                for layer in self.model.quantizable
                if self.model.heads(layer) != model.heads(layer)
            ][:1]
        )
        if self.model.config_sha256 and model.config_sha256 and self.model.config_sha256 != model.config_sha256:
            checksums = f"(checksum {self.model.config_sha256[:8]} against {model.config_sha256[:8]})"
            wrong = wrong or [f"same layers, but another configuration {checksums}"]
        if wrong:
            is_same_name = self.model.id == model.id
            other = f"another {model.id} than this one" if is_same_name else f"{self.model.id}, not for {model.id}"
            raise PlanError(
                f"the plan was made for {other}: {', '.join(wrong)}; "
                f"make one with `{shlex.join(['kvmix', 'profile', model.id])}` and "
                f"`{shlex.join(['kvmix', 'allocate', '--avg-bits', '3', '--model', model.id])}`"
            )


def _layers_of(widths: Mapping[int, tuple[int, int]]) -> dict[int, LayerPlan]:
    return {index: LayerPlan.of_bits(*bits) for index, bits in widths.items()}


def _expand_short(document: Document) -> None:
    """Replace layers given in the short form; such a file need not state its bits."""
    data = document.data
    if not isinstance(data.get("layers"), str):
        return
    stock = data["model"].get("stock") if isinstance(data.get("model"), dict) else None
    try:
        layers = parse_short(data["layers"], stock if isinstance(stock, dict) else ())
    except ValueError as error:
        raise document.error([(("layers",), f"layers: {reason(error)}")]) from error
    data["layers"] = {index: layer.model_dump() for index, layer in layers.items()}
    if "bits" not in data:
        data["bits"] = _bits_if_valid(layers, data)


def _bits_if_valid(layers: Mapping[int, LayerPlan], data: dict[str, Any]) -> dict[str, float]:
    """Return the bits of a file that does not state them; zeros if validation is going to refuse the file."""
    try:
        cache = CacheSettings.model_validate(data.get("cache", {}))
        return _count_bits(layers, cache, ModelInfo.model_validate(data.get("model")))
    except ValueError:
        return dict.fromkeys(_COUNTS, 0.0)


def _count_bits(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> dict[str, float]:
    return {str(count): round(mean_bits(layers, cache, model, count), 6) for count in _COUNTS}
