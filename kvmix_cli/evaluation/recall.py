"""Recall: values that were assigned far back must be read out of the cache again.

    depth_stone = 4821
    ... hundreds of tokens of other text ...
    assert depth_stone == 4821

Perplexity is mostly local; this is not. The values are random, so only the cache can know them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..errors import EvaluationError, TextError
from ..losses import feed, prefill
from ..texts import load_texts
from .base import Estimate, Metric, Record, Sample, Settings, Subject, Task
from .bootstrap import ratio
from .feeding import attended, encode, opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models import LoadedModel

VALUES = 6
POOL = 64
"""Filler is cut from this many times the length of an exercise."""
WORDS = (
    "alpha beta gamma delta width height depth port host limit cache batch token layer head value query score bit "
    "group scale zero page block chunk window rank seed step rate size count index offset level mode state phase "
    "point line angle radius mass speed time date year month price cost tax total share name code path root leaf "
    "node edge graph tree list table row column cell key lock door room floor wall roof stone river lake hill star "
    "moon sun cloud rain snow wind fire ice sand salt iron gold lead zinc"
)


@dataclass(frozen=True)
class Question:
    """One value to be read back.

    Attributes:
        answer: where its tokens are in the exercise's script.
        distance: tokens between the value's first token where it was assigned and where it is asked for.
    """

    name: str
    value: str
    answer: slice
    distance: int


@dataclass(frozen=True)
class Exercise(Sample):
    """`ids` is the context, with the assignments in its first half; `script` asks for every value once.

    A value's tokens are the same ids in both places, whatever the tokenizer does at the seams.
    """

    script: tuple[int, ...]
    questions: tuple[Question, ...]


class Recall(Task):
    """The context enters the cache and is quantized; then the questions are teacher-forced through it.

    A value counts as recalled if each of its tokens has the highest logit, which is what greedy decoding would need.
    """

    name = "recall"
    metrics = (Metric("recall", higher_is_better=True), Metric("recalled", higher_is_better=True, unit="values"))
    default_limit = 10

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Exercise]:
        pool = _filler(loaded, settings)
        return [
            exercise(loaded.tokenizer, pool, settings.length, f"{settings.seed}/{number}")
            for number in range(self.limit(settings))
        ]

    @torch.inference_mode()
    def measure(self, loaded: LoadedModel, subject: Subject, sample: Exercise, settings: Settings) -> Record:
        """Which values of an exercise were recalled, and from how far back."""
        cache = subject.cache(loaded, reserve=len(sample.ids) + len(sample.script))
        prefill(loaded, cache, sample.ids)
        greedy = [sample.ids[-1]]  # a place holder: nothing is asked of the script's first token
        for _, logits in feed(loaded, cache, sample.script[:-1], settings.step):
            greedy += logits.argmax(-1).tolist()
        answers = [
            {
                "name": question.name,
                "value": question.value,
                "distance": question.distance,
                "recalled": tuple(greedy[question.answer]) == sample.script[question.answer],
            }
            for question in sample.questions
        ]
        recalled = sum(bool(answer["recalled"]) for answer in answers)
        tokens = sum(question.answer.stop - question.answer.start for question in sample.questions)
        return {
            "tokens": tokens,
            "values": len(answers),
            "recalled": recalled,
            "answers": answers,
            "attended": attended(cache),
        }

    def summarise(
        self, records: Sequence[Record], reference: Sequence[Record] | None, seed: int
    ) -> dict[str, Estimate]:
        values = [record["values"] for record in records]
        share = ratio([record["recalled"] for record in records], values, seed)
        return {"recall": share, "recalled": share.map(lambda part: part * sum(values))}

    def describe(self, samples: Sequence[Exercise], settings: Settings) -> str:
        distances = [question.distance for sample in samples for question in sample.questions]
        return (
            f"{len(distances)} values in {len(samples)} exercises of {settings.length} tokens of {settings.text} text, "
            f"each assigned {min(distances)} to {max(distances)} tokens before it is asked for"
        )


def exercise(tokenizer: PreTrainedTokenizerBase, pool: Sequence[int], length: int, seed: str) -> Exercise:
    """An exercise of exactly `length` tokens, context and script together.

    Raises:
        EvaluationError: if less than half of it would be filler.
    """
    rng = random.Random(seed)
    facts = _facts(tokenizer, rng)
    asked = rng.sample(facts, len(facts))
    script = [token for fact in asked for token in (*fact.ask, *fact.value, *fact.end)]
    first = opening(tokenizer)
    stated = sum(len(fact.assign) + len(fact.value) + len(fact.end) for fact in facts)
    room = length - len(first) - stated - len(script)
    if room < length // 2:
        raise EvaluationError(
            f"--length {length} is too short for recall: {VALUES} values take {length - room} tokens of it; "
            f"use at least {2 * (length - room)}"
        )
    context, at = _scatter(facts, pool, room, rng)
    context = first + context
    questions = []
    answer = 0
    for fact in asked:
        answer += len(fact.ask)
        distance = len(context) + answer - len(first) - at[fact.name]
        where = slice(answer, answer + len(fact.value))
        questions.append(Question(fact.name, fact.digits, where, distance))
        answer = where.stop + len(fact.end)
    return Exercise(f"exercise {seed}", tuple(context), tuple(script), tuple(questions))


@dataclass(frozen=True)
class _Fact:
    """A name and its value, in text and in the pieces of tokens that lines are made of."""

    name: str
    digits: str
    assign: list[int]
    ask: list[int]
    value: list[int]
    end: list[int]


def _facts(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[_Fact]:
    words = WORDS.split()
    names = rng.sample([f"{first}_{second}" for first in words for second in words if first != second], VALUES)
    facts = []
    for name in names:
        digits = f"{rng.randrange(10_000):04}"
        pieces = (f"\n{name} =", f"\nassert {name} ==", f" {digits}", "\n")
        facts.append(_Fact(name, digits, *(encode(tokenizer, piece) for piece in pieces)))
    return facts


def _scatter(
    facts: Sequence[_Fact], pool: Sequence[int], room: int, rng: random.Random
) -> tuple[list[int], dict[str, int]]:
    """Assignments in the first half of `room` tokens of filler; also where each value begins."""
    context: list[int] = []
    at: dict[str, int] = {}
    cuts = sorted(rng.randint(0, room // 2) for _ in facts)
    for fact, (last, cut) in zip(facts, pairwise([0, *cuts]), strict=True):
        context += _cut(pool, cut - last, rng) + fact.assign
        at[fact.name] = len(context)
        context += fact.value + fact.end
    return context + _cut(pool, room - cuts[-1], rng), at


def _filler(loaded: LoadedModel, settings: Settings) -> list[int]:
    """Tokens of the text, in a seeded order of its documents. Raises TextError if they do not fill an exercise."""
    texts = load_texts(settings.text, held_out=True, seed=settings.seed)
    order = list(range(len(texts)))
    random.Random(settings.seed).shuffle(order)
    pool: list[int] = []
    for index in order:
        pool += encode(loaded.tokenizer, texts[index])
        if len(pool) >= POOL * settings.length:
            break
    if len(pool) < settings.length:
        raise TextError(
            f"{settings.text}: {len(pool)} tokens of text in all do not fill an exercise of {settings.length}; "
            "give more with --text or a smaller --length"
        )
    return pool


def _cut(pool: Sequence[int], count: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, len(pool) - count)
    return list(pool[start : start + count])
