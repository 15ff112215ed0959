"""Facts that only the cache can know: names with random numbers, and the words that state them and ask for them.

A model with a chat template is told and asked in sentences, in a turn of its own. Any other model, such as a base model
or `builtin:tiny`, gets what text goes on from by itself: an assignment, and later an assertion of the same name.
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
"""Values are of four digits, so that one guess in so many is right."""
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
    """A name and its number, in text and in the pieces of tokens that a statement and a question are made of."""

    name: str
    digits: str
    assign: list[int]
    ask: list[int]
    value: list[int]
    end: list[int]

    @cached_property
    def stated(self) -> int:
        """Tokens of its statement."""
        return len(self.assign) + len(self.value) + len(self.end)

    @cached_property
    def asked(self) -> int:
        """Tokens of the question and its answer."""
        return len(self.ask) + len(self.value) + len(self.end)


@dataclass(frozen=True)
class Question:
    """One value to be read back.

    Attributes:
        answer: where its tokens are in the exercise's script.
        distance: tokens between the value's first token where it was stated and where it is asked for.
        depth: the part of the text that comes before the statement, 0 to 1.
    """

    name: str
    value: str
    answer: slice
    distance: int
    depth: float


@dataclass(frozen=True)
class Phrasing:
    """How facts are put to a model.

    Attributes:
        head: tokens before anything else.
        statement: of a name, up to its number.
        question: for a name, up to its number.
        end: after a number.
    """

    tokenizer: PreTrainedTokenizerBase
    head: tuple[int, ...]
    statement: Callable[[str], str]
    question: Callable[[str], str]
    end: str

    def facts(self, rng: random.Random, count: int) -> Iterator[Fact]:
        """So many facts with different names; each is put into tokens when it is reached."""
        for name in _names(rng, count):
            digits = f"{rng.randrange(NUMBERS):04}"
            pieces = (self.statement(name), self.question(name), f" {digits}", self.end)
            yield Fact(name, digits, *(encode(self.tokenizer, piece) for piece in pieces))

    @cached_property
    def blank(self) -> int:
        """A token that fills a place and says nothing."""
        return encode(self.tokenizer, "\n")[-1]


def as_code(tokenizer: PreTrainedTokenizerBase) -> Phrasing:
    """Assignments and assertions, for a model that just goes on with a text."""
    head = tuple(opening(tokenizer))
    return Phrasing(tokenizer, head, lambda name: f"\n{name} =", lambda name: f"\nassert {name} ==", "\n")


def as_suits(tokenizer: PreTrainedTokenizerBase) -> Phrasing:
    """Sentences in the turns of a chat if the tokenizer has a template for them, else code.

    The answer is begun for the model ("The number of x is"), so that nothing but the number remains to be said; a
    model that likes to think aloud first is asked the same thing as any other.

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

    return Phrasing(tokenizer, head, statement, question, ".\n")


def ask_for(
    facts: Sequence[Fact], context: Sequence[int], at: Mapping[str, tuple[int, float]]
) -> tuple[tuple[int, ...], tuple[Question, ...]]:
    """The script that asks for facts one after the other, and where in it the answers are.

    Args:
        at: for each name, where in the context its value begins, and the depth of its statement.
    """
    script: list[int] = []
    questions = []
    for fact in facts:
        script += fact.ask
        place, depth = at[fact.name]
        answer = slice(len(script), len(script) + len(fact.value))
        distance = len(context) + answer.start - place
        questions.append(Question(fact.name, fact.digits, answer, distance, depth))
        script += fact.value + fact.end
    return tuple(script), tuple(questions)


def _names(rng: random.Random, count: int) -> list[str]:
    words = WORDS.split()
    names = ["_".join(pair) for pair in permutations(words, 2)]
    if count > len(names):
        names = ["_".join(three) for three in permutations(words, 3)]
    return rng.sample(names, min(count, len(names)))
