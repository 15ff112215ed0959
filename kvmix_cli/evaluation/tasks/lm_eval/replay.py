"""Scoring recorded answers by lm-eval itself: its filters, its metrics, its aggregation, its standard errors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from lm_eval import evaluator
from lm_eval.api import metrics as theirs
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ....errors import EvaluationError, first_sentence
from ...bootstrap import ratio
from ...results import Estimate, Metric
from .quiet import quiet
from .reports import metric_name
from .requests import GENERATE, ROLL, SCORE

RESAMPLES = 1000
"""Of lm-eval's own bootstrap, where it has one and we have none."""
NORMAL = 1.96
"""Standard errors on each side of a 95 % interval."""
MOST_DRAWN = 4000
"""Documents that are drawn again. With more of them the standard error says the same, in less memory."""
NOT_MEASURED = -1
"""What RULER gives for its metrics of other lengths than the one that was asked for."""


class Replay(LM):
    """Answers every request with what is on record. Requests come in the order in which they were built."""

    def __init__(self, answers: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._recorded(GENERATE, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._recorded(SCORE, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._recorded(ROLL, requests)

    def _recorded(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        if len(requests) != len(self.answers[kind]):
            raise AssertionError(f"lm-eval asks for {len(requests)} answers of {kind}, not {len(self.answers[kind])}")
        return list(self.answers[kind])


def evaluate(
    loaded: Mapping[str, Any], answers: Mapping[str, Sequence[Any]], limit: int | None, seed: int
) -> dict[Metric, Estimate]:
    """What lm-eval makes of the answers.

    Args:
        loaded: tasks whose requests were built, as `data.load_tasks` gives them.
        answers: by kind of request, one for each, in the order of `data.build_requests`.

    Raises:
        EvaluationError: if a task's own code cannot score an answer.
    """
    for task in loaded["tasks"].values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
        vars(task)["build_all_requests"] = lambda **_: None  # what was answered is what is scored
    try:
        with _one_process(), quiet():
            found = evaluator.evaluate(Replay(answers), dict(loaded), limit=limit, bootstrap_iters=RESAMPLES)
            return dict(_estimates(found, loaded, seed))
    except Exception as error:
        names = ", ".join(loaded["tasks"])
        said = f"{type(error).__name__}: {first_sentence(error)}"
        raise EvaluationError(f"{names}: lm-eval cannot score the answers: {said}") from error


def _estimates(found: Mapping[str, Any], loaded: Mapping[str, Any], seed: int) -> Iterator[tuple[Metric, Estimate]]:
    for name, numbers in found["results"].items():
        group = loaded["groups"].get(name)
        tasks = [task.task_name for task in group.get_all_tasks()] if group is not None else [name]
        samples = [sample for task in tasks for sample in found["samples"][task]]
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            if metric.isdigit() and value == NOT_MEASURED:
                continue
            higher = found["higher_is_better"].get(name, {}).get(metric) is not False
            items = [each[metric] for each in samples if each["filter"] == filter_name and metric in each]
            aggregate = None if group is not None else loaded["tasks"][name].aggregation().get(metric, theirs.mean)
            spread = numbers.get(f"{metric}_stderr,{filter_name}")
            estimate = _estimate(float(value), items, aggregate, spread, seed)
            yield Metric(metric_name(name, metric, filter_name), higher), estimate


def _estimate(value: float, items: Sequence[Any], aggregate: Callable | None, spread: Any, seed: int) -> Estimate:
    """With an interval from documents drawn again where that is a ratio of sums; else from lm-eval's standard error."""
    drawn = _drawn(value, items, aggregate, seed)
    if drawn is not None:
        return replace(drawn, value=value)
    margin = NORMAL * float(spread) if _is_number(spread) else 0.0
    return Estimate(value, value - margin, value + margin)


def _drawn(value: float, items: Sequence[Any], aggregate: Callable | None, seed: int) -> Estimate | None:
    if not 0 < len(items) <= MOST_DRAWN:
        return None
    if all(_is_number(item) for item in items):
        ones = [1.0] * len(items)
        if aggregate is theirs.perplexity:
            return ratio([-item for item in items], ones, seed).map(math.exp)
        if math.isclose(sum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12):  # a mean, by whatever name
            return ratio([float(item) for item in items], ones, seed)
    if aggregate in (theirs.weighted_perplexity, theirs.bits_per_byte):
        nats = ratio([-item[0] for item in items], [item[1] for item in items], seed)
        return nats.map(math.exp) if aggregate is theirs.weighted_perplexity else nats.map(lambda x: x / math.log(2))
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval's bootstrap would start a process on every core, each with a copy of the model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
