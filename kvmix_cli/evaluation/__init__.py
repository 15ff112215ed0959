"""Tasks that measure a plan against the unquantized cache on the same work, by name. One file or folder each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError, UnknownTaskError, did_you_mean
from ..registry import Registry
from .tasks.lm_eval import harness_kind

if TYPE_CHECKING:
    from .base import Task

_TASKS: Registry[type[Task]] = Registry(
    "task",
    EvaluationError,
    __name__,
    {
        "perplexity": "tasks.perplexity:Perplexity",
        "recall": "tasks.recall:Recall",
        "passkey": "tasks.passkey:Passkey",
        "kv_retrieval": "tasks.kv_retrieval:KVRetrieval",
        "multi_hop": "tasks.multi_hop:MultiHop",
        "code_completion": "tasks.code_completion:CodeCompletion",
        "memory": "tasks.memory:Memory",
        "throughput": "tasks.throughput.task:Throughput",
        "longbench": "tasks.longbench.task:LongBench",
        "longbench-e": "tasks.longbench.task:LongBenchE",
    },
)
"""Classes of tasks. One with a field `members` also takes some of its parts, `name:one,two`."""
_MEMBERS: Registry[Mapping[str, Any]] = Registry(
    "task with data sets",
    EvaluationError,
    __name__,
    {
        "longbench": "tasks.longbench.datasets:MEMBERS",
        "longbench-e": "tasks.longbench.datasets:MEMBERS_E",
    },
)
"""The parts of a task that has some, by their names, in a module that is quick to import."""


SETS: Mapping[str, tuple[str, ...]] = {
    "long-context": ("recall", "passkey", "kv_retrieval", "multi_hop", "code_completion"),
    "longctx_bench": ("longbench:longctx", "passkey"),
}
"""Several tasks by one name: those of our own at any length, and those of Yuan et al. 2024 (arXiv 2407.01527)."""


def tasks() -> tuple[str, ...]:
    """Return the names of all tasks of our own."""
    return tuple(_TASKS)


def split_tasks(text: str) -> tuple[str, ...]:
    """Return the tasks of a list. `perplexity,longbench:qasper,trec` are two: commas also part a task's members.

    A set of tasks stands for its tasks.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        family = found[-1].partition(":")[0] if found and ":" in found[-1] else None
        if family and part not in _TASKS and part in _members(family):
            found[-1] += f",{part}"
        else:
            found += SETS.get(part, (part,))
    return tuple(dict.fromkeys(found))


def check_names(names: Sequence[str]) -> None:
    """Raise EvaluationError for a name that no task has; tasks of our own are not imported for it."""
    for name in names:
        if name not in _TASKS:
            get_task(name)


def get_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Return a task by name, ours or lm-eval's, with those of the options that are its own. Raises EvaluationError."""
    family, colon, members = name.partition(":")
    ours = family in _TASKS and (not colon or family in _MEMBERS)
    kind: type[Task] = _TASKS[family] if ours else harness_kind(name, _named())
    own = {key: value for key, value in (options or {}).items() if key in _own_options(kind)}
    if not ours:
        own["given"] = name
    elif colon:
        own["members"] = tuple(members.split(","))
    try:
        return kind(**own)
    except UnknownTaskError as error:
        raise error.among(_named()) from error


def get_tasks(names: Sequence[str], options: Mapping[str, Any]) -> list[Task]:
    """Return several tasks. Raises EvaluationError, also for an option that none of them has."""
    found = [_listed_task(name, before, options) for before, name in pairwise(("", *names))]
    for option in options:
        if not any(option in _own_options(type(task)) for task in found):
            raise EvaluationError(f"--{option.replace('_', '-')} is no option of {', '.join(names)}; leave it out")
    return found


def _listed_task(name: str, before: str, options: Mapping[str, Any]) -> Task:
    """Return a task of a list. An unknown one after `longbench:qasper` may have been meant as a data set."""
    try:
        return get_task(name, options)
    except UnknownTaskError as error:
        family, colon, _ = before.partition(":")
        members = _members(family) if colon else {}
        if not members:
            raise
        near = f", the nearest of lm-eval are {', '.join(error.near)}" if error.near else ""
        raise EvaluationError(
            f"{family} has no data set '{name}'{did_you_mean(name, members)}; it has {', '.join(members)}; "
            f"and there is no task of this name{near}"
        ) from error


def _named() -> tuple[str, ...]:
    """Return all names that stand for tasks of our own."""
    return (*_TASKS, *SETS)


def _members(family: str) -> Mapping[str, Any]:
    if family not in _MEMBERS:
        return {}
    return _MEMBERS[family]


def _own_options(kind: type[Task]) -> set[str]:
    return {field.name for field in fields(kind)} if is_dataclass(kind) else set()
