"""The profile: the scores that probes measured, one or more for each layer and tensor. See docs/plan-format.md."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from kvmix_kernels.transform_layout import MAX_PAGE
from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import TypedDict

from .counting import counted
from .errors import DocumentError
from .files import write_text
from .plan import ModelInfo
from .plan.document.fields import MOST_TOKENS
from .plan.document.geometry import coverage_faults
from .plan.document.strict_yaml import Fault, Faults, StrictModel, flow, head_comment, read_yaml, validate
from .plan.settings import MOST_ELEMENTS
from .plan.tensors.codebooks import CodebooksFile
from .plan.tensors.moments import MomentsFile
from .plan.windows import NoWindow

FORMAT: Final = "kvmix-profile/1"
LOSS_UNIT: Final = "nats"


def _in_range(value: float) -> float:
    if abs(value) > MAX_MEASURED:
        raise ValueError(f"must be between {-MAX_MEASURED:g} and {MAX_MEASURED:g}, got {value:g}")
    return value


MAX_MEASURED: Final = 1e100
"""Largest size of a measured number, so that its square, and sums of many, are finite."""
MeasuredFloat = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_in_range)]
Count = Annotated[int, Field(ge=1, lt=2**48)]


class ScoreSetup(TypedDict, total=False):
    """Cache settings that a score's curves were measured with; `window` is in the command line's form.

    Without `encode` it was minmax, and without `frame` it was that of `plan.tensors.moments`.
    """

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]

    page: Annotated[int, Field(ge=1, le=MOST_ELEMENTS)]
    sink: Annotated[int, Field(ge=0, le=MOST_TOKENS)]
    window: str
    scale_dtype: str
    encode: str
    frame: Annotated[int, Field(ge=16, le=MOST_TOKENS)]


class TensorScore(StrictModel):
    """One score of one layer's keys, or values.

    Attributes:
        mean, std: importance over the calibration samples. For a score with a curve, its loss at 2 bits, or at the
            nearest width that was measured.
        curve: loss of storing the tensor at a choice, in the score's unit, by `choice_key(bits, group_size)`; empty
            for a score that does not measure widths.
        heads: importance of each KV head, if it was measured.
    """

    mean: MeasuredFloat
    std: MeasuredFloat = Field(default=0.0, ge=0)
    curve: dict[str, MeasuredFloat] = Field(default_factory=dict)
    heads: list[MeasuredFloat] | None = None

    @field_validator("curve")
    @classmethod
    def _known(cls, curve: dict[str, float]) -> dict[str, float]:
        for key in curve:
            parse_choice(key)
        return curve


class LayerScore(StrictModel):
    """One score of one layer's keys and values.

    Attributes:
        k, v: score of keys, and of values.
        evict: loss of evicting a share of the layer's tokens, in the score's unit, by share; empty if not measured.
    """

    k: TensorScore
    v: TensorScore
    evict: dict[Annotated[float, Field(gt=0, lt=1)], MeasuredFloat] = Field(default_factory=dict)


class LayerOutliers(StrictModel):
    """Largest over median sizes of one layer's keys and values, in the head where that is most.

    Attributes:
        key_channel: of the root mean squares of key channels.
        key_token, value_token: of the norms of keys and values of tokens, without the first ones.
    """

    key_channel: MeasuredFloat = Field(ge=0)
    key_token: MeasuredFloat = Field(ge=0)
    value_token: MeasuredFloat = Field(ge=0)


class LongerSamples(StrictModel):
    """Samples of a calibration that are longer than the others, for moments of long contexts.

    Attributes:
        samples: number of them.
        seq_len: tokens of the longest.
    """

    samples: Count
    seq_len: Count = Field(ge=2)

    def __str__(self) -> str:
        return f"{self.samples}x{self.seq_len}"


class Calibration(StrictModel):
    """The text that was profiled.

    Attributes:
        source: text as given to `--calibration`.
        sha256: checksum of the token ids of all samples.
        samples: number of samples, without the longer ones.
        seq_len: tokens of the longest of them.
        longer: longer samples besides; None if there are none.
        tokens: tokens of all samples together.
    """

    source: str
    sha256: str
    samples: Count
    seq_len: Count = Field(ge=2)
    longer: LongerSamples | None = None
    seed: int
    tokens: Count = Field(ge=2)

    @property
    def amount(self) -> str:
        """Return how much text it is: `20 samples of 1024 tokens and 3 of 4096`."""
        further = f" and {self.longer.samples} of {self.longer.seq_len}" if self.longer else ""
        return f"{counted(self.samples, 'sample')} of {self.seq_len} tokens{further}"


class CodedLoss(StrictModel):
    """Loss of one plan of transform codes: what moments promise of it, and what reading text through the cache loses.

    Attributes:
        bits: nominal bits of the plan.
        exact: tokens of each page and KV head that it keeps exact.
        context: tokens of the documents that were read; None in older files, for those of the calibration.
        predicted: by the moments alone, nats a predicted token.
        measured: divergence from the unquantized cache, nats a predicted token.
    """

    bits: MeasuredFloat = Field(gt=0)
    exact: int = Field(ge=0, lt=MAX_PAGE)
    context: Count | None = None
    predicted: MeasuredFloat = Field(gt=0)
    measured: MeasuredFloat = Field(gt=0)


class Score(StrictModel):
    """One probe's result.

    Attributes:
        seconds: time that the probe took.
        unit: unit of the numbers. `"nats"` is a predicted increase of the mean loss per token, a sum over tensors.
        calibration: text that the score was measured on.
        setup: cache settings that a curve was measured with, e.g. `{page: 128, scale_dtype: float16}`.
        moments: the file of moments of keys and values, for a score that measures them.
        codebooks: the file of learned codebooks, for a score that learns them.
        coded: losses of plans made from these moments, of different contexts, and in each of different numbers of
            exact tokens, both ascending; empty if none was measured.
        identity: hash of the settings that another score of this name must have to replace it; "" in older files.
    """

    seconds: MeasuredFloat = Field(ge=0)
    unit: str = "gradient norm"
    calibration: Calibration
    setup: ScoreSetup = Field(default_factory=ScoreSetup)
    moments: MomentsFile | None = None
    codebooks: CodebooksFile | None = None
    coded: list[CodedLoss] = Field(default_factory=list)
    identity: str = Field(default="", pattern=r"^[0-9a-f]{0,64}$")
    layers: dict[int, LayerScore]

    @field_validator("coded")
    @classmethod
    def _ascending(cls, coded: list[CodedLoss]) -> list[CodedLoss]:
        found = [(each.context or 0, each.exact) for each in coded]
        if found != sorted(set(found)):
            counts = [exact for _, exact in found]
            raise ValueError(f"must have different numbers of exact tokens in a context, ascending, got {counts}")
        return coded

    @property
    def coded_contexts(self) -> dict[int, list[CodedLoss]]:
        """Return the losses of `coded` by the tokens of their documents, ascending."""
        found: dict[int, list[CodedLoss]] = {}
        for each in self.coded:
            found.setdefault(each.context or self.calibration.seq_len, []).append(each)
        return found

    @property
    def predicts_loss(self) -> bool:
        """Return whether the curve is a predicted loss."""
        return self.unit == LOSS_UNIT

    @property
    def is_for_engines(self) -> bool:
        """Return whether its moments count every pair of a query and a token, as an engine codes all tokens at once."""
        return self.moments is not None and self.setup.get("window") == NoWindow().short

    @property
    def choices(self) -> tuple[list[str], list[str]]:
        """Return the choices in the curves of keys and of values, of all layers together; empty without curves."""
        k, v = (
            list(dict.fromkeys(choice for layer in self.layers.values() for choice in getattr(layer, kind).curve))
            for kind in ("k", "v")
        )
        return k, v

    def faults(self, model: ModelInfo) -> Iterator[Fault]:
        """Yield a fault for layers that are missing, and for curves that differ in their choices between equal heads.

        A group ends with its row, so layers whose heads have other sizes may have other choices.
        """
        yield from ((("layers", *at), message) for at, message in coverage_faults(model, self.layers))
        for alike in model.geometries.values():
            for kind in ("k", "v"):
                layers = [self.layers[layer] for layer in alike if layer in self.layers]
                if len({frozenset(getattr(layer, kind).curve) for layer in layers}) > 1:
                    yield (), f"the curves of {kind} must have the same choices in all layers"


class Profile(StrictModel):
    """Scores of one model.

    Attributes:
        provenance: how the scores were measured: the version of kvmix and the model's dtype; a file may have anything.
        scores: scores by name.
        outliers: how far channels and tokens stand out, by layer; None in profiles of earlier versions.
    """

    format: Literal["kvmix-profile/1"] = FORMAT
    model: ModelInfo
    provenance: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Score] = Field(min_length=1)
    outliers: dict[int, LayerOutliers] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        faults = [
            (("scores", name, *at), f"score '{name}': {message}")
            for name, score in self.scores.items()
            for at, message in score.faults(self.model)
        ]
        if faults:
            raise Faults(faults)
        return self

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Read a profile file. Raises DocumentError with every fault and its line."""
        document = read_yaml(Path(path))
        document.check_format(FORMAT)
        return validate(document, cls)

    def score(self, name: str) -> Score:
        """Return a score by name. Raises DocumentError if the profile does not have it."""
        if name not in self.scores:
            known = ", ".join(self.scores)
            raise DocumentError(f"profile of {self.model.id}", [f"it has no score '{name}', only {known}"])
        return self.scores[name]

    def save(self, path: Path | str, command: str = "") -> Path:
        """Write the profile file; `command` becomes its head comment. Raises OutputError."""
        return write_text(Path(path), self.to_yaml(command))

    def to_yaml(self, command: str = "") -> str:
        """Return the profile as it is written to files."""
        data = self.model_dump(exclude_none=True, exclude={"scores", "outliers"})
        if not self.model.stock:
            data["model"].pop("stock")
        lines = head_comment(command)
        lines += [f"{key}: {flow(value)}" for key, value in data.items()]
        if self.outliers is not None:
            lines.append("outliers:")
            lines += [
                f"  {index}: {flow(_digits(each.model_dump(), 3))}" for index, each in sorted(self.outliers.items())
            ]
        lines.append("scores:")
        for name, score in self.scores.items():
            lines += [f"  {name}:", f"    seconds: {score.seconds:.2f}", f"    unit: {flow(score.unit)}"]
            lines.append(f"    calibration: {flow(score.calibration.model_dump(exclude_none=True))}")
            lines += [f"    setup: {flow(score.setup)}"] if score.setup else []
            lines += [f"    moments: {flow(score.moments.model_dump())}"] if score.moments else []
            lines += [f"    codebooks: {flow(score.codebooks.model_dump())}"] if score.codebooks else []
            lines += ["    coded:"] if score.coded else []
            lines += [f"      - {flow(_digits(each.model_dump(exclude_none=True)))}" for each in score.coded]
            lines += [f"    identity: {flow(score.identity)}"] if score.identity else []
            lines.append("    layers:")
            lines += [f"      {index}: {flow(_rounded(layer))}" for index, layer in sorted(score.layers.items())]
        return "\n".join(lines) + "\n"

    @property
    def sha256(self) -> str:
        """Return the checksum of the file's content, without its head comment."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def choice_key(bits: int, group_size: int | str) -> str:
    """Return the name of a choice in a curve, a width in groups of a size: `"2g64"`, `"3grow"`."""
    return f"{bits}g{group_size}"


def parse_choice(key: str) -> tuple[int, int | Literal["row"]]:
    """Return the bits and group size of a `choice_key`. Raises ValueError for another text."""
    match = re.fullmatch(r"(1|2|3|4|8|16)g(row|\d{1,6})", key, re.ASCII)
    if match is None:
        raise ValueError(f"'{key}' must be a width and a group size such as 2g64")
    return int(match[1]), "row" if match[2] == "row" else int(match[2])


def _rounded(layer: LayerScore) -> dict[str, Any]:
    """Return a layer's numbers with seven significant digits; a float32 norm has no more."""
    data = layer.model_dump(exclude_none=True)
    evict = data.pop("evict")
    return {
        name: {key: _digits(value) for key, value in tensor.items() if value or key in ("mean", "std")}
        for name, tensor in data.items()
    } | ({"evict": _digits(evict)} if evict else {})


def _digits(value: Any, count: int = 7) -> Any:
    if isinstance(value, dict):
        return {key: _digits(each, count) for key, each in value.items()}
    if isinstance(value, list):
        return [_digits(each, count) for each in value]
    is_plain = value == 0 or not math.isfinite(value)
    return value if is_plain else round(value, count - 1 - math.floor(math.log10(abs(value))))
