"""The profile: what a probe measured, one or more scores per layer and tensor. See docs/plan-format.md."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import DocumentError
from .files import Faults, flow, head_comment, read_yaml, validate, write_text
from .plan import ModelInfo, coverage

FORMAT: Final = "kvmix-profile/1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Statistic(_Frozen):
    """Mean and standard deviation of a score over the calibration samples."""

    mean: float = Field(allow_inf_nan=False)
    std: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class LayerScore(_Frozen):
    """One score of one layer's keys and values."""

    k: Statistic
    v: Statistic


class Calibration(_Frozen):
    """The text that was profiled.

    Attributes:
        source: as given to `--calibration`.
        sha256: of the token ids of all samples.
        tokens: in all samples together.
    """

    source: str
    sha256: str
    samples: int = Field(ge=1)
    seq_len: int = Field(ge=2)
    seed: int
    tokens: int = Field(ge=2)


class Score(_Frozen):
    """One probe's result, and what it cost."""

    seconds: float = Field(ge=0)
    layers: dict[int, LayerScore]


class Profile(_Frozen):
    """Scores of one model on one calibration set."""

    format: Literal["kvmix-profile/1"] = FORMAT
    model: ModelInfo
    provenance: dict[str, Any] = Field(default_factory=dict)
    calibration: Calibration
    scores: dict[str, Score] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        faults = [
            (("scores", name, "layers", *at), f"score '{name}': {message}")
            for name, score in self.scores.items()
            for at, message in coverage(self.model, score.layers)
        ]
        if faults:
            raise Faults(faults)
        return self

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile file. Raises DocumentError with every fault and its line."""
        document = read_yaml(path)
        document.check_format(FORMAT)
        return validate(document, cls)

    def score(self, name: str) -> Score:
        """A score by name. Raises DocumentError if the profile does not hold it."""
        if name not in self.scores:
            known = ", ".join(self.scores)
            raise DocumentError(f"profile of {self.model.id}", [f"it has no score '{name}', only {known}"])
        return self.scores[name]

    def save(self, path: Path, command: str = "") -> Path:
        """Write the profile file; `command` becomes its head comment. Raises OutputError."""
        return write_text(path, self.to_yaml(command))

    def to_yaml(self, command: str = "") -> str:
        """The profile as it is written to files."""
        data = self.model_dump(exclude_none=True, exclude={"scores"})
        if not self.model.stock:
            data["model"].pop("stock")
        lines = head_comment(command)
        lines += [f"{key}: {flow(value)}" for key, value in data.items()]
        lines.append("scores:")
        for name, score in self.scores.items():
            lines += [f"  {name}:", f"    seconds: {score.seconds:.2f}", "    layers:"]
            lines += [f"      {index}: {flow(_rounded(layer))}" for index, layer in sorted(score.layers.items())]
        return "\n".join(lines) + "\n"

    @property
    def sha256(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def _rounded(layer: LayerScore) -> dict[str, dict[str, float]]:
    """Seven significant digits: a float32 norm has no more."""
    return {
        name: {key: _digits(value) for key, value in statistic.items()}
        for name, statistic in layer.model_dump().items()
    }


def _digits(value: float) -> float:
    return value if value == 0 or not math.isfinite(value) else round(value, 6 - math.floor(math.log10(abs(value))))
