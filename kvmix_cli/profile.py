"""The profile: what a probe measured, one or more scores per layer and tensor. See docs/plan-format.md."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import DocumentError
from .files import write_text
from .plan import ModelInfo
from .plan.document import Faults, flow, head_comment, read_yaml, validate
from .plan.geometry import coverage_faults

FORMAT: Final = "kvmix-profile/1"
LOSS_UNIT: Final = "nats"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorScore(_Frozen):
    """One score of one layer's keys, or values.

    Attributes:
        mean, std: importance over the calibration samples. Of a score with a curve: its cost at 2 bits, or as near as
            was measured.
        curve: what storing the tensor at a choice costs, in the score's unit, by `choice_key(bits, group_size)`; empty
            for a score that does not look at widths.
        heads: importance of every KV head, if it was asked for.
    """

    mean: float = Field(allow_inf_nan=False)
    std: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    curve: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    heads: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None

    @field_validator("curve")
    @classmethod
    def _known(cls, curve: dict[str, float]) -> dict[str, float]:
        for key in curve:
            parse_choice(key)
        return curve


class LayerScore(_Frozen):
    """One score of one layer's keys and values."""

    k: TensorScore
    v: TensorScore


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
    """One probe's result, and what it cost.

    Attributes:
        seconds: that the probe took.
        unit: of the numbers. `"nats"` are a predicted increase of the mean loss a token, which adds up over tensors.
        calibration: the text that it was measured on.
        setup: what a curve was measured with, e.g. `{page: 128, scale_dtype: float16}`.
    """

    seconds: float = Field(ge=0)
    unit: str = "gradient norm"
    calibration: Calibration
    setup: dict[str, Any] = Field(default_factory=dict)
    layers: dict[int, LayerScore]

    @property
    def predicts_loss(self) -> bool:
        """Whether the curve is a predicted loss."""
        return self.unit == LOSS_UNIT

    @property
    def choices(self) -> tuple[list[str], list[str]]:
        """Keys of the curves of keys and of values, the same in all layers; empty if there are none."""
        first = next(iter(self.layers.values()), None)
        return ([], []) if first is None else (list(first.k.curve), list(first.v.curve))

    @model_validator(mode="after")
    def _alike(self) -> Score:
        for kind in ("k", "v"):
            if len({frozenset(getattr(layer, kind).curve) for layer in self.layers.values()}) > 1:
                raise ValueError(f"the curves of {kind} have other choices in some layers than in others")
        return self


class Profile(_Frozen):
    """Scores of one model."""

    format: Literal["kvmix-profile/1"] = FORMAT
    model: ModelInfo
    provenance: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Score] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        faults = [
            (("scores", name, "layers", *at), f"score '{name}': {message}")
            for name, score in self.scores.items()
            for at, message in coverage_faults(self.model, score.layers)
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
            lines += [f"  {name}:", f"    seconds: {score.seconds:.2f}", f"    unit: {flow(score.unit)}"]
            lines.append(f"    calibration: {flow(score.calibration.model_dump())}")
            lines += [f"    setup: {flow(score.setup)}"] if score.setup else []
            lines.append("    layers:")
            lines += [f"      {index}: {flow(_rounded(layer))}" for index, layer in sorted(score.layers.items())]
        return "\n".join(lines) + "\n"

    @property
    def sha256(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def choice_key(bits: int, group_size: int | str) -> str:
    """How a curve names a width in groups of a size: `"2g64"`, `"3grow"`."""
    return f"{bits}g{group_size}"


def parse_choice(key: str) -> tuple[int, int | Literal["row"]]:
    """Bits and group size of a `choice_key`. Raises ValueError."""
    match = re.fullmatch(r"(1|2|3|4|8|16)g(row|\d{1,6})", key, re.ASCII)
    if match is None:
        raise ValueError(f"'{key}' is no width and group size such as 2g64")
    return int(match[1]), "row" if match[2] == "row" else int(match[2])


def _rounded(layer: LayerScore) -> dict[str, Any]:
    """Seven significant digits: a float32 norm has no more."""
    return {
        name: {key: _digits(value) for key, value in tensor.items() if value or key in ("mean", "std")}
        for name, tensor in layer.model_dump(exclude_none=True).items()
    }


def _digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _digits(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_digits(each) for each in value]
    return value if value == 0 or not math.isfinite(value) else round(value, 6 - math.floor(math.log10(abs(value))))
