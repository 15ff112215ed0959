"""Code completion: a name that is defined far back in a repository must be completed where it is used.

With the built-in text the repository is made up of small modules, written here, with random names: an import asks for
the one function of a module. With a user's own code (`--text FOLDER`) it is that code, up to a line that uses a name
whose definition is far back and which is not in between; the first part of the name is given, as to an editor.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ...errors import TextError
from ...texts import load_texts
from ...texts.tokens import encode, opening
from ..base import Settings
from ..results import Metric
from .facts import WORDS, Fact, Question, as_code
from .needles import Exercise, Needles, Writer, alike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...models.loading import LoadedModel

BUILTIN = "builtin"
FEWEST_TOKENS = 20
"""Tokens of a module in any tokenizer; bounds the number of modules that are drawn."""
MODULES = 4
"""Modules that there must be, at least."""
NEAREST = 0.25
"""Share of the context between a definition and the use that is asked for, at least."""
CHOICE = 8
"""Uses whose distance is nearest to the wanted one, of which one is drawn."""
CANDIDATES = 200
"""Uses that are tried for an exercise."""
SAMPLE = 20_000
"""Characters on which the length of a token is estimated."""
MARGIN = 2
"""Text before a definition that is encoded, over what an average token would need."""
_DEFINITION = re.compile(
    r"^[ \t]*(?:async )?(?:def|class|fn|func|function|struct|interface|trait) +([A-Za-z_]\w{5,})", re.M
)
"""Definitions in languages that begin them with a keyword."""
_NAME = re.compile(r"[A-Za-z_]\w*")
BODIES = (
    '''(values, limit):
    """Return the values that are below the limit, in order."""
    return sorted(value for value in values if value < limit)
''',
    '''(rows, width=80):
    """Return the rows, each cut to a width."""
    found = []
    for row in rows:
        found.append(row[:width])
    return found
''',
    '''(path):
    """Return the lines of a file without those that are blank."""
    with open(path) as file:
        lines = [line.rstrip() for line in file]
    return [line for line in lines if line]
''',
    '''(items, key, default=None):
    """Return the first item that has a key, or a default."""
    for item in items:
        if key in item:
            return item[key]
    return default
''',
    '''(first, second):
    """Return what two mappings have in common."""
    shared = first.keys() & second.keys()
    return {name: first[name] for name in shared if first[name] == second[name]}
''',
    '''(total, parts):
    """Return a total in parts that differ by one at most."""
    size, rest = divmod(total, parts)
    return [size + (number < rest) for number in range(parts)]
''',
    '''(text, marks=".,;"):
    """Return the words of a text without marks, counted."""
    counts = {}
    for word in text.split():
        word = word.strip(marks).lower()
        counts[word] = counts.get(word, 0) + 1
    return counts
''',
    '''(queue, handler):
    """Call a handler with everything in a queue, and return the failures."""
    failures = []
    while queue:
        entry = queue.pop()
        try:
            handler(entry)
        except ValueError as error:
            failures.append((entry, error))
    return failures
''',
)
"""What follows a function's name, in the modules that are made up."""


class CodeCompletion(Needles):
    """One name is asked for in each exercise; the depths of its definition take turns."""

    name = "code_completion"
    metrics = (Metric("code_completion", higher_is_better=True),)

    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        if settings.text != BUILTIN:
            texts = load_texts(settings.text, held_out=True, seed=settings.seed)
            code = UserCode(settings.text, "\n\n".join(texts), loaded.tokenizer)
            return lambda length, turn, seed: code.exercise(length, seed, self.place(turn, settings.seed))
        return lambda length, turn, seed: exercise(loaded.tokenizer, length, seed, self.place(turn, settings.seed))

    def content(self, settings: Settings) -> str:
        return "made-up modules" if settings.text == BUILTIN else f"{settings.text}, code"


def exercise(tokenizer: PreTrainedTokenizerBase, length: int, seed: str, depth: float) -> Exercise:
    """Return an exercise of exactly `length` tokens in made-up modules, one of which is imported from at the end.

    Args:
        depth: share of the other modules that stand before it.

    Raises:
        TooShort: if there is no room for a few modules.
    """
    facts = _modules(tokenizer, random.Random(seed), max(MODULES, length // FEWEST_TOKENS))
    head, blank = opening(tokenizer), as_code(tokenizer).blank
    return alike("code_completion", facts, head, blank, length=length, least=MODULES, depths=[depth], seed=seed)


def _modules(tokenizer: PreTrainedTokenizerBase, rng: random.Random, count: int) -> Iterator[Fact]:
    """Yield modules with one function each: what is asked for is the name of a module's function."""
    words = WORDS.split()
    seen: set[str] = set()
    while len(seen) < 2 * count:
        folder, file, verb, noun = rng.sample(words, 4)
        module, function = f"{folder}.{file}", f"{verb}_{noun}"
        if {module, function} & seen:
            continue
        seen |= {module, function}
        pieces = (
            f"\n# {folder}/{file}.py\ndef",
            f"\n# main.py\nfrom {module} import",
            f" {function}",
            rng.choice(BODIES) + "\n",
            "\n",
        )
        yield Fact(module, function, *(encode(tokenizer, piece) for piece in pieces))


class CodeUse(NamedTuple):
    """A use of a name, and the definition before it; the name is nowhere in between. Places are in characters.

    Attributes:
        line: where the line of the definition begins.
        use: where the use begins, without the blank before it.
    """

    name: str
    line: int
    definition: int
    use: int

    @property
    def distance(self) -> int:
        """Return the characters from the definition to the use."""
        return self.use - self.definition


@dataclass(frozen=True)
class UserCode:
    """A user's own code as one text, and the uses in it that can be asked for.

    Args:
        source: its name, for errors.
        text: all files, one after the other.
    """

    source: str
    text: str
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def uses(self) -> list[CodeUse]:
        """Return the uses of names whose last mention before is their definition, by their distance."""
        defined = {match.start(1) for match in _DEFINITION.finditer(self.text)}
        names = {match[1] for match in _DEFINITION.finditer(self.text)}
        last: dict[str, int] = {}
        found = []
        for match in _NAME.finditer(self.text):
            name, place = match[0], match.start()
            if name not in names:
                continue
            before = last.get(name)
            if before in defined and self.text[place - 1] == " ":
                line = self.text.rfind("\n", 0, before) + 1
                found.append(CodeUse(name, line, before, place))
            last[name] = place
        return sorted(found, key=lambda use: use.distance)

    @cached_property
    def characters(self) -> float:
        """Return the characters of a token, on the average of the beginning."""
        sample = self.text[:SAMPLE]
        return len(sample) / max(1, len(encode(self.tokenizer, sample)))

    def exercise(self, length: int, seed: str, depth: float) -> Exercise:
        """Return an exercise of exactly `length` tokens that ends with the use of a name.

        Args:
            depth: wanted share of the context before the definition; the nearest that there is.

        Raises:
            TextError: if no name is defined and used so far apart.
        """
        wanted = max(NEAREST, 1 - depth) * length * self.characters
        near = sorted(self.uses, key=lambda use: abs(use.distance - wanted))[:CANDIDATES]
        rng = random.Random(seed)
        for start in range(0, len(near), CHOICE):
            some = near[start : start + CHOICE]
            for use in rng.sample(some, len(some)):
                if (found := self._ending_with(use, length, seed)) is not None:
                    return found
        raise TextError(
            f"{self.source} has no name that is defined, and first used again {round(NEAREST * length)} to {length} "
            "tokens later: give more code with --text, or a smaller --length"
        )

    def _ending_with(self, use: CodeUse, length: int, seed: str) -> Exercise | None:
        """Return a use's exercise; None if it is too near or too far, or if the name begins like another one."""
        name = encode(self.tokenizer, f" {use.name}")
        given = self._given(use, name)
        head = opening(self.tokenizer)
        room = length - len(head) - len(name)
        to_name = encode(self.tokenizer, self.text[use.line : use.definition])
        to_use = encode(self.tokenizer, self.text[use.definition : use.use - 1])
        start = max(0, use.line - int(MARGIN * self.characters * room))
        before = encode(self.tokenizer, self.text[start : use.line])
        count = room - len(to_name) - len(to_use)
        if given is None or not 0 <= count <= len(before) or len(to_use) < NEAREST * length:
            return None
        before = before[len(before) - count :]
        context = (*head, *before, *to_name, *to_use)
        depth = (len(before) + len(to_name)) / room
        answer = slice(given, len(name))
        question = Question(use.name, self.tokenizer.decode(name[answer]), answer, len(to_use) + given, depth)
        return Exercise(f"exercise {seed}", context, tuple(name), (question,))

    def _given(self, use: CodeUse, name: Sequence[int]) -> int | None:
        """Return the first tokens of a name that no other name between definition and use begins with, not all."""
        others = {match[0] for match in _NAME.finditer(self.text, use.definition, use.use)} - {use.name}
        for given in range(1, len(name)):
            beginning = self.tokenizer.decode(name[:given]).strip()
            if not any(other.startswith(beginning) for other in others):
                return given
        return None
