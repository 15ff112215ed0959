"""Measured plans on disk: JSON lines, one of settings and then one for every plan, by what it decides.

Measuring a plan takes minutes, so an interrupted search is replayed from here, and a longer one goes on from here.
Losses that were measured under other settings cannot be compared with new ones, so the settings must be equal. A last
line that was cut off while it was written is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DocumentError
from ..files import append_line, write_text
from ..plan import LayerPlan, TensorPlan
from .problem import Measure

FORMAT = "kvmix-trials/1"


class Trials:
    """The losses of all plans that were measured under the same settings.

    Raises:
        DocumentError: if those that are there are damaged or have other settings.
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        header = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._path = path
        self._losses = _read(path, header) if resume and path.exists() else {}
        records = [header, *(_record(key, loss) for key, loss in self._losses.items())]
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))

    def remembered(self, measure: Measure) -> Measure:
        """The same, but a plan that is known is not measured again, and one that is not is written down."""

        def recall(layers: Mapping[int, LayerPlan]) -> float:
            key = short_key(layers)
            if key not in self._losses:
                self._append(key, measure(layers))
            return self._losses[key]

        return recall

    def _append(self, key: str, loss: float) -> None:
        self._losses[key] = loss
        append_line(self._path, json.dumps(_record(key, loss)), "make room, then go on with --resume")


def short_key(layers: Mapping[int, LayerPlan]) -> str:
    """All that a plan decides, in one word: `0:k3v4,1:k2g128v2`."""
    return ",".join(f"{layer}:k{_tensor(plan.k)}v{_tensor(plan.v)}" for layer, plan in sorted(layers.items()))


def _tensor(tensor: TensorPlan) -> str:
    return f"{tensor.bits}" if tensor.group_size is None else f"{tensor.bits}g{tensor.group_size}"


def _record(key: str, loss: float) -> dict[str, Any]:
    return {"plan": key, "loss": loss}


def _read(path: Path, header: Mapping[str, Any]) -> dict[str, float]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line end was cut off
        found, *records = [json.loads(line) for line in lines]
        losses = {str(record["plan"]): float(record["loss"]) for record in records}
        changed = [name for name in {**header, **found} if found.get(name) != header.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, "it is damaged") from error
    if changed:
        raise _unusable(path, f"another {', '.join(changed)}")
    return losses


def _unusable(path: Path, why: str) -> DocumentError:
    return DocumentError(str(path), [f"the search cannot go on from it: {why}; drop --resume to start anew"])
