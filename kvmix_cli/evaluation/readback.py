"""Run folders read back: the row of each, or how far it has come. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..counting import counted
from ..errors import DocumentError, EvaluationError, KvmixError
from ..journal import canonical, read_records, refuse_constant
from ..plan import CacheSettings, ModelInfo, Plan
from ..plan.codec import CODED
from ..plan.document.strict_yaml import read_yaml, reason, validate
from ..plan.layers import parse_mean_widths
from .identity import FORMAT, plan_of
from .records import SampleRecord, record_form
from .results import Estimate, Metric, Row
from .run_folder import CONFIG, METRICS, SAMPLES


class LineKey(NamedTuple):
    """The identity of a line: two plans of one name are two lines.

    Attributes:
        sha256: that of the plan, or of a baseline's settings; None for the unquantized cache.
    """

    name: str
    sha256: str | None


@dataclass(frozen=True, eq=False)
class Measured:
    """A run that is complete, or that has failed (its row then has an error).

    Attributes:
        command: the command line that started it; empty if it is not known.
        config: everything that its numbers depend on, as it was written.
        metrics: metrics that its row may have, in their order.
        finished: None if it is not known.
        machine: names and versions, as it was written.
    """

    folder: Path
    command: str
    config: Mapping[str, Any]
    model: ModelInfo
    key: LineKey
    layers: Mapping[int, tuple[float, float]] | None
    row: Row
    metrics: tuple[Metric, ...]
    tokens: int
    description: str
    finished: datetime | None
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Unfinished:
    """A run that was interrupted, or that is still going on."""

    folder: Path
    command: str
    model: str
    task: str
    plan: str
    done: int
    samples: int


def read_run(folder: Path) -> Measured | Unfinished:
    """Read one run folder. Raises DocumentError if its files are damaged or do not belong together."""
    config, data = _read_config(folder / CONFIG)
    records = _read_records(folder / SAMPLES)
    command = _command(folder / CONFIG)
    path = folder / METRICS
    if not path.exists():
        samples = config.samples.count
        return Unfinished(folder, command, config.model.id, config.task, plan_of(folder, data), len(records), samples)
    row = _read_row(path)
    if row.error is None and len(records) != config.samples.count:
        raise DocumentError(
            str(path), [f"sums up {counted(config.samples.count, 'sample')}, and has {counted(len(records), 'record')}"]
        )
    if row.task != config.task:
        raise DocumentError(str(path), [f"has the row of task {row.task}, but {CONFIG} that of {config.task}"])
    return Measured(
        folder=folder,
        command=command,
        config=data,
        model=config.model,
        key=LineKey(row.plan, config.subject),
        layers=_layers(folder / CONFIG, config),
        row=row.as_row(tuple(records)),
        metrics=tuple(row.metric_info.values()),
        tokens=row.tokens,
        description=row.description,
        finished=row.finished,
        machine=row.machine,
    )


class _Samples(BaseModel):
    count: int
    sha256: str


class _PlanConfig(BaseModel):
    short: str
    sha256: str


class _Config(BaseModel):
    """The part of `config.yaml` that is read."""

    format: Literal["kvmix-run/1"]
    kvmix: str
    task: str
    model: ModelInfo
    dtype: str
    device: str
    attention: str
    settings: dict[str, Any]
    samples: _Samples
    plan: _PlanConfig | None
    baseline: dict[str, Any] | None = None

    @property
    def subject(self) -> str | None:
        """Return the hash of a plan, or of a baseline's settings; None for the unquantized cache."""
        if self.plan is not None:
            return self.plan.sha256
        return None if self.baseline is None else hashlib.sha256(canonical(self.baseline).encode()).hexdigest()

    @field_validator("model", mode="before")
    @classmethod
    def _indices(cls, model: Any) -> Any:
        """Turn layers, which are text as keys of plain data, into numbers."""
        if not isinstance(model, dict):
            return model
        by_layer = {name: each for name in ("stock", "other_heads") if isinstance(each := model.get(name), dict)}
        return model | {
            name: {int(layer) if str(layer).isdecimal() else layer: value for layer, value in each.items()}
            for name, each in by_layer.items()
        }


class _RowFile(BaseModel):
    """The part of `metrics.json` that is read."""

    model_config = ConfigDict(allow_inf_nan=False)

    task: str
    plan: str
    nominal_bits: float = Field(ge=0)
    stored_bits: float | None = Field(ge=0)
    quantized_share: float = Field(ge=0, le=1)
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    error: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    tokens: int
    description: str
    metric_info: dict[str, Metric]
    finished: datetime | None = None
    machine: dict[str, str | int] = Field(default_factory=dict)

    def as_row(self, records: tuple[SampleRecord, ...]) -> Row:
        return Row(
            task=self.task,
            plan=self.plan,
            nominal_bits=self.nominal_bits,
            stored_bits=self.stored_bits,
            quantized_share=self.quantized_share,
            metrics={name: self.metrics[name] for name in self.metric_info if name in self.metrics},
            error=self.error,
            warnings=self.warnings,
            records=records,
            seconds=self.seconds,
        )


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the run folders in some places, each once, in order of their names. Raises EvaluationError."""
    found: dict[Path, Path] = {}
    for place in places:
        try:
            inside = sorted(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise EvaluationError(f"cannot look into {place}: {error.strerror}") from error
        if not place.exists():
            raise EvaluationError(f"{place} does not exist; `kvmix eval` leaves runs in --output-dir")
        for folder in (place, *inside):
            if any((folder / name).is_file() for name in (CONFIG, SAMPLES, METRICS)):
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _read_config(path: Path) -> tuple[_Config, dict[str, Any]]:
    document = read_yaml(path)
    document.check_format(FORMAT)
    return validate(document, _Config), document.data


def _read_records(path: Path) -> list[SampleRecord]:
    """Return the whole records; a last line without its end is being written, or was when the process was killed.

    They need only what all records have: a damaged field of one task costs a plot, and not the row.
    """
    records = read_records(path, None, record_form()) if path.exists() else []
    for record in records:
        record.pop("seconds", None)
    return records


def _read_row(path: Path) -> _RowFile:
    try:
        row = _RowFile.model_validate(json.loads(path.read_bytes(), parse_constant=refuse_constant))
    except OSError as error:
        raise DocumentError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:
        why = reason(error) if isinstance(error, ValueError) else "it is nested too deep"
        command = _command(path.with_name(CONFIG)).removesuffix(" --resume") or "kvmix eval ..."
        raise DocumentError(str(path), [f"damaged ({why}); `{command} --resume` writes it anew"]) from error
    return row


def _command(path: Path) -> str:
    """Return the first line of a config's head comment."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.removeprefix("# ").strip() if line.startswith("# ") else ""


def _layers(path: Path, config: _Config) -> dict[int, tuple[float, float]] | None:
    if config.plan is None:
        return None
    try:
        if CODED not in config.plan.short:  # checked as a plan, with the widths that there are
            Plan.from_short(config.plan.short, config.model, CacheSettings(group_size="row"))
        widths = parse_mean_widths(config.plan.short)
    except (KvmixError, ValueError) as error:
        raise DocumentError(str(path), [f"plan: {error}"]) from error
    return {index: pair for index, pair in widths.items() if index not in config.model.stock}
