"""Running tasks: the unquantized cache first, then every subject, on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..cache.subject import Subject
from ..errors import EvaluationError
from ..turns import take_turns
from .base import Settings, Task
from .results import Report
from .runs import RunFolders
from .work import Progress, TaskWork

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

__all__ = ["Progress", "no_progress", "run_task", "run_tasks"]


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show no progress."""
    yield lambda: None


def run_task(
    task: Task,
    loaded: LoadedModel,
    subjects: Sequence[Subject],
    settings: Settings,
    folders: RunFolders | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Measure the unquantized cache and then each subject; for some tasks several of them together, sample by sample.

    A subject that cannot be measured (its plan does not fit, its numbers cannot be quantized, no memory is left) gets a
    row with an error; the others are measured all the same. Every rank of `loaded` returns the same report.

    Args:
        folders: where records are kept; None keeps them nowhere.

    Raises:
        KvmixError: if there is nothing to measure on, or a run folder cannot be used.
        InUseError: if rows are shared, and other processes are at some of them.
    """
    return _prepare(task, loaded, subjects, settings, folders, progress)()


def run_tasks(
    tasks: Sequence[Task],
    loaded: LoadedModel,
    subjects: Sequence[Subject],
    settings: Settings,
    folders: RunFolders | None = None,
    progress: Progress = no_progress,
    on_report: Callable[[Task, Report], None] = lambda task, report: None,
) -> list[Report]:
    """Run several tasks as `run_task` does. Where processes share rows, each goes on with the next task meanwhile.

    Args:
        on_report: called as soon as a task is done, so that a later task's failure does not take its results away.
    """
    is_shared = folders is not None and folders.is_shared
    prepared = {task.name: _prepare(task, loaded, subjects, settings, folders, progress) for task in tasks if is_shared}

    def measure(task: Task) -> Report:
        prepare = prepared.get(task.name) or _prepare(task, loaded, subjects, settings, folders, progress)
        report = prepare()
        on_report(task, report)
        return report

    return take_turns([partial(measure, task) for task in tasks]) if is_shared else [measure(task) for task in tasks]


def _prepare(
    task: Task,
    loaded: LoadedModel,
    subjects: Sequence[Subject],
    settings: Settings,
    folders: RunFolders | None,
    progress: Progress,
) -> Callable[[], Report]:
    """Return the function that measures a task, once it is known that it can be. Raises KvmixError."""
    settings.check()
    task.check_context(settings, loaded.max_length)
    if loaded.ranks.is_sharded and task.is_local:
        raise EvaluationError(f"{task.name} is about one process, and every rank holds a part: drop --tensor-parallel")
    if settings.prefill_chunk is not None:
        loaded = replace(loaded, prefill_chunk=settings.prefill_chunk)
    samples = task.samples(loaded, settings)
    loaded.check_ids(getattr(sample, "ids", ()) for sample in samples)
    kept = folders if loaded.ranks.leads else None
    work = TaskWork(task, loaded, settings, samples, kept, progress)
    all_subjects = (Subject(), *subjects)
    if kept is not None:
        kept.check(task.name, {subject.name: work.config(subject) for subject in all_subjects}, samples)
    return partial(work.report, all_subjects)
