"""Run folders read back, and grouped by what can be compared. Imports no torch.

group         one model, loaded in one way by one version of kvmix
measurement   one task with one set of settings: the numbers of a measurement can be compared
line          one plan, baseline or the unquantized cache: a row of the group's table
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.subject import UNQUANTIZED
from ..errors import EvaluationError, KvmixError
from ..journal import canonical
from ..plan import ModelInfo
from . import tasks
from .readback import LineKey, Measured, Unfinished, read_run, run_folders
from .results import Estimate, Metric, Row

__all__ = ["Collection", "Group", "Line", "LineKey", "Measured", "Measurement", "Unfinished", "collect"]

GROUP = ("model", "dtype", "device", "attention", "kvmix")
"""Keys of a run's config that make its group."""
SUBJECT = ("plan", "baseline")
"""Keys that make its line; all others make its measurement."""
MACHINE = "machine"
"""Key in the config of a task that takes times."""
SHORT_HASH = 6


@dataclass(frozen=True, eq=False)
class Line:
    """A row of a group's table.

    Attributes:
        label: its name; with a part of its hash if another plan has the same name.
        layers: bits of keys and values by layer; None if it is no plan.
        widths: the same in the short form of plans.
    """

    key: LineKey
    label: str
    nominal_bits: float
    stored_bits: float | None
    layers: Mapping[int, tuple[float, float]] | None
    widths: str | None

    @property
    def is_reference(self) -> bool:
        """Return whether this is the unquantized cache."""
        return self.key == (UNQUANTIZED, None)


@dataclass(frozen=True, eq=False)
class Measurement:
    """One task with one set of settings.

    Attributes:
        told: the settings in which it differs from other measurements of the same task; empty if there are none.
        timed: its numbers are times, of one machine.
    """

    task: str
    told: str
    timed: bool
    metrics: tuple[Metric, ...]
    runs: Mapping[LineKey, Measured]

    @property
    def title(self) -> str:
        """Return `recall`, or `recall (length 2048)`."""
        return f"{self.task} ({self.told})" if self.told else self.task

    @property
    def description(self) -> str:
        """Return the description of the newest run."""
        return _newest(self.runs.values()).description

    def row(self, line: Line) -> Row | None:
        """Return a line's row, None if it was not measured."""
        return self.runs[line.key].row if line.key in self.runs else None

    def estimate(self, line: Line, metric: str) -> Estimate | None:
        """Return a line's number, None if it has none."""
        row = self.row(line)
        return None if row is None else row.metrics.get(metric)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one model, loaded in one way.

    Attributes:
        told: the settings in which it differs from other groups of the same model; empty if there are none.
        lines: the unquantized cache first, then by stored bits.
    """

    model: ModelInfo
    told: str
    config: Mapping[str, Any]
    lines: tuple[Line, ...]
    measurements: tuple[Measurement, ...]

    @property
    def title(self) -> str:
        """Return `org/model`, or `org/model (bfloat16)`."""
        return f"{self.model.id} ({self.told})" if self.told else self.model.id

    @property
    def runs(self) -> list[Measured]:
        """Return all runs."""
        return [run for measurement in self.measurements for run in measurement.runs.values()]


@dataclass(frozen=True)
class Collection:
    """All runs that were found.

    Attributes:
        faults: folders that could not be read, each with the reason.
        notes: other remarks for the reader.
    """

    groups: tuple[Group, ...]
    unfinished: tuple[Unfinished, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def collect(places: Sequence[Path]) -> Collection:
    """Read all runs in some folders; each is a run folder, or holds run folders.

    Raises:
        EvaluationError: if a place does not exist, or there is no run at all.
    """
    measured: list[Measured] = []
    unfinished: list[Unfinished] = []
    faults: list[str] = []
    for folder in run_folders(places):
        try:
            run = read_run(folder)
        except KvmixError as error:
            faults.append(str(error))
            continue
        measured += [run] if isinstance(run, Measured) else []
        unfinished += [run] if isinstance(run, Unfinished) else []
    if not measured and not unfinished:
        where = ", ".join(map(str, places))
        raise EvaluationError(faults[0] if faults else f"no runs in {where}; `kvmix eval` leaves some in --output-dir")
    notes: list[str] = []
    groups = _groups(measured, notes)
    return Collection(tuple(groups), tuple(unfinished), tuple(faults), tuple(notes))


def _groups(measured: Sequence[Measured], notes: list[str]) -> list[Group]:
    """Return groups in order of their models' names, and add remarks about them to the notes."""
    alike: defaultdict[str, list[Measured]] = defaultdict(list)
    for run in measured:
        alike[canonical(_group_config(run))].append(run)
    members = sorted(alike.values(), key=lambda runs: (runs[0].model.id, canonical(_group_config(runs[0]))))
    configs = [_group_config(runs[0]) for runs in members]
    return [
        Group(
            model=runs[0].model,
            told=_told(config, [other for other in configs if other["model"].get("id") == runs[0].model.id]),
            config=config,
            lines=_lines(runs),
            measurements=tuple(_measurements(runs, notes)),
        )
        for config, runs in zip(configs, members, strict=True)
    ]


def _measurements(runs: Sequence[Measured], notes: list[str]) -> list[Measurement]:
    alike: defaultdict[str, list[Measured]] = defaultdict(list)
    for run in runs:
        alike[canonical(_own_config(run))].append(run)
    members = sorted(alike.values(), key=lambda runs: (*_task_order(runs[0].row.task), _sort_key(_own_config(runs[0]))))
    configs = [_own_config(runs[0]) for runs in members]
    found = []
    for config, same in zip(configs, members, strict=True):
        told = _told(config, [other for other in configs if other["task"] == config["task"]])
        metrics = {metric.name: metric for run in same for metric in run.metrics}
        lines = _one_a_line(same, notes)
        found.append(Measurement(config["task"], told, MACHINE in config, tuple(metrics.values()), lines))
    return found


def _one_a_line(runs: Sequence[Measured], notes: list[str]) -> dict[LineKey, Measured]:
    """Return the newest run of every line; one with a number goes before one that failed."""
    lines: defaultdict[LineKey, list[Measured]] = defaultdict(list)
    for run in runs:
        lines[run.key].append(run)
    for same in lines.values():
        chosen = _newest(same)
        for other in same:
            if other.row.error is None and other.row.metrics != chosen.row.metrics:
                notes.append(f"{other.folder} has other numbers of the same work as {chosen.folder}, which is shown")
    return {key: _newest(same) for key, same in lines.items()}


def _newest(runs: Iterable[Measured]) -> Measured:
    return max(runs, key=lambda run: (run.row.error is None, run.finished.timestamp() if run.finished else 0.0))


def _lines(runs: Sequence[Measured]) -> tuple[Line, ...]:
    first: dict[LineKey, Measured] = {}
    for run in runs:
        first.setdefault(run.key, run)
    names = [key.name for key in first]
    lines = [
        Line(
            key=key,
            label=key.name if names.count(key.name) == 1 else f"{key.name} ({(key.sha256 or 'none')[:SHORT_HASH]})",
            nominal_bits=run.row.nominal_bits,
            stored_bits=run.row.stored_bits,
            layers=run.layers,
            widths=run.config["plan"] and run.config["plan"]["short"],
        )
        for key, run in first.items()
    ]
    return tuple(sorted(lines, key=lambda line: (not line.is_reference, line.stored_bits or float("inf"), line.label)))


def _group_config(run: Measured) -> dict[str, Any]:
    return {name: run.config[name] for name in GROUP}


def _own_config(run: Measured) -> dict[str, Any]:
    """Return the settings that make the measurement; an empty value is the same as none."""
    kept = {name: value for name, value in run.config.items() if name not in ("format", *GROUP, *SUBJECT)}
    return {name: value for name, value in kept.items() if value not in ({}, None)}


def _task_order(task: str) -> tuple[int, str]:
    """Sort our own tasks in the order of the registry, then others by name."""
    family = task.partition(":")[0]
    known = tasks()
    return (known.index(family) if family in known else len(known)), task


def _told(config: Mapping[str, Any], all_of_them: Sequence[Mapping[str, Any]]) -> str:
    """Return the settings that other configs lack, in words; samples are named only if nothing else differs."""
    flat = [dict(_flat(each)) for each in all_of_them]
    own = dict(_flat(config))
    names = [name for name in own if any(other.get(name) != own[name] for other in flat)]
    if not names and len(flat) > 1:
        return "without " + ", ".join(sorted({name.split(".")[-1] for each in flat for name in each} - set(own)))
    telling = [name for name in names if not name.startswith("samples.")] or names
    return ", ".join(_in_words(name, own[name]) for name in telling)


def _flat(config: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{head}{name}.")
        else:
            yield f"{head}{name}", value


def _in_words(name: str, value: Any) -> str:
    """Return `settings.length` and 2048 as `length 2048`."""
    last = name.split(".")[-1]
    if last == "sha256":
        return f"samples {str(value)[:SHORT_HASH]}"
    if name in ("dtype", "device"):
        return str(value)
    listed = ", ".join(map(str, value)) if isinstance(value, list) else value
    return f"{last.replace('_', ' ')} {'default' if value is None else listed}"


def _sort_key(config: Mapping[str, Any]) -> list[str]:
    """Sort numbers by value, not by their digits."""
    return [f"{value:020}" if isinstance(value, int) else str(value) for _, value in sorted(_flat(config))]
