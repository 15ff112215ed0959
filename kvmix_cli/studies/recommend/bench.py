"""A model, and everything that is the same for all plans that are measured for one recommendation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...allocation import Budget
from ...errors import BudgetError, EvaluationError, ModelError, TextError
from ...plan import Plan
from ...plan.sizes import format_bytes
from ..fit.answer import usual_context
from ..fit.facts import ModelFacts, read_facts
from ..fit.formats import PlanFormat
from .judge import FEWEST

if TYPE_CHECKING:
    from ...evaluation.base import Settings, Task
    from ...evaluation.results import Report
    from ...evaluation.runner import Progress
    from ...evaluation.runs import RunFolders
    from ...models.loading import LoadedModel

PREFIX = 256
"""Tokens of a document that are prefilled before anything is scored; a quarter of it at most."""
DEPTHS = 5
"""Places in a context at which values are stated."""
DIVERGENCE, RECALL = "perplexity", "recall"
"""The task that measures KL, and the one that asks for values."""
ROUND = 1024


@dataclass(frozen=True)
class Purpose:
    """The use that a plan is recommended for, and the work that proves it.

    Attributes:
        context: tokens; None for `usual_context`.
        max_loss: share of the perplexity that may be lost at most, as in `allocation.Budget`.
        memory: bytes for weights, activations and cache together; None for no limit.
        tasks: names of evaluation tasks; `DIVERGENCE` is measured in any case.
        text, calibration: sources of the text to measure on, and to profile on.
        limit: most samples of a task; None for its own.
        step: tokens fed at a time.
        revision, dtype, trust_remote_code: as the model is loaded.
    """

    model: str
    context: int | None = None
    max_loss: float = 0.01
    memory: int | None = None
    tasks: tuple[str, ...] = (DIVERGENCE, RECALL)
    text: str = "builtin"
    calibration: str = "builtin"
    limit: int | None = None
    step: int = 32
    seed: int = 0
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise BudgetError for a loss that is no share, EvaluationError for a number below 1."""
        Budget(max_loss=self.max_loss)
        for name in ("context", "limit", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"--{name} must be at least 1, got {value}")

    @property
    def loss(self) -> float:
        """Return the largest KL in nats a token: `ln(1 + max_loss)`."""
        loss = Budget(max_loss=self.max_loss).loss
        assert loss is not None
        return loss

    @property
    def other_tasks(self) -> list[str]:
        """Return the tasks beside that of KL, which is measured first."""
        return [name for name in dict.fromkeys(self.tasks) if name != DIVERGENCE]


def make_task(name: str) -> Task:
    """Return a task by name; values of recall stand at a few depths. Raises EvaluationError."""
    from ...evaluation import get_task

    return get_task(name, {"depths": DEPTHS} if name == RECALL else {})


def read_purpose(purpose: Purpose) -> tuple[ModelFacts, int]:
    """Check a purpose, and return the facts of its model, which need no weights, and the context in tokens.

    Raises:
        BudgetError, EvaluationError: for options out of their range.
        ModelError: for a context beyond the model's limit, or weights that are larger than the memory.
    """
    purpose.check()
    facts = read_facts(purpose.model, purpose.revision, trust_remote_code=purpose.trust_remote_code)
    context = usual_context(facts, purpose.context)
    check_memory(purpose, facts.weights.at(None if purpose.dtype == "auto" else purpose.dtype))
    return facts, context


def check_memory(purpose: Purpose, weights: int) -> None:
    """Raise ModelError if weights of so many bytes alone are more than the memory."""
    memory = purpose.memory
    if memory is not None and weights > memory:
        raise ModelError(
            f"{purpose.model} needs {format_bytes(weights)} for its weights alone, and --memory is "
            f"{format_bytes(memory)}: give more, or take a smaller model or --dtype"
        )


@dataclass(frozen=True)
class ModelBench:
    """A model, and what plans are measured with.

    Attributes:
        facts: what its memory depends on.
        context: tokens at which a plan is to be safe.
        runs: folders that records are kept in and resumed from; None keeps none.
    """

    purpose: Purpose
    facts: ModelFacts
    loaded: LoadedModel
    context: int
    runs: RunFolders | None
    progress: Progress

    @property
    def weights(self) -> int:
        """Return the bytes of the weights, in the dtype that they were loaded in."""
        return self.facts.weights.at(self.loaded.dtype)

    def check_text(self) -> None:
        """Raise TextError if there is no text to measure on."""
        if not self.documents[0]:
            raise TextError(f"{self.purpose.text} has no text; give a longer --text")

    @cached_property
    def documents(self) -> tuple[int, int]:
        """Return the tokens of the documents to measure on, and the tokens that are missing for longer ones.

        Raises TextError if there is no text.
        """
        from ...texts import load_texts
        from ...texts.tokens import encode

        lengths: list[int] = []
        for text in sorted(load_texts(self.purpose.text, held_out=True, seed=self.purpose.seed), key=len, reverse=True):
            lengths.append(len(encode(self.loaded.tokenizer, text)))
            if sum(tokens // self.context for tokens in lengths) >= FEWEST:
                break
        return usable_length(lengths, self.context)

    def cache_bytes(self, plan: Plan) -> int:
        """Return the bytes of the cache at the context, with layers that are not planned."""
        return self._format(plan).cache_bytes(self.context, 1)

    @cached_property
    def activations(self) -> int:
        """Return the bytes that a prompt of the context takes beside weights and cache, an estimate."""
        size = self.loaded.model.dtype.itemsize
        return self.facts.activations.peak(self.context, 1, size, self.context)

    def _format(self, plan: Plan) -> PlanFormat:
        return PlanFormat("", self.facts, self.loaded.model.dtype.itemsize, None, plan=plan)

    def affordable(self, plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans whose cache fits the memory beside weights and activations.

        Raises:
            BudgetError: if none does.
        """
        memory = self.purpose.memory
        room = math.inf if memory is None else memory - self.weights - self.activations
        found = [plan for plan in plans if self.cache_bytes(plan) <= room]
        if not found and memory is not None:
            least = min(map(self.cache_bytes, plans))
            raise BudgetError(
                f"no plan fits {format_bytes(memory)}: weights take {format_bytes(self.weights)}, a prompt of "
                f"{self.context} tokens {format_bytes(self.activations)} and the smallest cache {format_bytes(least)}; "
                "give more --memory or a smaller --context"
            )
        return found

    def measure(self, task: Task, name: str, plan: Plan, limit: int | None, length: int) -> Report:
        """Return the report on a plan and the unquantized cache.

        Args:
            name: of the plan, in names of run folders.
            limit: most samples; None for the task's own.
            length: tokens of a sample.

        Raises:
            KvmixError: if there is nothing to measure on, or a run folder cannot be used.
        """
        from ...cache.subject import Subject
        from ...evaluation.runner import run_task

        settings = self.settings(limit, length)
        return run_task(task, self.loaded, [Subject(name, plan)], settings, self.runs, self.progress)

    def settings(self, limit: int | None, length: int) -> Settings:
        """Return the settings of a measurement with samples of so many tokens."""
        from ...evaluation.base import Settings

        return Settings(length, prefix(length), self.purpose.step, limit, self.purpose.text, self.purpose.seed)


def prefix(length: int) -> int:
    """Return the tokens of a document that are prefilled."""
    return max(1, min(PREFIX, length // 4))


def prepare(
    purpose: Purpose, load: Callable[[], LoadedModel], runs: RunFolders | None, progress: Progress | None = None
) -> ModelBench:
    """Check a purpose, load the model, and return what plans are measured with.

    Raises:
        KvmixError: if it makes no sense for the model, or there is no such task.
    """
    facts, context = read_purpose(purpose)
    from ...evaluation import get_tasks
    from ...evaluation.runner import no_progress

    get_tasks([DIVERGENCE, *purpose.other_tasks], {})
    bench = ModelBench(purpose, facts, load(), context, runs, progress or no_progress)
    check_memory(purpose, bench.weights)
    bench.check_text()
    return bench


def usable_length(lengths: Sequence[int], context: int) -> tuple[int, int]:
    """Return the tokens of documents that a text has enough of, at most a context, and the tokens that are missing.

    A long document counts as several. Where a text has not even `FEWEST` short ones, its longest one is used.

    Args:
        lengths: tokens of each document.
        context: tokens that are wanted of each.
    """

    def count(length: int) -> int:
        return sum(tokens // length for tokens in lengths)

    have = count(context)
    if have >= FEWEST:
        return context, 0
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) >= FEWEST else (low, middle)
    rounded = low - low % ROUND if low >= ROUND else low
    return rounded or min(context, max(lengths)), (FEWEST - have) * context
