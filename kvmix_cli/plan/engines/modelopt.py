"""ModelOpt's map of KV formats, as in `hf_quant_config.json`, or below `quantization_config` in `config.json`.

    quantization:
      kv_cache_quant_algo: MIXED_PRECISION           # or FP8 or NVFP4, in all layers where there is no map
      kv_cache_quantized_layers:
        model.layers.0.self_attn: {quant_algo: FP8}
      kv_cache_schema_version: 1

In `config.json` ModelOpt writes the algorithm as `kv_cache_scheme`: `{num_bits: 8, type: float, dynamic: false}`, or by
its name.

Source: NVIDIA Model-Optimizer's main branch (https://github.com/NVIDIA/Model-Optimizer/pull/2272). Layers that the map
leaves out keep full precision. FP8 becomes 8 bits here and NVFP4 4 bits, in our codec, not in theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ..document.geometry import ModelInfo
from ..document.strict_yaml import Document, Fault
from .formats import MODELOPT

ALGO: Final = "kv_cache_quant_algo"
MAP: Final = "kv_cache_quantized_layers"
VERSION: Final = "kv_cache_schema_version"
SCHEME: Final = "kv_cache_scheme"
MIXED: Final = "MIXED_PRECISION"
SCHEMA: Final = 1
_SECTIONS = ("quantization", "quantization_config")
_LAYER = re.compile(r"(?:^|\.)(\d{1,5})(?:\.|$)")


def is_modelopt(document: Document) -> bool:
    """Return whether a document has a section in which ModelOpt states the formats of a KV cache."""
    return _section(document.data) is not None


def modelopt_widths(document: Document, model: ModelInfo) -> dict[int, tuple[int, int]]:
    """Return the widths of keys and values by layer, from ModelOpt's map; without layers that have a stock cache.

    Raises:
        DocumentError: with every fault.
    """
    found = _section(document.data)
    if found is None:
        raise document.error([((), f"no map of ModelOpt: expected `quantization` that has `{ALGO}` or `{MAP}`")])
    name, section = found
    if faults := list(_faults(name, section, model)):
        raise document.error(faults)
    algo, listed = _algo(section), section.get(MAP) or {}
    algos = {_layer(module): entry["quant_algo"] for module, entry in listed.items()}
    if not listed and algo in MODELOPT:
        algos = dict.fromkeys(model.quantizable, algo)
    widths = {layer: MODELOPT[algo].bits for layer, algo in algos.items()}
    return {layer: (bits, bits) for layer in model.quantizable for bits in [widths.get(layer, FULL_PRECISION_BITS)]}


def _section(data: object) -> tuple[str, Mapping[Any, Any]] | None:
    if not isinstance(data, Mapping):
        return None
    for name in _SECTIONS:
        section = data.get(name)
        if isinstance(section, Mapping) and section.keys() & {ALGO, MAP, SCHEME}:
            return name, section
    return None


def _algo(section: Mapping[Any, Any]) -> Any:
    """Return the algorithm of all layers, from either of its forms."""
    scheme = section.get(SCHEME)
    if section.get(ALGO) is not None or scheme is None:
        return section.get(ALGO)
    if not isinstance(scheme, Mapping):
        return scheme
    bits = {form.bits: name for name, form in MODELOPT.items()}
    return bits.get(scheme.get("num_bits", 0), scheme) if scheme.get("type") == "float" else scheme


def _faults(name: str, section: Mapping[Any, Any], model: ModelInfo) -> Iterator[Fault]:
    algo, listed, version = _algo(section), section.get(MAP), section.get(VERSION, SCHEMA)
    known = ", ".join(MODELOPT)
    if version != SCHEMA:
        yield (name, VERSION), f"{VERSION} must be {SCHEMA}, got {version!r}"
    if algo is not None and (not isinstance(algo, str) or algo not in (MIXED, *MODELOPT)):
        yield (name, ALGO), f"{ALGO} must be {known}, {MIXED} or null, got {algo!r}"
    if listed is not None and not isinstance(listed, Mapping):
        yield (name, MAP), f"{MAP} must be a map of modules, got {listed!r}"
        return
    if algo == MIXED and not listed:
        yield (name, ALGO), f"{ALGO} is {MIXED}, but there is no {MAP}"
    for module, entry in (listed or {}).items():
        layer = _layer(module)
        if layer is None or layer >= model.layers:
            yield (name, MAP, module), f"'{module}' names none of the layers 0-{model.layers - 1}"
        if not isinstance(entry, Mapping) or entry.get("quant_algo") not in MODELOPT:
            yield (name, MAP, module), f"'{module}': quant_algo must be {known}"


def _layer(module: object) -> int | None:
    match = _LAYER.search(module) if isinstance(module, str) else None
    return int(match[1]) if match else None
