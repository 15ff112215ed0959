"""KVTuner's preset YAML: the widths of each layer, `0: {nbits_key: 8, nbits_value: 4}`."""

from __future__ import annotations

from typing import Any, TypeGuard

from ..document.fields import WIDTHS
from ..document.geometry import ModelInfo, coverage_faults
from ..document.strict_yaml import Document

_KEYS = {"nbits_key", "nbits_value"}


def is_kvtuner(document: Document) -> bool:
    """Return whether a document has the form of KVTuner's presets."""
    return _has_form(document.data)


def kvtuner_widths(document: Document, model: ModelInfo) -> dict[int, tuple[int, int]]:
    """Return the widths of keys and values by layer; without layers that have a stock cache.

    Raises:
        DocumentError: with every fault.
    """
    data = document.data
    if not _has_form(data):
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
    return {index: (pair["nbits_key"], pair["nbits_value"]) for index, pair in sorted(pairs.items())}


def _has_form(data: object) -> TypeGuard[dict[int | str, dict[str, Any]]]:
    if not isinstance(data, dict) or not data:
        return False
    pairs = all(isinstance(pair, dict) and set(pair) == _KEYS for pair in data.values())
    return pairs and all(str(index).isdecimal() for index in data)
