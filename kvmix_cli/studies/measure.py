"""Plans measured against the unquantized cache on the same work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import NotRequired, TypedDict

from .. import state
from ..state import Say, unsaid
from .baselines import baseline_subjects, check_baselines
from .selection import Choice, check_widths, choose

if TYPE_CHECKING:
    from ..cache.subject import Subject
    from ..evaluation.base import Settings, Task
    from ..evaluation.gates import Gate, GateOutcome
    from ..evaluation.results import Report, Row
    from ..evaluation.runner import Progress
    from ..models.loading import LoadedModel
    from ..plan import ModelInfo, Plan
    from ..plan.settings import Encode

DEFAULT_TASKS = "perplexity"


class Loading(TypedDict):
    """Options of `load_model`."""

    revision: str | None
    dtype: str
    device: str
    trust_remote_code: bool
    allow_pickle: NotRequired[bool]
    tensor_parallel: NotRequired[bool]


class Results(TypedDict):
    """Options of `RunFolders`: where records go, whether to resume or to share them, and the command that made them."""

    root: Path
    resume: bool
    command: str
    may_begin: NotRequired[bool]
    is_shared: NotRequired[bool]


class Setup(NamedTuple):
    """The work that is measured, and with what.

    Attributes:
        model: None for the model of the plans or of the profile.
        tasks: their names, as one text; None for the default.
    """

    model: str | None
    tasks: str | None
    settings: Settings
    loading: Loading
    results: Results


@dataclass(frozen=True)
class SubjectNames:
    """The subjects to measure, by name: plans, presets, the same width everywhere, and other libraries' caches.

    `encode` is the encoder of plans with the same width everywhere.
    """

    plans: Sequence[str] = ()
    presets: Sequence[str] = ()
    uniform: Sequence[int] = ()
    baselines: Sequence[str] = ()
    encode: Encode | None = None

    def choose(self, model: str | None, revision: str | None, say: Say = unsaid) -> Choice:
        """Find the plans, or the newest if nothing is named, and their model; needs no torch. Raises KvmixError."""
        check_widths(self.uniform)
        need_plan = not (self.presets or self.uniform or self.baselines)
        return choose(self.plans, self.presets, model=model, revision=revision, need_plan=need_plan, say=say)


@dataclass(frozen=True)
class Evaluation:
    """All results of one `kvmix eval`: a report for each task, and a verdict for each gate of each of them."""

    model: ModelInfo
    reports: tuple[Report, ...]
    verdicts: tuple[GateOutcome, ...]

    @property
    def passed(self) -> bool:
        """Return whether every gate has passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def complete(self) -> bool:
        """Return whether every subject could be measured."""
        return all(row.error is None for report in self.reports for row in report.rows)


@dataclass(frozen=True)
class Prepared:
    """Everything that an evaluation needs before it measures.

    Attributes:
        plans: by name.
        subjects: plans and baselines; the unquantized cache is measured beside them.
    """

    tasks: list[Task]
    gates: list[Gate]
    plans: Mapping[str, Plan]
    loaded: LoadedModel
    subjects: list[Subject]


def prepare(
    choice: Choice,
    names: SubjectNames,
    setup: Setup,
    options: Mapping[str, Any],
    gates: Sequence[str] = (),
    say: Say = unsaid,
) -> Prepared:
    """Find tasks and plans, and load the model; arguments as of `measure_plans`. Raises KvmixError."""
    from ..cache.subject import Subject
    from ..evaluation import get_tasks, split_tasks
    from ..models.loading import load_info, load_model

    check_baselines(names.baselines)
    loading: Loading = {**setup.loading, "revision": choice.revision}
    tasks = get_tasks(split_tasks(DEFAULT_TASKS if setup.tasks is None else setup.tasks), options)
    conditions = _conditions(gates, tasks)
    info = load_info(choice.model, revision=choice.revision, trust_remote_code=loading["trust_remote_code"])
    plans = choice.plans(info, names.uniform, say, encode=names.encode)
    loaded = load_model(choice.model, **loading)
    subjects = [Subject(name, plan) for name, plan in plans.items()]
    subjects += baseline_subjects(names.baselines, loaded, plans, setup.settings.seed)
    return Prepared(tasks, conditions, plans, loaded, subjects)


def measure_plans(
    choice: Choice,
    names: SubjectNames,
    setup: Setup,
    options: Mapping[str, Any],
    gates: Sequence[str] = (),
    *,
    say: Say = unsaid,
    progress: Progress | None = None,
    on_report: Callable[[Task, Report, ModelInfo], None] = lambda task, report, model: None,
) -> Evaluation:
    """Measure the subjects and judge them by the gates.

    Args:
        choice: plans and model of the names, from `names.choose`.
        options: options of single tasks, those that were given.
        gates: expressions such as `perplexity>+1%`.
        say: takes the lines that say which settings plans have.
        progress: see `run_task`.
        on_report: called as soon as a task is done, so that a later task's failure does not take its results away.

    Raises:
        KvmixError: before anything is measured if it cannot be.
    """
    from ..evaluation.runner import no_progress, run_tasks
    from ..evaluation.runs import RunFolders

    found = prepare(choice, names, setup, options, gates, say)
    loaded = found.loaded
    runs = RunFolders(model=state.slug(choice.model), **setup.results)
    reports = run_tasks(
        found.tasks,
        loaded,
        found.subjects,
        setup.settings,
        runs,
        progress or no_progress,
        lambda task, report: on_report(task, report, loaded.info),
    )
    verdicts = tuple(
        gate.check(_judged(report, found.plans), report.reference)
        for gate in found.gates
        for task, report in zip(found.tasks, reports, strict=True)
        if any(metric.name == gate.metric for metric in task.metrics)
    )
    return Evaluation(loaded.info, tuple(reports), verdicts)


def _judged(report: Report, plans: Collection[str]) -> list[Row]:
    """Return the rows that gates judge: those of the user's plans, or of the baselines if there is nothing else."""
    return [row for row in report.plans if row.plan in plans] or list(report.plans)


def _conditions(expressions: Sequence[str], tasks: Sequence[Task]) -> list[Gate]:
    """Return the gates. Raises EvaluationError, before anything is measured, if one makes no sense."""
    from ..evaluation.gates import parse_gate

    metrics = [metric for task in tasks for metric in task.metrics]
    known = [metric.name for metric in metrics]
    relative = [metric.name for metric in metrics if not metric.plans_only]
    return [parse_gate(expression, known, relative) for expression in expressions]
