"""Facts: names with random numbers, or other answers, and the text that states them and asks for them.

A model with a chat template gets sentences, in a turn of the chat. Any other model, such as a base model or
`builtin:tiny`, gets code to continue: an assignment, and later an assertion of the same name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING

from ...errors import EvaluationError, TextError
from ...texts.chat import chat_turn
from ...texts.tokens import encode, opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBERS = 10_000
"""Values have four digits: one guess in so many is right."""
WORDS = (
    "alpha beta gamma delta width height depth port host limit cache batch token layer head value query score bit "
    "group scale zero page block chunk window rank seed step rate size count index offset level mode state phase "
    "point line angle radius mass speed time date year month price cost tax total share name code path root leaf "
    "node edge graph tree list table row column cell key lock door room floor wall roof stone river lake hill star "
    "moon sun cloud rain snow wind fire ice sand salt iron gold lead zinc"
)
"""A name is two of these; three where there are not enough pairs."""
INTRODUCTION = "Below, a number is given for a name. Read it; at the end you will be asked for it.\n\n"


@dataclass(frozen=True)
class Fact:
    """A name and what is asked about it as text, and the pieces of tokens of a statement and a question.

    Attributes:
        end: tokens after a statement.
        closing: tokens after the answer to a question; None for those after a statement.
    """

    name: str
    answer: str
    assign: list[int]
    ask: list[int]
    value: list[int]
    end: list[int]
    closing: list[int] | None = None

    @property
    def statement(self) -> list[int]:
        """Return the tokens of its statement."""
        return [*self.assign, *self.value, *self.end]

    @cached_property
    def stated(self) -> int:
        """Return the number of tokens of its statement."""
        return len(self.assign) + len(self.value) + len(self.end)

    @cached_property
    def asked(self) -> int:
        """Return the number of tokens of the question and its answer."""
        return len(self.ask) + len(self.value) + len(self.ending)

    @property
    def ending(self) -> list[int]:
        """Return the tokens after the answer to a question."""
        return self.end if self.closing is None else self.closing


@dataclass(frozen=True)
class Question:
    """One value to be read back.

    Attributes:
        answer: place of its tokens in the exercise's script.
        distance: tokens from the value's first token in the statement to that in the answer.
        depth: share of the text before the statement, 0 to 1.
    """

    name: str
    value: str
    answer: slice
    distance: int
    depth: float


@dataclass(frozen=True)
class Phrasing:
    """The wording of facts for a model.

    Attributes:
        head: tokens before anything else.
        statement: text that states a name's number, up to the number.
        question: text that asks for a name's number, up to the number.
        end: text after a number.
        same: text that stands for a number, and says that it is that of another name.
    """

    tokenizer: PreTrainedTokenizerBase
    head: tuple[int, ...]
    statement: Callable[[str], str]
    question: Callable[[str], str]
    end: str
    same: Callable[[str], str]

    def facts(self, rng: random.Random, count: int) -> Iterator[Fact]:
        """Yield `count` facts with different names; each is encoded when it is reached."""
        for name in _names(rng, count):
            digits = f"{rng.randrange(NUMBERS):04}"
            pieces = (self.statement(name), self.question(name), f" {digits}", self.end)
            yield Fact(name, digits, *(encode(self.tokenizer, piece) for piece in pieces))

    @cached_property
    def blank(self) -> int:
        """Return a token that fills a place and means nothing."""
        return encode(self.tokenizer, "\n")[-1]


def as_code(tokenizer: PreTrainedTokenizerBase) -> Phrasing:
    """Return the wording of code, for a model that continues a text: assignments and assertions."""
    head = tuple(opening(tokenizer))
    return Phrasing(
        tokenizer, head, lambda name: f"\n{name} =", lambda name: f"\nassert {name} ==", "\n", lambda name: f" {name}"
    )


def as_chat_or_code(tokenizer: PreTrainedTokenizerBase) -> Phrasing:
    """Return the wording of a chat if the tokenizer has a template, otherwise that of code.

    The answer is begun for the model ("The number of x is"), so that only the number is left: a model that reasons
    before it answers gets the same question as any other.

    Raises:
        EvaluationError: if the template cannot be used.
    """
    if not tokenizer.chat_template:
        return as_code(tokenizer)
    try:
        before, after = chat_turn(tokenizer, "the model")
    except TextError as error:
        raise EvaluationError(f"{error}; or use --task recall") from error
    head = tuple(encode(tokenizer, before + INTRODUCTION))

    def statement(name: str) -> str:
        return f"\nThe number of {name} is"

    def question(name: str) -> str:
        return f"\n\nWhat is the number of {name}? Say nothing but the number.{after}The number of {name} is"

    return Phrasing(tokenizer, head, statement, question, ".\n", lambda name: f" that of {name}")


def ask_for(
    facts: Sequence[Fact], context: Sequence[int], at: Mapping[str, tuple[int, float]]
) -> tuple[tuple[int, ...], tuple[Question, ...]]:
    """Return the script that asks for facts one after the other, and the questions with the places of their answers.

    Args:
        at: for each name, the token of the context at which its value begins, and the depth of its statement.
    """
    script: list[int] = []
    questions = []
    for fact in facts:
        script += fact.ask
        place, depth = at[fact.name]
        answer = slice(len(script), len(script) + len(fact.value))
        distance = len(context) + answer.start - place
        questions.append(Question(fact.name, fact.answer, answer, distance, depth))
        script += fact.value + fact.ending
    return tuple(script), tuple(questions)


def _names(rng: random.Random, count: int) -> list[str]:
    words = WORDS.split()
    names = ["_".join(pair) for pair in permutations(words, 2)]
    if count > len(names):
        names = ["_".join(three) for three in permutations(words, 3)]
    return rng.sample(names, min(count, len(names)))
