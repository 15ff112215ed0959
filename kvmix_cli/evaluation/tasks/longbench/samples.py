"""Prompts as samples: what is needed to ask them, to score them, and to say what was asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ...base import Sample
from .datasets import Dataset

MAX_NAMES = 8
"""A description names no more data sets than these."""


@dataclass(frozen=True, repr=False)
class Prompt(Sample):
    """A question that fits into the model.

    Attributes:
        answers: reference answers.
        classes: of a classification, all there are.
        length: of the record in words, by which it is binned.
        cut: tokens that were taken out of its middle.
        chat: whether the chat template is around it.
    """

    dataset: Dataset
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    cut: int
    chat: bool

    def __repr__(self) -> str:
        """Short, and another one for another prompt: the runner tells samples apart by it."""
        told = repr((self.ids, self.dataset, self.answers, self.classes, self.length))
        return f"Prompt({self.name!r}, sha256={hashlib.sha256(told.encode()).hexdigest()})"


class Prompts(list[Prompt]):
    """Prompts, and what must be said about lines that hold none."""

    skipped: tuple[str, ...] = ()


def alike(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompts, as long as they can share a cache without padding."""
    first = prompts[0]
    same = takewhile(lambda one: (one.dataset, len(one.ids)) == (first.dataset, len(first.ids)), prompts)
    return list(same)


def counted(prompts: Sequence[Prompt]) -> str:
    """How many prompts there are of which data sets, and of how many tokens."""
    counts = Counter(prompt.dataset.name for prompt in prompts)
    names = ", ".join(f"{name} {count}" for name, count in counts.items())
    lengths = [len(prompt.ids) for prompt in prompts]
    least, most = min(lengths), max(lengths)
    some = f" ({names})" if len(counts) <= MAX_NAMES else f" from {len(counts)} data sets,"
    return f"{len(prompts)} prompts{some} of " + (f"{most} tokens" if least == most else f"{least} to {most} tokens")


def chatted(prompts: Sequence[Prompt]) -> str:
    """Where the chat template was put."""
    names = dict.fromkeys(prompt.dataset.name for prompt in prompts if prompt.chat)
    if names:
        return f"chat template around {', '.join(names)}"
    if any(prompt.dataset.chat for prompt in prompts):
        return "no chat template: the tokenizer has none"
    return "no chat template: LongBench asks these data sets without"
