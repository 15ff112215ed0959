"""What lm-eval has by which name: read from its task files, before any data is there."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from ....errors import EvaluationError, did_you_mean
from . import UnknownTask
from .own_files import check_folder
from .quiet import quiet

NEAREST = 3
_OF_GROUPS = {each.name for each in fields(GroupConfig)}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Tasks under one name, and what is told of all of them together."""

    aggregates: tuple[Config, ...]
    tasks: tuple[str, ...]


@dataclass
class Found:
    """What a name stands for.

    Attributes:
        names: of tasks and groups, none of which is part of another; what lm-eval is asked to load.
        folders: where their files are, the user's last.
        tasks: the configuration of every single task.
    """

    names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    tasks: dict[str, Config] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def makes_data(self) -> bool:
        """Whether some task makes its own data, for a tokenizer and to a length (RULER)."""
        return any("custom_dataset" in config for config in self.tasks.values())

    @property
    def by_class(self) -> bool:
        """Whether some task is a Python class, which alone knows what it reports."""
        return any("class" in config for config in self.tasks.values())


def find(name: str, include_path: Path | None, ours: Iterable[str] = ()) -> Found:
    """The tasks behind a name: a task, a group, a tag, or a pattern such as `ruler_*`.

    lm-eval's own index of 14 000 names takes seconds to build, so the user's folder is searched alone first.

    Raises:
        EvaluationError: if there is none, a file of the user's folder is broken, or the task cannot be run here.
    """
    own: dict[str, Any] = {}
    found = None
    if include_path is not None:
        check_folder(include_path)
        own = _index(include_path.resolve())
        found = None if _is_pattern(name) else _Search(own).found(name)
    if found is None:
        index = {**_index(None), **own}
        found = _Search(index).found(name)
        if found is None:
            raise _unknown(name, tuple(ours), index)
    for task, config in found.tasks.items():
        refuse(task, bool(config.get("unsafe_code")), bool(config.get("doc_to_image") or config.get("doc_to_audio")))
    return found


def refuse(task: str, runs_code: bool, sees_or_hears: bool) -> None:
    """Raise EvaluationError for a task of a kind that cannot be run here."""
    if runs_code:
        raise EvaluationError(f"{task} runs code that the model has written; kvmix does not do that")
    if sees_or_hears:
        raise EvaluationError(f"{task} asks about images or sound; only text goes through the cache here")


class _Search:
    """Expands names by an index."""

    def __init__(self, index: Mapping[str, Any]) -> None:
        self.index = index
        self.result = Found()
        self.complete = True

    def found(self, name: str) -> Found | None:
        """What a name stands for; None if it or a part of it is not in this index."""
        names = [name] if name in self.index else _matches(name, self.index)
        parts = {each: list(dict.fromkeys(self._entry(each, {}))) for each in names}
        if not self.result.tasks or not self.complete:
            return None
        covered: set[str] = set()
        for each in sorted(names, key=lambda each: (self._is_tag(each), -len(parts[each]), each)):
            rest = [task for task in parts[each] if task not in covered]
            whole = len(rest) == len(parts[each]) and not self._is_tag(each)
            self.result.names += (each,) if whole else tuple(rest)
            covered.update(rest)
        self.result.folders = self._folders([*names, *self.result.tasks, *self.result.groups])
        return self.result

    def _entry(self, name: str, changes: Config) -> list[str]:
        """Single tasks under a name that is in the index."""
        entry = self.index[name]
        if self._is_tag(name):
            return [task for each in sorted(entry.tags) if each in self.index for task in self._entry(each, changes)]
        if entry.kind.name == "GROUP":
            return self._group(name, entry.cfg or {}, changes)
        self.result.tasks[name] = {**(entry.cfg or {}), **changes}
        return [name]

    def _group(self, name: str, config: Config, changes: Config) -> list[str]:
        changes = {**{key: value for key, value in config.items() if key not in _OF_GROUPS}, **changes}
        members = config.get("task") or []
        tasks = [
            task
            for member in ([members] if isinstance(members, str) else members)
            for task in self._member(name, {"task": member} if isinstance(member, str) else member, changes)
        ]
        aggregates = config.get("aggregate_metric_list") or []
        aggregates = [aggregates] if isinstance(aggregates, Mapping) else aggregates
        self.result.groups[name] = Group(tuple(aggregates), tuple(dict.fromkeys(tasks)))
        return tasks

    def _member(self, group: str, member: Config, changes: Config) -> list[str]:
        """Single tasks of what stands in a group's list: a known name with changes, or a definition in place."""
        key = "group" if "group" in member else "task"
        name = member[key]
        changes = {**changes, **{each: value for each, value in member.items() if each != key}}
        if name in self.index:
            return self._entry(name, changes)
        if key == "group":
            return self._group(f"{group}::{name}", member, changes)
        if len(member) == 1:
            self.complete = False
        self.result.tasks[f"{group}::{name}"] = changes
        return [f"{group}::{name}"]

    def _is_tag(self, name: str) -> bool:
        return bool(self.index[name].kind.name == "TAG")

    def _folders(self, names: Sequence[str]) -> tuple[Path, ...]:
        paths = [path for each in names if each in self.index and (path := self.index[each].yaml_path)]
        return tuple(sorted({Path(path).parent for path in paths}, key=lambda path: (not _is_theirs(path), path)))


@functools.cache
def _index(include_path: Path | None) -> dict[str, Any]:
    """Entries by name: of one folder, or of lm-eval."""
    with quiet():
        if include_path is None:
            return dict(TaskManager().task_index)
        return dict(TaskManager(include_path=str(include_path), include_defaults=False).task_index)


def _is_theirs(path: Path) -> bool:
    return path.is_relative_to(Path(lm_eval.__file__).parent)


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _matches(name: str, index: Mapping[str, Any]) -> list[str]:
    return fnmatch.filter(sorted(index), name) if _is_pattern(name) else []


def _unknown(name: str, ours: tuple[str, ...], index: Mapping[str, Any]) -> UnknownTask:
    if _is_pattern(name):
        return UnknownTask(f"no task of lm-eval matches '{name}'")
    near = difflib.get_close_matches(name, index, n=NEAREST)
    theirs = f"{len(index)} of lm-eval" + (f", the nearest {', '.join(near)}" if near else "")
    said = f"no task '{name}'{did_you_mean(name, ours)}; there are {', '.join(ours)}, and {theirs}"
    return UnknownTask(said, near)
