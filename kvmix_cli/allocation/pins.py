"""Pins: layers whose widths are set by hand, `"0,-1:k8v8;2-4:k4v2"`. A negative index counts from the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..errors import PlanError, together
from ..plan.document.geometry import ModelInfo, coverage_faults
from ..plan.document.strict_yaml import reason
from ..plan.layers import LayerPlan

_INDICES = r"\s*-?\d{1,5}(?:-\d{1,5})?\s*"
_PIN = re.compile(rf"(?P<indices>{_INDICES}(?:,{_INDICES})*):\s*k(?P<k>\d{{1,2}})v(?P<v>\d{{1,2}})\s*", re.ASCII)


def parse_pins(texts: Sequence[str], model: ModelInfo) -> dict[int, LayerPlan]:
    """Return the pinned layers of a model, in order.

    Raises:
        PlanError: if a text is malformed, or pins a layer twice or one that cannot be planned.
    """
    pins: dict[int, LayerPlan] = {}
    for part in ";".join(texts).split(";"):
        match = _PIN.fullmatch(part)
        if match is None:
            raise PlanError(f"'{part.strip()}' is no pin: write it like 0,-1:k8v8 or 0-3:k4v2")
        try:
            plan = LayerPlan.of_bits(int(match["k"]), int(match["v"]))
        except ValueError as error:
            raise PlanError(f"'{match[0].strip()}' is no pin: {reason(error)}") from error
        for layer in _layers(match["indices"], model):
            if layer in pins:
                raise PlanError(f"layer {layer} of {model.id} is pinned twice")
            pins[layer] = plan
    if wrong := [message for at, message in coverage_faults(model, pins) if at]:
        raise PlanError(f"--pin does not fit {model.id}: {together(wrong)}")
    return dict(sorted(pins.items()))


def _layers(indices: str, model: ModelInfo) -> Iterator[int]:
    """Yield the layers of `0,-1` or `0-3`, also those that the model does not have."""
    for first, last in re.findall(r"(-?\d+)(?:-(\d+))?", indices):
        low = int(first) + (model.layers if first.startswith("-") else 0)
        if low < 0:
            raise PlanError(
                f"'{first}' is no pin: {model.id} has {model.layers} layers, so -{model.layers} is the first"
            )
        high = int(last) if last else low
        if high < low:
            raise PlanError(f"'{first}-{last}' is no pin: it ends before it begins")
        yield from range(low, high + 1)
