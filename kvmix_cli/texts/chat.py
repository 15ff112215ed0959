"""Prompts as token ids: a text as it is, or as a user's turn in the model's chat template."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import TextError, first_sentence
from .tokens import check_text, encode, opening

_PLACE = "kvmix was here"
"""Stands for a user's words while a chat template is taken apart."""
TEMPLATE_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a template's own code: a checkpoint may bring any template."""


class ChatTurn(NamedTuple):
    """The text that a chat template puts before a user's words, and between them and the answer."""

    before: str
    after: str


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a prompt, with the special tokens that the tokenizer puts before it.

    A tokenizer may put an end token after every text as well. It is left out: an answer behind it would begin a new
    document.
    """
    body = encode(tokenizer, text)
    whole: list[int] = tokenizer(text, verbose=False).input_ids
    if not body:
        return opening(tokenizer)
    for end in range(len(body), len(whole) + 1):
        if whole[end - len(body) : end] == body:
            return whole[:end]
    return whole


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, model_id: str) -> list[int]:
    """Return the token ids of a text as a user's turn, up to where the answer begins.

    Raises:
        TextError: if the tokenizer has no chat template, or its template fails or leaves out any of the text.
    """
    check_text(text)
    around = sum(map(len, chat_turn(tokenizer, model_id)))
    if len(_apply(tokenizer, text, model_id, tokenize=False)) < around + len(text.strip()):
        raise _unusable(model_id, "it leaves out part of what the user says")
    ids: list[int] = _apply(tokenizer, text, model_id, tokenize=True)
    return list(ids)


def chat_turn(tokenizer: PreTrainedTokenizerBase, model_id: str) -> ChatTurn:
    """Return what a chat template puts around a user's words.

    Raises:
        TextError: if the tokenizer has no chat template, or its template fails or leaves out the words.
    """
    before, place, after = str(_apply(tokenizer, _PLACE, model_id, tokenize=False)).rpartition(_PLACE)
    if not place:
        raise _unusable(model_id, "it leaves out what the user says")
    return ChatTurn(before, after)


def _apply(tokenizer: PreTrainedTokenizerBase, text: str, model_id: str, *, tokenize: bool) -> Any:
    if not tokenizer.chat_template:
        raise TextError(f"{model_id} has no chat template; leave out --chat or choose a chat model")
    turn = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(turn, tokenize=tokenize, add_generation_prompt=True, return_dict=False)
    except TEMPLATE_FAILURES as error:
        raise _unusable(model_id, first_sentence(error)) from error


def _unusable(model_id: str, reason: str) -> TextError:
    return TextError(
        f"the chat template of {model_id} cannot be used: {reason}; "
        "correct it in the tokenizer's files, or ask without a template"
    )
