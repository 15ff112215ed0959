"""Questions to prompts: lm-eval's text around a question, the cut in its middle, the chat template, and token ids."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined, Template, TemplateError

from ....counting import counted
from ....errors import EvaluationError, first_sentence
from ....texts.chat import chat_ids, prompt_ids
from ...base import Sample
from . import lm_eval_parts
from .data import LongBenchQuestion
from .datasets import LongBenchDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ....models.loading import LoadedModel

MIN_TOKENS = 16
"""Fewest tokens that a prompt is cut to; with fewer there is no question left in it."""
MAX_NAMES = 8
"""Most data sets that a description names."""

_environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids that fit into a limit, and the number of tokens that were cut out of their middle."""

    ids: tuple[int, ...]
    cut: int


@dataclass(frozen=True, repr=False)
class LongBenchPrompt(Sample):
    """A question that fits into the model, with what is needed to score its answer.

    Attributes:
        answers: reference answers.
        classes: all classes, where the data set is a classification.
        length: of the text in words, by which it is binned.
        cut: tokens that were cut out of its middle.
        chat: the chat template is around it.
    """

    dataset: LongBenchDataset
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    cut: int
    chat: bool

    def __repr__(self) -> str:
        """Return a short text that differs between different prompts: the runner tells samples apart by it."""
        told = repr((self.ids, self.dataset, self.answers, self.classes, self.length))
        return f"{type(self).__name__}({self.name!r}, sha256={hashlib.sha256(told.encode()).hexdigest()})"


class PromptList(list[LongBenchPrompt]):
    """Prompts, and notices about lines that hold no question."""

    skipped: tuple[str, ...] = ()


def make_prompt(
    loaded: LoadedModel, dataset: LongBenchDataset, question: LongBenchQuestion, most: int | None, suffix: str = ""
) -> LongBenchPrompt:
    """Return a question's prompt, which leaves room for the longest answer.

    Args:
        most: tokens of the prompt before its chat template; None is no limit beside the model's.
        suffix: `_e` for the prompts of LongBench-E.

    Raises:
        EvaluationError: if the model's limit leaves no room for the prompt.
        TextError: if the chat template cannot be used.
    """
    text = render(f"{dataset.name}{suffix}", question)
    chat = dataset.chat and has_chat_template(loaded.tokenizer)
    room = None if loaded.max_length is None else loaded.max_length - dataset.max_new_tokens
    fitted = fit(loaded, text, chat=chat, most=most, room=room)
    if fitted is None:
        raise EvaluationError(
            f"{dataset.name}, line {question.line}: no room for the prompt: the model's limit is {loaded.max_length} "
            f"tokens and an answer takes {dataset.max_new_tokens} of them; leave this data set out"
        )
    return LongBenchPrompt(
        name=f"{dataset.name} {question.line}",
        ids=fitted.ids,
        dataset=dataset,
        answers=question.answers,
        classes=question.classes,
        length=question.length,
        cut=fitted.cut,
        chat=chat,
    )


def render(name: str, question: LongBenchQuestion) -> str:
    """Return the text of a question's prompt; `name` is that of lm-eval's task. Raises EvaluationError."""
    try:
        return str(_template(name).render(asdict(question), question=question.input))
    except TemplateError as error:
        raise EvaluationError(f"lm-eval's prompt of {name} asks for more: {first_sentence(error)}") from error


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def fit(loaded: LoadedModel, text: str, *, chat: bool, most: int | None, room: int | None) -> FittedPrompt | None:
    """Return the token ids of a text, cut in the middle if they are too many; None if fewer than `MIN_TOKENS` remain.

    As in LongBench's `pred.py`, the text is cut before the chat template goes around it, and the halves are put
    together as text.

    Args:
        chat: put the chat template around it.
        most: tokens before that; None is no limit.
        room: tokens after that; None is no limit.

    Raises:
        TextError: if the chat template cannot be used.
    """
    tokenizer = loaded.tokenizer
    ids = prompt_ids(tokenizer, text)
    keep = len(ids) if most is None else min(most, len(ids))
    while keep >= min(MIN_TOKENS, len(ids)):
        shown = text if keep == len(ids) else _without_middle(tokenizer, ids, keep)
        fitted = chat_ids(tokenizer, shown, loaded.info.id) if chat else prompt_ids(tokenizer, shown)
        over = 0 if room is None else len(fitted) - room
        if over <= 0:
            return FittedPrompt(tuple(fitted), 0 if keep == len(ids) else len(ids) - 2 * (keep // 2))
        keep -= over
    return None


def first_alike(prompts: Sequence[LongBenchPrompt]) -> list[LongBenchPrompt]:
    """Return the first prompts, as long as they can share a cache without padding."""
    first = prompts[0]
    same = takewhile(lambda one: (one.dataset, len(one.ids)) == (first.dataset, len(first.ids)), prompts)
    return list(same)


def describe_prompts(prompts: Sequence[LongBenchPrompt]) -> str:
    """Return how many prompts there are of which data sets, and of how many tokens, in words."""
    counts = Counter(prompt.dataset.name for prompt in prompts)
    names = ", ".join(f"{name} {count}" for name, count in counts.items())
    lengths = [len(prompt.ids) for prompt in prompts]
    least, most = min(lengths), max(lengths)
    some = f" ({names})" if len(counts) <= MAX_NAMES else f" from {len(counts)} data sets,"
    return f"{counted(len(prompts), 'prompt')}{some} of " + (
        f"{most} tokens" if least == most else f"{least} to {most} tokens"
    )


def describe_chat(prompts: Sequence[LongBenchPrompt]) -> str:
    """Return which data sets have the chat template around their prompts, in words."""
    names = dict.fromkeys(prompt.dataset.name for prompt in prompts if prompt.chat)
    if names:
        return f"chat template around {', '.join(names)}"
    if any(prompt.dataset.chat for prompt in prompts):
        return "no chat template: the tokenizer has none"
    return "no chat template: LongBench asks these data sets without"


def _without_middle(tokenizer: PreTrainedTokenizerBase, ids: list[int], keep: int) -> str:
    """Return the text of the first and the last `keep // 2` tokens."""
    half = keep // 2
    first, last = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids[:half], ids[-half:])
    )
    return str(first + last)


@functools.cache
def _template(name: str) -> Template:
    return _environment.from_string(lm_eval_parts.prompt_text(name))
