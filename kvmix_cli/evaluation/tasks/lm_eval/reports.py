"""What tasks report, and what that is called among the metrics of all tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

from ...results import Metric
from .names import Config, Found
from .quiet import quiet

NO_FILTER = "none"
_DEFAULT_LENGTH = 4096
"""Tokens of RULER's contexts if nothing else is asked for (lm_eval/tasks/ruler)."""


def metric_name(task: str, metric: str, filter_name: str = NO_FILTER) -> str:
    """The name of a number among those of all tasks, `gsm8k_exact_match_strict_match`."""
    words = (task, metric) if filter_name == NO_FILTER else (task, metric, filter_name)
    name = re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")
    return name if name[:1].isalpha() else f"task_{name}"


def metrics(found: Found, objects: Mapping[str, Any], length: int | None = None) -> tuple[Metric, ...]:
    """What the tasks report, groups first.

    Args:
        objects: tasks that are Python classes, by name.
        length: of contexts that a task makes itself.
    """
    known = {task: _reported(config, objects.get(task), length) for task, config in found.tasks.items()}
    listed: dict[str, Metric] = {}
    for name, group in found.groups.items():
        inside = [each for task in group.tasks for each in known[task]]
        for aggregate in group.aggregates:
            for metric, filter_name, higher in inside:
                if metric == aggregate["metric"] and filter_name in (aggregate.get("filter_list") or filter_name):
                    full = metric_name(name, metric, filter_name)
                    listed.setdefault(full, Metric(full, higher))
    for task, numbers in known.items():
        for metric, filter_name, higher in numbers:
            full = metric_name(task, metric, filter_name)
            listed.setdefault(full, Metric(full, higher))
    return tuple(listed.values())


def _reported(config: Config, task: Any, length: int | None) -> list[tuple[str, str, bool]]:
    """Metric, filter, and whether higher is better, for all that one task reports."""
    if "class" in config:
        return [(metric, NO_FILTER, higher is not False) for metric, higher in task.higher_is_better().items()]
    filters = [each["name"] for each in config.get("filter_list") or [{"name": NO_FILTER}]]
    directions: dict[str, bool] = {}
    for entry in config.get("metric_list") or _default_metrics(config):
        name = _plain(entry["metric"])
        if name.isdigit():  # RULER's metrics are called by the length of the context
            name = str(length or _DEFAULT_LENGTH)
        higher = entry["higher_is_better"] if "higher_is_better" in entry else _higher_is_better(name)
        directions[name] = higher is not False
    return [(metric, name, higher) for metric, higher in directions.items() for name in filters]


def _default_metrics(config: Config) -> list[dict[str, str]]:
    return [{"metric": name} for name in DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]


def _plain(metric: str) -> str:
    """A metric's name; that of a function, given as folder/module.function, is the function's."""
    return metric.rpartition(".")[2] if "/" in metric else metric


def _higher_is_better(metric: str) -> bool | None:
    with quiet():
        direction: bool | None = is_higher_better(metric)
    return direction
