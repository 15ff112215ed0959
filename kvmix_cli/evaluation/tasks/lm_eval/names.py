"""Names of lm-eval's tasks, groups and tags, resolved from its task files before any data is loaded."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.config.group import GroupConfig

from ....errors import EvaluationError, UnknownTaskError
from .index import Index, defined_names, folder_index, index_around, is_pattern

NEAREST = 3
_GROUP_KEYS = {each.name for each in fields(GroupConfig)}

TaskConfig = Mapping[str, Any]
"""A task file of lm-eval, as its YAML says."""


@dataclass(frozen=True)
class TaskGroup:
    """A group of lm-eval: the metrics that are aggregated over its tasks, and these tasks by name."""

    aggregates: tuple[TaskConfig, ...]
    tasks: tuple[str, ...]


@dataclass
class TaskSelection:
    """The tasks behind a name.

    Attributes:
        names: tasks and groups that lm-eval loads, none of which is part of another.
        folders: where their files are, the user's last.
        tasks: the configuration of every single task.
        groups: the groups among them, at any depth.
    """

    names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    groups: dict[str, TaskGroup] = field(default_factory=dict)

    @property
    def makes_data(self) -> bool:
        """Return whether a task makes its own data, for a tokenizer and to a length, as RULER does."""
        return any("custom_dataset" in config for config in self.tasks.values())

    @property
    def has_classes(self) -> bool:
        """Return whether a task is a Python class, whose metrics are in no file."""
        return any("class" in config for config in self.tasks.values())


def select_tasks(name: str, include_path: Path | None) -> TaskSelection:
    """Return the tasks behind a name: a task, a group, a tag, or a pattern such as `ruler_*`.

    lm-eval's whole index takes seconds to build, so the user's folder is searched alone first, then with those of
    lm-eval's folders that mention the name.

    Raises:
        UnknownTaskError: if there is no such name.
        EvaluationError: if a file of the user's folder is broken, or the task cannot be run here.
    """
    own: Index = {}
    if include_path is not None:
        check_folder(include_path)
        own = folder_index(include_path.resolve())
    found = _select(name, own)
    if found is None:
        raise _unknown(name, own)
    for task, config in found.tasks.items():
        refuse_unsafe(
            task, bool(config.get("unsafe_code")), bool(config.get("doc_to_image") or config.get("doc_to_audio"))
        )
    return found


def _select(name: str, own: Index) -> TaskSelection | None:
    """Return the tasks behind a name, with the entries of the user's folder before lm-eval's; None if there is none."""
    nearby: Index = {}
    mentioned: frozenset[str] = frozenset()
    while True:
        resolver = _NameResolver({**nearby, **own})
        found = resolver.resolve(name)
        if resolver.mentioned <= mentioned or not name:
            return found
        mentioned |= resolver.mentioned
        nearby = index_around(mentioned)


def refuse_unsafe(task: str, runs_code: bool, is_multimodal: bool) -> None:
    """Raise EvaluationError for a task that runs code of the model, or that is about images or sound."""
    if runs_code:
        raise EvaluationError(f"{task} runs code that the model has written; kvmix does not do that")
    if is_multimodal:
        raise EvaluationError(f"{task} asks about images or sound; kvmix evaluates text only")


def check_folder(folder: Path) -> None:
    """Raise EvaluationError if a folder has no task file, or one that lm-eval would skip because it is broken."""
    if not folder.is_dir():
        fault = "is a file; give the folder it is in" if folder.exists() else "does not exist"
        raise EvaluationError(f"--include-path {folder} {fault}")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise EvaluationError(f"--include-path {folder} has no task: there is no *.yaml in it")
    for path in paths:
        _check_file(path)


class _NameResolver:
    """The search for one name in an index of entries by name."""

    def __init__(self, index: Mapping[str, Any]) -> None:
        self.index = index
        self.selection = TaskSelection()
        self.complete = True
        self.mentioned: set[str] = set()
        """Names that files outside this index may say more of: those that are not in it, and tags."""

    def resolve(self, name: str) -> TaskSelection | None:
        """Return the tasks behind a name; None if it or a part of it is not in this index."""
        names = [name] if name in self.index else _matches(name, self.index)
        if is_pattern(name) or not names:
            self.mentioned.add(name)
        parts = {each: list(dict.fromkeys(self._expand(each, {}))) for each in names}
        if not self.selection.tasks or not self.complete:
            return None
        covered: set[str] = set()
        for each in sorted(names, key=lambda each: (self._is_tag(each), -len(parts[each]), each)):
            rest = [task for task in parts[each] if task not in covered]
            whole = len(rest) == len(parts[each]) and not self._is_tag(each)
            self.selection.names += (each,) if whole else tuple(rest)
            covered.update(rest)
        self.selection.folders = self._folders([*names, *self.selection.tasks, *self.selection.groups])
        return self.selection

    def _expand(self, name: str, changes: TaskConfig) -> list[str]:
        """Return the single tasks under a name that is in the index."""
        entry = self.index[name]
        if self._is_tag(name):
            self.mentioned.add(name)
            return [task for each in sorted(entry.tags) if each in self.index for task in self._expand(each, changes)]
        if entry.kind.name == "GROUP":
            return self._expand_group(name, entry.cfg or {}, changes)
        self.selection.tasks[name] = {**(entry.cfg or {}), **changes}
        return [name]

    def _expand_group(self, name: str, config: TaskConfig, changes: TaskConfig) -> list[str]:
        changes = {**{key: value for key, value in config.items() if key not in _GROUP_KEYS}, **changes}
        members = config.get("task") or []
        tasks = [
            task
            for member in (members if isinstance(members, list) else [members])
            for task in self._expand_member(name, {"task": member} if isinstance(member, str) else member, changes)
        ]
        aggregates = config.get("aggregate_metric_list") or []
        aggregates = [aggregates] if isinstance(aggregates, Mapping) else aggregates
        self.selection.groups[name] = TaskGroup(tuple(aggregates), tuple(dict.fromkeys(tasks)))
        return tasks

    def _expand_member(self, group: str, member: TaskConfig, changes: TaskConfig) -> list[str]:
        """Return the single tasks of one item of a group's list: a known name with changes, or a new definition."""
        key = "group" if isinstance(member, Mapping) and "group" in member else "task"
        name = member.get(key) if isinstance(member, Mapping) else member
        if not isinstance(name, str):
            given = f"only {', '.join(map(str, member))}" if isinstance(member, Mapping) else repr(member)
            raise EvaluationError(
                f"{group}: an item of its list of tasks has no name, {given}; give one, as text or under `task:`"
            )
        changes = {**changes, **{each: value for each, value in member.items() if each != key}}
        if name in self.index:
            return self._expand(name, changes)
        self.mentioned.add(name)
        if key == "group":
            return self._expand_group(f"{group}::{name}", member, changes)
        if len(member) == 1:
            self.complete = False
        self.selection.tasks[f"{group}::{name}"] = changes
        return [f"{group}::{name}"]

    def _is_tag(self, name: str) -> bool:
        return bool(self.index[name].kind.name == "TAG")

    def _folders(self, names: Sequence[str]) -> tuple[Path, ...]:
        lm_eval_folder = Path(lm_eval.__file__).parent
        paths = [path for each in names if each in self.index and (path := self.index[each].yaml_path)]
        folders = {Path(path).parent for path in paths}
        return tuple(sorted(folders, key=lambda path: (not path.is_relative_to(lm_eval_folder), path)))


class _TaskFileLoader(yaml.SafeLoader):
    """A safe YAML loader that reads lm-eval's `!function module.name` as text."""


_TaskFileLoader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def _check_file(path: Path) -> None:
    try:
        config = yaml.load(path.read_text(), Loader=_TaskFileLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise EvaluationError(f"{where}: broken YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(config, dict):
        raise EvaluationError(
            f"{path}: a task file is a mapping with `task:` or `group:`, not a {type(config).__name__}"
        )
    includes = config.get("include") or []
    for include in [includes] if isinstance(includes, str) else includes:
        if not (path.parent / include).is_file():
            raise EvaluationError(f"{path}: includes {include}, which does not exist")


def _matches(name: str, index: Mapping[str, Any]) -> list[str]:
    return fnmatch.filter(sorted(index), name) if is_pattern(name) else []


def _unknown(name: str, own: Index) -> EvaluationError:
    if is_pattern(name):
        return EvaluationError(f"no task of lm-eval matches '{name}'; `lm_eval ls tasks` lists their names")
    names = dict.fromkeys((*own, *defined_names()))
    near = difflib.get_close_matches(name, names, n=NEAREST)
    theirs = f"{len(names)} of lm-eval" + (f", the nearest {', '.join(near)}" if near else "")
    return UnknownTaskError(name, theirs, near)
