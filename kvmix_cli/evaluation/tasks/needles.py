"""The base of `recall`, `passkey` and their kin: values stated in a context must be read out of the cache again.

The tasks differ in the text of a context.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...cache.subject import Subject, attended
from ...counting import counted
from ...decoding.feed import feed, prefill
from ...errors import EvaluationError, TextError
from ...texts import load_texts
from ...texts.tokens import encode
from ..base import Context, Sample, Settings, Task
from ..bootstrap import proportion
from ..records import RecalledValue, RecallRecord
from ..results import Estimate
from .facts import Fact, Question, ask_for

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

POOL = 64
"""Filler is cut from this many times the length of an exercise."""
DEPTHS = 10
TRIES = 3
"""Exercises at each place, where there is a single value in each."""


@dataclass(frozen=True)
class Exercise(Sample):
    """`ids` is the context, in which values are stated; `script` asks for some of them, and has the answers.

    A value's tokens are the same ids in both places, whatever the tokenizer does at the seams.
    """

    script: tuple[int, ...]
    questions: tuple[Question, ...]


Writer = Callable[[int, int, str], Exercise]
"""Writes an exercise. Arguments: its tokens (context and script), its number among those of this length, its seed."""


class TooShort(EvaluationError):
    """An exercise that does not fit its length; `least` is the length that it needs."""

    def __init__(self, task: str, length: int, least: int, reason: str) -> None:
        self.least = least
        super().__init__(f"{length} tokens are too short for {task}: {reason}; use at least {least}")


@dataclass(frozen=True)
class Needles(Task[Exercise, RecallRecord]):
    """The context enters the cache and is quantized; then the questions are teacher-forced through it.

    A value counts as recalled if each of its tokens has the highest logit, which is what greedy decoding would need.

    Attributes:
        contexts: lengths of exercises, in tokens; None for that of the settings alone.
        depths: evenly spaced places, from the beginning of a context to its end; None is the task's default.
    """

    contexts: tuple[int, ...] | None = None
    depths: int | None = None

    default_limit = TRIES * DEPTHS

    @property
    def exercises(self) -> int:
        """Return the exercises of each length that are measured without `--limit`."""
        return TRIES * len(self.places())

    @abstractmethod
    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        """Return the function that writes exercises. Raises KvmixError; the writer raises TooShort."""

    def limit(self, settings: Settings) -> int:
        return self.exercises * len(self.lengths(settings)) if settings.limit is None else settings.limit

    def lengths(self, settings: Settings) -> tuple[int, ...]:
        """Return the lengths of exercises, ascending."""
        return tuple(sorted(set(self.contexts or (settings.length,))))

    def context(self, settings: Settings) -> Context:
        return Context("--contexts" if self.contexts else "--length", self.lengths(settings)[-1])

    def check_context(self, settings: Settings, limit: int | None) -> None:
        """Raise EvaluationError for a length beyond the model's limit; of several, if all of them are."""
        shortest = self.lengths(settings)[0]
        if limit is not None and shortest > limit:
            option = self.context(settings).option
            raise EvaluationError(f"{option} {shortest} is more than the model's limit of {limit} tokens")

    def places(self) -> list[float]:
        """Return the depths, 0 to 1."""
        count = DEPTHS if self.depths is None else self.depths
        return [0.5] if count == 1 else [number / (count - 1) for number in range(count)]

    def place(self, turn: int, seed: int) -> float:
        """Return the depth for a turn: all depths once, in a random order, then all of them in another order."""
        again, number = divmod(turn, len(self.places()))
        order = self.places()
        random.Random(f"{seed}/{again}").shuffle(order)
        return order[number]

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Exercise]:
        lengths = list(self.lengths(settings))
        if lengths[0] < 1 or (self.depths is not None and self.depths < 1):
            raise EvaluationError("--contexts and --depths must be at least 1")
        self.check_context(settings, loaded.max_length)
        lengths = [each for each in lengths if loaded.max_length is None or each <= loaded.max_length]
        write = self.writer(loaded, settings, lengths[-1])
        written: list[Exercise] = []
        failures: list[TooShort] = []
        for number in range(self.exercises * len(lengths) if settings.limit is None else settings.limit):
            turn, which = divmod(number, len(lengths))
            try:
                written.append(write(lengths[which], turn, f"{settings.seed}/{number}"))
            except TooShort as failure:
                failures.append(failure)
        if failures:
            raise max(failures, key=lambda failure: failure.least)
        return written

    @torch.inference_mode()
    def measure(self, loaded: LoadedModel, subject: Subject, sample: Exercise, settings: Settings) -> RecallRecord:
        """Return the values of an exercise, each with its place and its distance, and whether it was recalled."""
        length = len(sample.ids) + len(sample.script)
        cache = subject.cache(loaded.config, reserve=length)
        prefill(loaded, cache, sample.ids)
        greedy = [sample.ids[-1]]  # a place holder: nothing is asked of the script's first token
        for _, logits in feed(loaded, cache, sample.script[:-1], settings.step):
            greedy += logits.argmax(-1).tolist()
        answers: list[RecalledValue] = [
            {
                "name": question.name,
                "value": question.value,
                "depth": question.depth,
                "distance": question.distance,
                "recalled": tuple(greedy[question.answer]) == sample.script[question.answer],
            }
            for question in sample.questions
        ]
        return {
            "tokens": sum(question.answer.stop - question.answer.start for question in sample.questions),
            "context": length,
            "values": len(answers),
            "recalled": sum(bool(answer["recalled"]) for answer in answers),
            "answers": answers,
            "attended": attended(cache),
        }

    def summarise(
        self, records: Sequence[RecallRecord], reference: Sequence[RecallRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        return {self.name: share(records, seed)}

    def describe(self, samples: Sequence[Exercise], settings: Settings) -> str:
        distances = [question.distance for sample in samples for question in sample.questions]
        *others, last = map(str, _lengths(samples))
        lengths = f"{', '.join(others)} and {last}" if others else last
        return (
            f"{counted(len(distances), 'value')} in {counted(len(samples), 'exercise')} of {lengths} tokens of "
            f"{self.content(settings)}, "
            f"each assigned {min(distances)} to {max(distances)} tokens before it is asked for"
        )

    def content(self, settings: Settings) -> str:
        """Return a description of the text in contexts."""
        return f"{settings.text} text"

    def notices(self, samples: Sequence[Exercise], settings: Settings) -> tuple[str, ...]:
        """Return the lengths that were asked for and not measured, with the reason."""
        wanted = self.lengths(settings)
        if not (left_out := sorted(set(wanted) - set(_lengths(samples)))):
            return ()
        limit = settings.limit
        few = limit is not None and limit < len(wanted)
        reason = f"--limit {limit} is fewer than the lengths" if few else "they are beyond the model's limit"
        return (f"{self.name}: left out {', '.join(map(str, left_out))} tokens: {reason}",)


def _lengths(samples: Sequence[Exercise]) -> list[int]:
    """Return the lengths of exercises, ascending."""
    return sorted({len(sample.ids) + len(sample.script) for sample in samples})


def alike(
    task: str,
    facts: Iterator[Fact],
    head: Sequence[int],
    blank: int,
    *,
    length: int,
    least: int,
    depths: Sequence[float],
    seed: str,
) -> Exercise:
    """Return an exercise of exactly `length` tokens whose context is nothing but facts that look alike.

    Args:
        facts: as many different ones as fill the context; those that are asked for come first.
        head: tokens before anything else.
        blank: token that fills up the places for which no fact is short enough.
        least: facts that there must be.
        depths: of each fact that is asked for, the share of the others that stand before it.
        seed: of the exercise, which is its name.

    Raises:
        TooShort: if there is no room for so many facts.
    """
    asked = [next(facts) for _ in depths]
    room = length - len(head) - sum(fact.stated + fact.asked for fact in asked)
    others: list[Fact] = []
    for fact in facts:
        if fact.stated > room and len(others) + len(asked) >= least:
            break
        others.append(fact)
        room -= fact.stated
    if room < 0:
        count = f"{len(others) + len(asked)} {'line' if task == 'kv_retrieval' else 'function'}s"
        raise TooShort(task, length, length - room, f"{count} and the question take {length - room}")
    context, at, done = [*head, *[blank] * room], dict[str, tuple[int, float]](), 0
    for depth, fact in sorted(zip(depths, asked, strict=True), key=lambda pair: pair[0]):
        spot = round(depth * len(others))
        context += [token for other in others[done:spot] for token in other.statement] + fact.assign
        at[fact.name], done = (len(context), depth), spot
        context += fact.value + fact.end
    context += [token for other in others[done:] for token in other.statement]
    script, questions = ask_for(asked, context, at)
    return Exercise(f"exercise {seed}", tuple(context), script, questions)


def share(records: Sequence[RecallRecord], seed: int) -> Estimate:
    """Return the share of values that were recalled; exercises are drawn for the interval."""
    return proportion([record["recalled"] for record in records], [record["values"] for record in records], seed)


def filler(loaded: LoadedModel, settings: Settings, length: int) -> list[int]:
    """Return tokens of the text, its documents in a seeded order. Raises TextError if they do not fill an exercise."""
    texts = load_texts(settings.text, held_out=True, seed=settings.seed)
    order = list(range(len(texts)))
    random.Random(settings.seed).shuffle(order)
    pool: list[int] = []
    for index in order:
        pool += encode(loaded.tokenizer, texts[index])
        if len(pool) >= POOL * length:
            break
    if len(pool) < length:
        raise TextError(
            f"{settings.text}: {len(pool)} tokens of text in all do not fill an exercise of {length}; "
            "give more with --text or a smaller --length"
        )
    return pool


def stretch(pool: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Return `count` neighbouring tokens from a random place in the pool."""
    start = rng.randint(0, len(pool) - count)
    return list(pool[start : start + count])
