"""Names and directions of the metrics that lm-eval's tasks report, read from their configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

from ...results import Metric
from .boundary import quiet
from .names import TaskConfig, TaskSelection

NO_FILTER = "none"
_RULER_LENGTH = 4096
"""Tokens of RULER's contexts if nothing else is chosen (lm_eval/tasks/ruler)."""


class ReportedMetric(NamedTuple):
    """A number that one task reports: lm-eval's metric, seen through one of the task's filters."""

    metric: str
    filter_name: str
    higher_is_better: bool


def metric_name(task: str, metric: str, filter_name: str = NO_FILTER) -> str:
    """Return the name of a number among those of all tasks, such as `gsm8k_exact_match_strict_match`."""
    words = (task, metric) if filter_name == NO_FILTER else (task, metric, filter_name)
    name = re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")
    return name if name[:1].isalpha() else f"task_{name}"


def reported_metrics(
    selection: TaskSelection, objects: Mapping[str, Any], length: int | None = None
) -> tuple[Metric, ...]:
    """Return the metrics of selected tasks, those of groups first.

    Args:
        objects: tasks that are Python classes, by name.
        length: tokens of contexts that a task makes itself.
    """
    known = {task: _reported(config, objects.get(task), length) for task, config in selection.tasks.items()}
    listed: dict[str, Metric] = {}

    def add(task: str, number: ReportedMetric) -> None:
        name = metric_name(task, number.metric, number.filter_name)
        listed.setdefault(name, Metric(name, number.higher_is_better))

    for name, group in selection.groups.items():
        for aggregate in group.aggregates:
            for number in (each for task in group.tasks for each in known[task]):
                filters = aggregate.get("filter_list") or number.filter_name
                if number.metric == aggregate["metric"] and number.filter_name in filters:
                    add(name, number)
    for task, numbers in known.items():
        for number in numbers:
            add(task, number)
    return tuple(listed.values())


def _reported(config: TaskConfig, task: Any, length: int | None) -> list[ReportedMetric]:
    if "class" in config:
        return [
            ReportedMetric(metric, NO_FILTER, higher is not False) for metric, higher in task.higher_is_better().items()
        ]
    filters = [each["name"] for each in config.get("filter_list") or [{"name": NO_FILTER}]]
    directions: dict[str, bool] = {}
    for entry in config.get("metric_list") or _default_metrics(config):
        name = _plain(entry["metric"])
        if name.isdigit():  # RULER's metrics are called by the length of the context
            name = str(length or _RULER_LENGTH)
        higher = entry["higher_is_better"] if "higher_is_better" in entry else _higher_is_better(name)
        directions[name] = higher is not False
    return [ReportedMetric(metric, name, higher) for metric, higher in directions.items() for name in filters]


def _default_metrics(config: TaskConfig) -> list[dict[str, str]]:
    return [{"metric": name} for name in DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]


def _plain(metric: str) -> str:
    """Return a metric's name; that of a function, given as folder/module.function, is the function's."""
    return metric.rpartition(".")[2] if "/" in metric else metric


def _higher_is_better(metric: str) -> bool | None:
    with quiet():
        direction: bool | None = is_higher_better(metric)
    return direction
