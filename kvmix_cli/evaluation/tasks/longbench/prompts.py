"""From a record to the token ids a model reads: the prompt's text, the cut in its middle, the chat template."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined, Template, TemplateError

from ....errors import EvaluationError, first_sentence
from . import borrowed
from .data import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 16
"""A prompt that is cut to less says nothing."""

_environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits.

    Attributes:
        cut: tokens that were taken out of its middle.
    """

    ids: tuple[int, ...]
    cut: int


def render(name: str, entry: Entry) -> str:
    """The text that asks a record's question; `name` is that of lm-eval's task. Raises EvaluationError."""
    fields = asdict(entry)
    try:
        return _template(name).render(fields, question=entry.input)
    except TemplateError as error:
        raise EvaluationError(f"lm-eval's prompt of {name} asks for more: {first_sentence(error)}") from error


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can write a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def fit(
    tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, most: int | None, room: int | None
) -> Fitted | None:
    """Token ids of a text, cut in the middle if they are too many; None if less than `MIN_TOKENS` would be left.

    As in LongBench's `pred.py`, the text is cut before the chat template goes around it, and the halves are put
    together as text.

    Args:
        chat: put the chat template around it.
        most: tokens before that; None is no limit.
        room: tokens after that; None is no limit.

    Raises:
        EvaluationError: if the chat template cannot be used.
    """
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    keep = len(ids) if most is None else min(most, len(ids))
    while keep >= min(MIN_TOKENS, len(ids)):
        shown = text if keep == len(ids) else _without_middle(tokenizer, ids, keep)
        fitted = _chat(tokenizer, shown) if chat else tokenizer(shown, verbose=False).input_ids
        over = 0 if room is None else len(fitted) - room
        if over <= 0:
            return Fitted(tuple(fitted), 0 if keep == len(ids) else len(ids) - 2 * (keep // 2))
        keep -= over
    return None


def _without_middle(tokenizer: PreTrainedTokenizerBase, ids: list[int], keep: int) -> str:
    """The text of the first and the last `keep // 2` tokens."""
    half = keep // 2
    first, last = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids[:half], ids[-half:])
    )
    return first + last


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise EvaluationError(f"the tokenizer's chat template cannot be used: {first_sentence(error)}") from error
    return ids


@functools.cache
def _template(name: str) -> Template:
    return _environment.from_string(borrowed.prompt_text(name))
