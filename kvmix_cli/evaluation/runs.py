"""Run folders of a model: found by their settings, begun, resumed, or lent the samples of a shorter run.

Runs with other settings have other folders, so that nothing finished is ever overwritten by something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.subject import UNQUANTIZED
from ..errors import DocumentError, EvaluationError, OutputError
from ..journal import read_records
from .identity import (
    Config,
    checksum,
    compared,
    identity,
    independent,
    old_name,
    safe_name,
    short_checksum,
    with_samples,
    without_hash,
    without_samples,
)
from .records import SampleRecord, record_form
from .run_folder import METRICS, SAMPLES, RunFolder, has_metrics, read_config, read_object


@dataclass(frozen=True)
class RunFolders:
    """The run folders of one model.

    Attributes:
        root: the folder that holds them.
        model: the model's name in their names.
        resume: continue what an interrupted run has left, and read what is finished; otherwise measure everything.
        command: the command line, for the head comment of `config.yaml`.
        may_begin: with `resume`, also measure settings under which nothing was measured yet.
        is_shared: with `resume`, other processes measure other rows at the same time. A row whose files are damaged is
            then measured anew, with a warning, since nobody may be there to decide it.
    """

    root: Path
    model: str
    resume: bool = False
    command: str = ""
    may_begin: bool = False
    is_shared: bool = False

    def check(self, task: str, configs: Mapping[str, Config], samples: Sequence[Any]) -> None:
        """Look at the folders of all rows before any of them is measured.

        Args:
            configs: settings of each row, by its plan's name.

        Raises:
            OutputError: if one is a symbolic link, which may lead anywhere.
            EvaluationError: if there is nothing to resume, because everything there was measured with other settings.

        Warns:
            UserWarning: if finished rows are going to be measured anew, or if a row cannot be resumed because another
                plan of its name, or other data, was measured.
        """
        complete = {plan: with_samples(config, samples) for plan, config in configs.items()}
        folders = {plan: self._folder(task, plan, config) for plan, config in complete.items()}
        plans = [plan for plan in folders if plan != UNQUANTIZED and not self.resume]
        finished = [folders[plan] for plan in plans if has_metrics(folders[plan] / METRICS)]
        if finished:
            more = f" (and {len(finished) - 1} more)" if len(finished) > 1 else ""
            warnings.warn(
                f"{finished[0]}{more} has these results already; they are measured anew, and replaced when the new "
                "ones are complete; --resume reads what is finished",
                stacklevel=2,
            )
        for plan, folder in folders.items() if self.resume and not self.may_begin else ():
            if folder.exists() or not (changed := self._changed(task, plan, complete[plan], samples)):
                continue
            if not self._has_begun(complete[plan]):
                raise EvaluationError(
                    f"{changed}; leave out --resume to measure these settings in folders of their own, "
                    "or choose another --output-dir"
                )
            warnings.warn(f"nothing to resume for {folder}: {changed}; measured from the beginning", stacklevel=2)
            return

    def open(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> RunFolder:
        """Return the run folder of one row, with the records it already has. Until it is closed it is locked.

        With `resume`, a run of fewer of the same samples gives its records to this one, and stays as it is.

        Raises:
            InUseError: if another process has it open.
            DocumentError: if it is to be resumed but damaged, unless it is shared.
            OutputError: if it cannot be written.
        """
        config = with_samples(config, samples)
        run = RunFolder(self._folder(task, plan, config), task, config, self.command)
        earlier = self._earlier_records(task, plan, config, samples) if self.resume else []
        try:
            run.open(self.resume, earlier)
        except DocumentError as error:
            if not self.is_shared:
                raise
            warnings.warn(f"{error.source} is damaged, so its row is measured anew", stacklevel=2)
            run.open(False, earlier)
        if self.is_shared and (run.folder / METRICS).exists() and not read_object(run.folder / METRICS):
            warnings.warn(f"{run.folder / METRICS} is damaged, so it is written anew", stacklevel=2)
        return run

    def picture(self, task: str, results: Sequence[Any]) -> Path:
        """Return the path of a picture of a task's results, beside its run folders; other results have another one."""
        return self.root / f"{safe_name(task)}__{safe_name(self.model)}__heatmap__{short_checksum(results)}.png"

    def _folder(self, task: str, plan: str, config: Config) -> Path:
        """Return the folder of a run; with `resume` it may have the name of an older version, without a hash."""
        folder = self.root / f"{self._head(task, plan)}__{identity(config)}"
        before = self.root / old_name(task, self.model, plan)
        if self.resume and not folder.exists() and identity(read_config(before)) == identity(config):
            folder = before
        if folder.is_symlink():
            raise OutputError(
                f"{folder} is a symbolic link, and results are written to real folders only; "
                "remove it, or choose another --output-dir"
            )
        return folder

    def _earlier_records(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> list[SampleRecord]:
        """Return the records of the longest run with the same settings but fewer samples, the first ones of these."""
        best: list[SampleRecord] = []
        for folder, count in self._shorter_runs(task, plan, config, samples):
            with suppress(DocumentError):
                records = read_records(folder / SAMPLES, None, record_form(task))
                best = max(best, records[:count], key=len)
        return best

    def _shorter_runs(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> Iterator[tuple[Path, int]]:
        """Yield run folders, with their numbers of samples, that differ from a row only in having fewer samples."""
        for folder in self._others(task, plan):
            found = read_config(folder)
            count = found["samples"]["count"] if found else 0
            same = 0 < count < len(samples) and without_samples(found) == without_samples(config)
            if same and checksum(samples[:count]) == found["samples"]["sha256"]:
                yield folder, count

    def _changed(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> str:
        """Return how a row's settings differ from those of the runs that are there; "" if a run can be resumed."""
        if any(self._shorter_runs(task, plan, config, samples)):
            return ""
        wanted, changed = compared(config), ""
        for other in self._others(task, plan):
            found = compared(read_config(other))
            names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            changed = f"{other.name} was measured with another {', '.join(names)}"
        return changed

    def _has_begun(self, config: Config) -> bool:
        """Return whether any row of any task was measured with the settings that all tasks share."""
        wanted = independent(config)
        return any(independent(read_config(folder)) == wanted for folder in self.root.iterdir() if folder.is_dir())

    def _others(self, task: str, plan: str) -> Iterator[Path]:
        """Yield the run folders of a task and plan, whatever their settings."""
        head, before = self._head(task, plan), old_name(task, self.model, plan)
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.name == before or without_hash(folder.name) == head:
                yield folder

    def _head(self, task: str, plan: str) -> str:
        return "__".join(safe_name(part) for part in (task, self.model, plan))
