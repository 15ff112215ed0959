"""Measuring a plan against the unquantized cache on the same work. One file a task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import EvaluationError, did_you_mean

if TYPE_CHECKING:
    from .base import Task

_TASKS = {
    "perplexity": "perplexity:Perplexity",
    "recall": "recall:Recall",
    "memory": "memory:Memory",
}


def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """A task by name. Raises EvaluationError."""
    if name not in _TASKS:
        raise EvaluationError(f"no task '{name}'{did_you_mean(name, _TASKS)}; there are {', '.join(_TASKS)}")
    module, _, attribute = _TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(f".{module}", __name__), attribute)()
    return task
