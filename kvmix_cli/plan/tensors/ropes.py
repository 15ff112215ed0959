"""Rotary positions of a model's layers, as files of tensors keep them beside their other tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from .moments import Rope, RopeLayout


class RopeRecord(TypedDict):
    """The channels of a layer that RoPE turns, in the header of a file; `Rope` without its frequencies."""

    layout: RopeLayout
    start: int


def rope_records(ropes: Mapping[int, Rope]) -> dict[str, RopeRecord]:
    """Return what a file's header says of the turns of its layers."""
    return {f"{index}": RopeRecord(layout=each.layout, start=each.start) for index, each in sorted(ropes.items())}


def rope_arrays(ropes: Mapping[int, Rope]) -> dict[str, NDArray[np.float64]]:
    """Return the frequencies of layers by the names of their tensors."""
    return {_name(index): each.frequencies for index, each in sorted(ropes.items())}


def read_ropes(arrays: Mapping[str, NDArray[Any]], records: Mapping[str, RopeRecord]) -> dict[int, Rope]:
    """Return the turns that a file's tensors and header state. Raises ValueError, KeyError or TypeError."""
    ropes = {int(index): Rope(arrays[_name(int(index))].astype(np.float64), **each) for index, each in records.items()}
    for index, each in ropes.items():
        if each.layout not in get_args(RopeLayout):
            raise ValueError(f"RoPE of layer {index} turns {each.layout!r} channels")
    return ropes


def _name(index: int) -> str:
    return f"layers.{index}.rope.frequencies"
