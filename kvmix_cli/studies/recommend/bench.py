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
from .judge import FEWEST

if TYPE_CHECKING:
    from ...evaluation.base import Settings, Task
    from ...evaluation.results import Report
    from ...evaluation.runner import Progress
    from ...evaluation.runs import RunFolders
    from ...models.loading import LoadedModel

CONTEXT = 32768
"""Tokens, for a model that takes as many or more."""
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
        context: tokens; None for the model's limit, at most `CONTEXT`.
        max_loss: share of the perplexity that may be lost at most, as in `allocation.Budget`.
        memory: bytes for weights and cache together; None for no limit.
        tasks: names of evaluation tasks; `DIVERGENCE` is measured in any case.
        text, calibration: sources of the text to measure on, and to profile on.
        limit: most samples of a task; None for its own.
        step: tokens fed at a time.
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


def context_of(purpose: Purpose, limit: int | None) -> int:
    """Return the context in tokens. Raises EvaluationError if it is beyond the model's limit."""
    context = purpose.context or min(CONTEXT, limit or CONTEXT)
    if limit is not None and context > limit:
        raise EvaluationError(f"--context {context} is more than the limit of {purpose.model}, {limit} tokens")
    return context


def weight_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of a model's weights, each counted once."""
    weights = {tensor.data_ptr(): tensor for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


@dataclass(frozen=True)
class ModelBench:
    """A model, and what plans are measured with.

    Attributes:
        context: tokens at which a plan is to be safe.
        runs: folders that records are kept in and resumed from; None keeps none.
    """

    purpose: Purpose
    loaded: LoadedModel
    context: int
    runs: RunFolders | None
    progress: Progress

    @cached_property
    def weights(self) -> int:
        """Return the bytes of the weights."""
        return weight_bytes(self.loaded)

    def check_memory(self) -> None:
        """Raise ModelError if the weights alone are more than the memory."""
        memory = self.purpose.memory
        if memory is not None and self.weights > memory:
            raise ModelError(
                f"{self.purpose.model} needs {format_bytes(self.weights)} for its weights alone, and --memory is "
                f"{format_bytes(memory)}: give more, or take a smaller model or --dtype"
            )

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
        """Return the bytes of a plan's cache at the context."""
        return plan.cache_bytes(self.context, element_bytes=self.loaded.model.dtype.itemsize).total

    def affordable(self, plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans whose cache fits the memory beside the weights. Raises BudgetError if none does."""
        memory = self.purpose.memory
        room = math.inf if memory is None else memory - self.weights
        found = [plan for plan in plans if self.cache_bytes(plan) <= room]
        if not found and memory is not None:
            least = min(map(self.cache_bytes, plans))
            raise BudgetError(
                f"no plan fits {format_bytes(memory)}: the weights take {format_bytes(self.weights)} and the smallest "
                f"cache at {self.context} tokens {format_bytes(least)}; give more --memory or a smaller --context"
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
    from ...evaluation import get_tasks
    from ...evaluation.runner import no_progress

    purpose.check()
    get_tasks([DIVERGENCE, *purpose.other_tasks], {})
    loaded = load()
    bench = ModelBench(purpose, loaded, context_of(purpose, loaded.max_length), runs, progress or no_progress)
    bench.check_memory()
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
