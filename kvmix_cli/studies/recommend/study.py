"""The smallest plan that is safe at a context: found by bisection on a few documents, proven on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import state
from ...errors import BudgetError, EvaluationError, KvmixError, ModelError, PlanError, QuantizationError, TextError
from ...plan import ModelInfo, Plan
from ...state import Say, unsaid
from ...turns import first_free, take_turns
from .bench import DIVERGENCE, ModelBench, Purpose, make_task, prepare
from .judge import (
    Judgement,
    Outcome,
    is_about_values,
    is_within,
    judge_divergence,
    judge_number,
    judge_values,
    judged_metric,
    outcome,
)
from .plans import WAYS, Calibrated, calibrate, first_guess

if TYPE_CHECKING:
    from ...evaluation.base import Task
    from ...evaluation.results import Report, Row
    from ...evaluation.runner import Progress
    from ...evaluation.runs import RunFolders
    from ...models.loading import LoadedModel

FIRST_DOCUMENTS = 3
"""Documents on which plans are compared before one of them is proven."""
AHEAD = 8
"""Plans that may be compared next, of which one is taken that no other process is at."""
ORDER: tuple[Outcome, ...] = ("safe", "safe-up-to", "not-proven", "not-safe")


class MeasuredTask(NamedTuple):
    """A task with the report on one plan, and what it says; None if it is not about quality."""

    task: Task
    report: Report
    judgement: Judgement | None

    @property
    def row(self) -> Row:
        """Return the plan's row."""
        return self.report.plans[0]


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that was measured.

    Attributes:
        measured: its tasks, up to the first one that it did not pass.
        unmeasured: tasks that there was nothing to measure with.
        safe_context: tokens of context for which it is safe, if any.
    """

    plan: Plan
    path: Path
    measured: tuple[MeasuredTask, ...]
    unmeasured: tuple[Judgement, ...]
    outcome: Outcome
    safe_context: int | None

    @property
    def judgements(self) -> list[Judgement]:
        """Return what all tasks say."""
        return [*(each.judgement for each in self.measured if each.judgement is not None), *self.unmeasured]

    @property
    def divergence(self) -> float:
        """Return its KL in nats a token; infinite if it is not known."""
        return next((each.own.value for each in self.judgements if each.metric == "kl" and each.own), math.inf)


@dataclass(frozen=True)
class Recommendation:
    """The answer.

    Attributes:
        context: tokens at which the plan was to be safe.
        limit: the largest KL that counts as safe, in nats a token.
        length: tokens of the documents that KL was measured on; fewer than `context` if the text has no longer ones.
        best: the plan that is recommended; if none is safe, the one that came nearest to it.
        others: plans that were measured on all documents, too, and did not pass, ascending in stored bits.
        compared: stored bits of the plans that were compared on a few documents, and their KL in nats a token.
        weights, activations, cache: bytes at the context, of one sequence; the plan's cache.
    """

    model: ModelInfo
    context: int
    limit: float
    length: int
    best: MeasuredPlan
    others: tuple[MeasuredPlan, ...]
    compared: Mapping[float, float]
    weights: int
    activations: int
    cache: int


def recommend(
    purpose: Purpose,
    load: Callable[[], LoadedModel],
    runs: RunFolders,
    *,
    command: str = "",
    say: Say = unsaid,
    progress: Progress | None = None,
) -> Recommendation:
    """Return the smallest plan that is safe at a context. Profile, plans and runs that exist are used.

    Processes that do the same with the same folders share the work: each measures what no other is at, also what may
    turn out to be needed, and comes to the same answer.

    Args:
        load: function that loads the model; called once, after the options were checked.
        runs: folders that records are kept in and resumed from.
        command: the command line, for the head comments of files.
        say: takes lines that the user should read, such as which file is used.
        progress: see `evaluation.runner.Progress`.

    Raises:
        KvmixError: if the purpose makes no sense for the model, or nothing can be measured.
    """
    bench = prepare(purpose, load, runs, progress)
    path, refused = state.profile_path(purpose.model), list[KvmixError]()
    for way in WAYS:
        if refused:
            say(f"method {way.method}, because {WAYS[0].method} cannot be used with this model: {refused[-1]}")
        try:
            made = calibrate(way, bench.loaded, path, purpose, command, say=say, progress=bench.progress)
            plans = made.plans()
        except (BudgetError, ModelError, PlanError, QuantizationError) as error:
            refused.append(error)
            continue
        try:
            return _Search(bench, made, bench.affordable(plans), command).run()
        except PlanError as error:
            refused.append(error)
    raise refused[0]


def smallest_passing(count: int, start: int, passes: Callable[[int], bool]) -> int:
    """Return the smallest of `count` numbers from 0 on that passes, where all numbers above it do; `count` if none.

    It begins at `start` and goes on in steps that double until numbers on both sides are known, then halves the rest.
    """
    fails, passing, index, step = -1, count, min(start, count - 1), 1
    while passing - fails > 1:
        if passes(index):
            passing = index
        else:
            fails = index
        if fails == -1 or passing == count:
            index = max(passing - step, 0) if fails == -1 else min(fails + step, count - 1)
            step *= 2
        else:
            index = (fails + passing) // 2
    return passing


def questions(count: int, start: int, answers: Mapping[int, bool]) -> Iterator[int]:
    """Yield the numbers that `smallest_passing` asks for next, given some answers, and may ask for after that.

    The first one is needed, the others only if the answers before them turn out so. None are left when it is done.
    """
    asked, ways = set[int](), [dict(answers)]
    while ways:
        following = []
        for way in ways:
            try:
                smallest_passing(count, start, way.__getitem__)
            except KeyError as error:
                number = int(error.args[0])
                if number not in asked:
                    asked.add(number)
                    yield number
                following += [{**way, number: passes} for passes in (True, False)]
        ways = following


@dataclass(frozen=True)
class _Search:
    """The search among the plans of one method, ascending in stored bits."""

    bench: ModelBench
    made: Calibrated
    plans: Sequence[Plan]
    command: str
    compared: dict[float, float] = field(default_factory=dict)

    def run(self) -> Recommendation:
        """Return the recommendation. Raises PlanError if the model cannot run with the plans."""
        bench, limit = self.bench, self.bench.purpose.loss
        first = self._first_passing(first_guess(self.plans, limit))
        tested: list[MeasuredPlan] = []
        for plan in self.plans[min(first, len(self.plans) - 1) :]:
            tested.append(self._prove(plan))
            if tested[-1].outcome == "safe" or not any(each.may_pass for each in tested[-1].judgements):
                break
        nearest = min(tested, key=_rank)
        best = self._at_its_context(nearest)
        return Recommendation(
            model=bench.loaded.info,
            context=bench.context,
            limit=limit,
            length=bench.documents[0],
            best=best,
            others=tuple(each for each in tested if each is not nearest),
            compared=dict(sorted(self.compared.items())),
            weights=bench.weights,
            activations=bench.activations,
            cache=bench.cache_bytes(best.plan),
        )

    def _first_passing(self, start: int) -> int:
        """Return the index of the smallest plan that may be safe; while another process compares one, take another."""
        answers: dict[int, bool] = {}

        def compare(index: int) -> None:
            answers[index] = self._may_be_safe(index)

        while asked := list(islice(questions(len(self.plans), start, answers), AHEAD)):
            first_free([partial(compare, index) for index in asked])
        return smallest_passing(len(self.plans), start, answers.__getitem__)

    def _may_be_safe(self, index: int) -> bool:
        """Measure a plan on the first documents, and return whether its KL is within the limit."""
        plan, purpose = self.plans[index], self.bench.purpose
        few = min(FIRST_DOCUMENTS, purpose.limit or FIRST_DOCUMENTS)
        report = self._report(make_task(DIVERGENCE), plan, few, self.bench.documents[0])
        row = report.plans[0]
        if row.error is not None:
            raise _failure(row.error)
        if (kl := row.value("kl")) is not None:
            self.compared[plan.bits.stored] = kl
        return is_within(row, purpose.loss)

    def _report(self, task: Task, plan: Plan, limit: int | None, length: int) -> Report:
        """Return the report on a plan; the plan is in its file by then."""
        path = self.made.save(plan, self.command)
        return self.bench.measure(task, path.stem, Plan.load(path), limit, length)

    def _prove(self, plan: Plan) -> MeasuredPlan:
        """Measure a plan with one task after the other, up to the first that it does not pass."""
        names = (DIVERGENCE, *self.bench.purpose.other_tasks)
        done: dict[str, MeasuredTask | Judgement] = {}

        def measure(name: str) -> None:
            try:
                done[name] = self._measured(name, plan, self._length(name))
            except (TextError, EvaluationError) as error:
                done[name] = Judgement(name, name, None, "not measured", error=str(error))

        measured: list[MeasuredTask] = []
        unmeasured: list[Judgement] = []
        for number, name in enumerate(names):
            while name not in done:  # a later task first, while another process is at this one
                first_free([partial(measure, each) for each in names[number:] if each not in done])
            found = done[name]
            if isinstance(found, Judgement):
                unmeasured.append(found)
                continue
            measured.append(found)
            if found.judgement is not None and (found.judgement.passed is False or found.judgement.may_pass):
                break
        return self._tested(plan, measured, unmeasured)

    def _tested(
        self, plan: Plan, measured: Sequence[MeasuredTask], unmeasured: Sequence[Judgement] = ()
    ) -> MeasuredPlan:
        path = self.made.save(plan, self.command)
        judgements = [*(each.judgement for each in measured if each.judgement is not None), *unmeasured]
        return MeasuredPlan(plan, path, tuple(measured), tuple(unmeasured), *outcome(judgements, self.bench.context))

    def _length(self, name: str) -> int:
        return self.bench.documents[0] if name == DIVERGENCE else self.bench.context

    def _measured(self, name: str, plan: Plan, length: int) -> MeasuredTask:
        task = make_task(name)
        report = self._report(task, plan, self.bench.purpose.limit, length)
        return MeasuredTask(task, report, self._judged(task, report.plans[0], report.reference))

    def _judged(self, task: Task, row: Row, reference: Row) -> Judgement | None:
        """Return what a row says about its plan; None for a task that is not about quality."""
        if task.name == DIVERGENCE:
            return judge_divergence(row, self.bench.purpose.loss, *self.bench.documents)
        if is_about_values(row):
            return judge_values(row, reference)
        metric = judged_metric(row, reference, task.metrics)
        if metric is None and row.error is None:
            return None
        return judge_number(row, reference, metric or task.metrics[0])

    def _at_its_context(self, tested: MeasuredPlan) -> MeasuredPlan:
        """Measure the other tasks at the shorter context up to which a plan's KL is within the limit."""
        if tested.outcome != "safe-up-to" or tested.safe_context is None:
            return tested
        kept = [each for each in tested.measured if each.task.name == DIVERGENCE]
        names, context = self.bench.purpose.other_tasks, tested.safe_context
        others = take_turns([partial(self._measured, name, tested.plan, context) for name in names])
        return self._tested(tested.plan, [*kept, *others])


def _failure(error: str) -> KvmixError:
    """Return what it means that KL could not be measured: no memory, or a plan that the model cannot run with."""
    if "out of memory" in error:
        return EvaluationError(error.replace("--length", "--context"))
    return PlanError(error)


def _rank(tested: MeasuredPlan) -> tuple[int, int, float]:
    """Return what tested plans are sorted by, the best first; of equally good ones the smallest comes first."""
    is_proven = tested.outcome == "safe"
    return ORDER.index(tested.outcome), -(tested.safe_context or 0), 0.0 if is_proven else tested.divergence
