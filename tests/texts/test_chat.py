"""Prompts as token ids: special tokens before them and none behind, and chat templates that lose what a user says."""

import copy

import pytest
from evaluating import tiny
from tokenizers.processors import TemplateProcessing

from kvmix_cli.errors import TextError
from kvmix_cli.texts.chat import chat_ids, chat_turn, prompt_ids
from kvmix_cli.texts.tokens import encode

TEXT = "def fibonacci(n):"
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.fixture
def tokenizer():
    return copy.deepcopy(tiny().tokenizer)


def adding(tokenizer, template):
    """The tokenizer with tokens 1 (begin) and 2 (end) around every text, as the template says."""
    begin, end = (tokenizer.convert_ids_to_tokens(token) for token in (1, 2))
    special = [(begin, 1), (end, 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.format(begin=begin, end=end), special_tokens=special
    )
    tokenizer.bos_token, tokenizer.eos_token = begin, end
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before"), [("{begin} $A {end}", [1]), ("$A {end}", []), ("{begin} $A", [1]), ("$A", [])]
)
def test_an_end_token_is_not_put_after_a_prompt(template, before, tokenizer):
    body = encode(tokenizer, TEXT)
    assert prompt_ids(adding(tokenizer, template), TEXT) == before + body


def test_an_end_token_that_the_text_itself_has_stays(tokenizer):
    made = adding(tokenizer, "{begin} $A {end}")
    text = TEXT + made.eos_token
    assert prompt_ids(made, text) == [1, *encode(made, text)]
    assert prompt_ids(made, text)[-1] == 2


def test_a_chat_prompt_is_what_the_template_makes_of_it(tokenizer):
    tokenizer.chat_template = "<{{ messages[0].content | trim }}>{% if add_generation_prompt %}:{% endif %}"
    assert chat_ids(tokenizer, f" {TEXT}\n", "org/model") == encode(tokenizer, f"<{TEXT}>:")
    assert chat_turn(tokenizer, "org/model") == ("<", ">:")


def test_a_template_may_escape_what_the_user_says(tokenizer):
    tokenizer.chat_template = "{{ messages | tojson }}"
    assert chat_ids(tokenizer, 'say "<b>"', "org/model")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "org/model has no chat template"),
        (PARTS, "the chat template of org/model cannot be used: it leaves out what the user says"),
        ("{{ raise_exception('no system turn') }}", "the chat template of org/model cannot be used: no system turn"),
        ("{{ messages[0].content[:15] }}:", "it leaves out part of what the user says"),
        ("{{ broken", "cannot be used"),
        ("{{ messages[0].content.missing.thing }}", "cannot be used"),
        ("{{ 1 / 0 }}", "cannot be used: division by zero"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot be used"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot be used"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be used: maximum recursion depth"),
    ],
)
def test_a_template_that_fails_or_loses_the_prompt_is_one_line(template, said, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(TextError, match=said) as error:
        chat_ids(tokenizer, TEXT, "org/model")
    assert "\n" not in str(error.value)
