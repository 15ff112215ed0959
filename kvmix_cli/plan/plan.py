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
from typing import Any, Final, Literal, TypedDict, TypeGuard

from pydantic import Field, field_validator, model_validator

from ..errors import PlanError
from ..files import write_text
from .channels import ChannelPolicy
from .codec import TransformTensor
from .document import Document, Fault, Faults, StrictModel, flow, head_comment, read_yaml, reason, validate
from .forms import BitCount
from .geometry import ModelInfo, coverage_faults
from .layers import LayerPlan, LayerSpan, format_short, parse_short, spans_of
from .modelopt import modelopt_layers
from .policies import WIDTHS
from .settings import CacheSettings, GroupSize
from .sizes import CacheBytes, layer_bytes, mean_bits

FORMAT: Final = "kvmix-plan/1"
BITS_TOLERANCE = 0.005
"""Files may state their bits rounded to two decimals."""
_COUNTS: tuple[BitCount, ...] = ("nominal", "stored")
_KVTUNER_KEYS = {"nbits_key", "nbits_value"}


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
        faults += _channel_faults(self.cache.channels, self.model)
        faults += _codec_faults(self.layers, self.cache, self.model)
        faults += _own_faults(self.layers, self.cache, self.model)
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
        return validate(document, cls, _early_faults(document.data))

    @classmethod
    def from_kvtuner(cls, path: Path | str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read KVTuner's preset YAML (`0: {nbits_key: 8, nbits_value: 4}`); layers with a stock cache keep it.

        Raises:
            DocumentError: with every fault and its line.
            PlanError: if the model's heads cannot be packed.
        """
        document = read_yaml(Path(path))
        data = document.data
        if not _has_kvtuner_form(data):
            raise document.error([((), "not a KVTuner preset: expected `LAYER: {nbits_key: N, nbits_value: N}`")])
        pairs = {int(index): pair for index, pair in data.items() if int(index) not in model.stock}
        faults = list(coverage_faults(model, pairs))
        faults += [
            ((index, key), f"{index}.{key}: must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")
            for index, pair in data.items()
            for key, bits in pair.items()
            if type(bits) is not int or bits not in WIDTHS
        ]
        if faults:
            raise document.error(faults)
        layers = {index: LayerPlan.of_bits(pair["nbits_key"], pair["nbits_value"]) for index, pair in pairs.items()}
        return cls.build(model, dict(sorted(layers.items())), cache, {"method": "kvtuner"})

    @classmethod
    def from_modelopt(cls, path: Path | str, model: ModelInfo, cache: CacheSettings | None = None) -> Plan:
        """Read ModelOpt's `hf_quant_config.json`, or a `config.json` with it: FP8 as 8 bits, NVFP4 as 4 bits.

        Raises:
            DocumentError: with every fault.
            PlanError: if the model's heads cannot be packed.
        """
        layers = modelopt_layers(read_yaml(Path(path)), model)
        return cls.build(model, layers, cache, {"method": "modelopt"})

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
            wrong = wrong or ["same layers, but another configuration"]
        if wrong:
            raise PlanError(
                f"the plan was made for {self.model.id}, not for {model.id}: {', '.join(wrong)}; "
                f"make one with `{shlex.join(['kvmix', 'profile', model.id])}` and "
                f"`{shlex.join(['kvmix', 'allocate', '--avg-bits', '3', '--model', model.id])}`"
            )


def is_kvtuner(document: Document) -> bool:
    """Return whether a document has the form of KVTuner's presets."""
    return _has_kvtuner_form(document.data)


def _has_kvtuner_form(data: object) -> TypeGuard[dict[int | str, dict[str, Any]]]:
    if not isinstance(data, dict) or not data:
        return False
    pairs = all(isinstance(pair, dict) and set(pair) == _KVTUNER_KEYS for pair in data.values())
    return pairs and all(str(index).isdecimal() for index in data)


def _channel_faults(channels: ChannelPolicy | None, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault if the heads of a model cannot be cut into a policy's channel groups."""
    if channels is None:
        return
    try:
        for heads in model.geometries:
            channels.widths(heads.key_dim)
    except ValueError as error:
        yield ("cache", "channels"), f"cache.channels: {error}"


def _codec_faults(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault for transform codes that do not fit their layer, or whose basis is not stated."""
    for index in sorted(layers.keys() & set(model.quantizable)):
        heads = model.heads(index)
        for tensor, kind in layers[index].tensors:
            if isinstance(tensor, TransformTensor):
                at = ("layers", index, kind[0])
                for fault in tensor.faults(heads.kv_heads, heads.dim(kind)):
                    yield (*at, "widths"), f"{'.'.join(map(str, at))}: {fault}"
                if cache.transform is None:
                    yield (*at, "codec"), f"{'.'.join(map(str, at))}: a transform needs its basis in cache.transform"


def _own_faults(layers: Mapping[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> Iterator[Fault]:
    """Yield a fault for what a layer, or a group of its heads, has of its own that does not fit cache or model."""
    for index in sorted(layers.keys() & set(model.quantizable)):
        layer, kv_heads = layers[index], model.heads(index).kv_heads
        faults = list(layer.head_faults(kv_heads))
        if layer.head_groups and cache.tokens is not None and cache.tokens.by_layer is not None:
            faults.append("layers that share out tokens as the prompt has it (by_layer) have no groups of heads")
        yield from ((("layers", index, "head_groups"), f"layers.{index}.head_groups: {fault}") for fault in faults)
        for _, part in [] if faults else layer.parts(kv_heads):
            try:
                own = part.settings(cache)
                found = [*own.tokens.faults(cache.page), *own.budget_faults()] if own.tokens and part.tokens else []
            except ValueError as error:
                found = [reason(error)]
            yield from ((("layers", index, "tokens"), f"layers.{index}.tokens: {fault}") for fault in found)


def _early_faults(data: Any) -> list[Fault]:
    """Return what does not fit the model of a file, as far as it can be told beside the file's other faults."""
    layers, cache = data.get("layers"), data.get("cache")
    faults: list[Fault] = []
    try:
        info = ModelInfo.model_validate(data.get("model"))
        if isinstance(layers, dict) and all(type(layer) is int for layer in layers):
            faults += [(("layers", *at), message) for at, message in coverage_faults(info, layers)]
        if isinstance(cache, dict) and "channels" in cache:
            faults += _channel_faults(ChannelPolicy.model_validate(cache["channels"]), info)
    except ValueError:
        pass
    return faults


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
