"""Scores of recorded answers by lm-eval itself: its filters, metrics, aggregation and standard errors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from lm_eval import evaluator
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ...bootstrap import ratio
from ...results import Estimate, Metric
from .boundary import named, quiet, task_errors
from .data import LoadedTasks
from .metrics import metric_name
from .requests import GENERATE, ROLL, SCORE

RESAMPLES = 1000
"""Draws of lm-eval's own bootstrap, where it has one and kvmix has none."""
NORMAL = 1.96
"""Standard errors on each side of a 95 % interval."""
MOST_DRAWN = 4000
"""Documents that are drawn again. With more of them the standard error says the same, in less memory."""
NOT_MEASURED = -1
"""RULER's value of its metrics of other lengths than the one that was chosen."""

Aggregation = Callable[[Sequence[Any]], float]
"""lm-eval's function from the values of all documents to a number."""


class ReplayLM(LM):
    """A model of lm-eval that gives recorded answers; requests come in the order in which they were built."""

    def __init__(self, answers: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See `LM.generate_until`."""
        return self._recorded(GENERATE, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        return self._recorded(SCORE, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        return self._recorded(ROLL, requests)

    def _recorded(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        if len(requests) != len(self.answers[kind]):
            raise AssertionError(f"lm-eval asks for {len(requests)} answers of {kind}, not {len(self.answers[kind])}")
        return list(self.answers[kind])


def score_answers(
    loaded: LoadedTasks, answers: Mapping[str, Sequence[Any]], limit: int | None, seed: int
) -> dict[Metric, Estimate]:
    """Return lm-eval's numbers for recorded answers.

    Args:
        loaded: tasks whose requests were built.
        answers: by kind of request, one for each, in the order of `data.build_requests`.
        limit: documents of each task; None for all.

    Raises:
        EvaluationError: if a task's own code cannot score an answer.
    """
    for task in loaded["tasks"].values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
        vars(task)["build_all_requests"] = lambda **_: None  # the requests that were answered are those to score
    names = ", ".join(loaded["tasks"])
    explained = task_errors(lambda error: f"{names}: lm-eval cannot score the answers: {named(error)}")
    with explained, _one_process(), quiet():
        found = evaluator.evaluate(ReplayLM(answers), dict(loaded), limit=limit, bootstrap_iters=RESAMPLES)
        return dict(_estimates(found, loaded, seed))


def _estimates(found: Mapping[str, Any], loaded: LoadedTasks, seed: int) -> Iterator[tuple[Metric, Estimate]]:
    for name, numbers in found["results"].items():
        group = loaded["groups"].get(name)
        tasks = [name] if group is None else [task.task_name for task in group.get_all_tasks()]
        samples = [sample for task in tasks for sample in found["samples"][task]]
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            if metric.isdigit() and value == NOT_MEASURED:
                continue
            higher = found["higher_is_better"].get(name, {}).get(metric) is not False
            items = [each[metric] for each in samples if each["filter"] == filter_name and metric in each]
            aggregate = loaded["tasks"][name].aggregation().get(metric, lm_eval_metrics.mean) if group is None else None
            spread = numbers.get(f"{metric}_stderr,{filter_name}")
            estimate = _estimate(float(value), items, aggregate, spread, seed)
            yield Metric(metric_name(name, metric, filter_name), higher), estimate


def _estimate(value: float, items: Sequence[Any], aggregate: Aggregation | None, spread: Any, seed: int) -> Estimate:
    """Return a value with an interval of documents drawn again if it is a ratio of sums, else of standard errors."""
    drawn = _drawn(value, items, aggregate, seed)
    if drawn is not None:
        return replace(drawn, value=value)
    margin = NORMAL * float(spread) if _is_number(spread) else 0.0
    return Estimate(value, value - margin, value + margin)


def _drawn(value: float, items: Sequence[Any], aggregate: Aggregation | None, seed: int) -> Estimate | None:
    if not 0 < len(items) <= MOST_DRAWN:
        return None
    if all(_is_number(item) for item in items):
        ones = [1.0] * len(items)
        if aggregate is lm_eval_metrics.perplexity:
            return ratio([-item for item in items], ones, seed).map(math.exp)
        if math.isclose(sum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12):  # a mean, under any name
            return ratio([float(item) for item in items], ones, seed)
    if aggregate in (lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte):
        nats = ratio([-item[0] for item in items], [item[1] for item in items], seed)
        is_perplexity = aggregate is lm_eval_metrics.weighted_perplexity
        return nats.map(math.exp) if is_perplexity else nats.map(lambda x: x / math.log(2))
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval's bootstrap from starting a process on every core, each with a copy of the model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
