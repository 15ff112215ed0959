import copy
import re
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
from evaluating import stand_in, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation.tasks.longbench import lm_eval_parts
from kvmix_cli.evaluation.tasks.longbench.data import LongBenchQuestion
from kvmix_cli.evaluation.tasks.longbench.datasets import DATASETS, DATASETS_E
from kvmix_cli.evaluation.tasks.longbench.prompts import MIN_TOKENS, fit, has_chat_template, render

LM_EVAL = Path(lm_eval.__file__).parent / "tasks" / "longbench"
RECORD = LongBenchQuestion("WHAT {{ context }}?", "CONTEXT {% raw %}\n", ("answer",), ("class",), 5, 1)
BOS, OPEN, CLOSE = 0, 1, 2


class Characters:
    """A tokenizer of one token a character, after a token that opens every text; its chat template adds two more."""

    chat_template = "open, message, close"

    bos_token_id = BOS

    def __call__(self, text, add_special_tokens=True, verbose=True):
        body = [ord(character) + 3 for character in text]
        return SimpleNamespace(input_ids=[BOS, *body] if add_special_tokens else body)

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(token - 3) for token in ids if token > CLOSE)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, return_dict):
        ((role, text),) = ((message["role"], message["content"]) for message in messages)
        assert role == "user" and add_generation_prompt and not return_dict
        return [BOS, OPEN, *self(text).input_ids[1:], CLOSE] if tokenize else f"open {text} close"


def with_tokenizer(tokenizer):
    return stand_in(tokenizer=tokenizer)


def characters(ids):
    return Characters().decode(ids, True, False)


texts = st.text(st.characters(codec="utf-8"), max_size=120)
sizes = st.none() | st.integers(0, 140)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(texts, st.booleans(), sizes, sizes)
def test_a_prompt_that_is_too_long_keeps_its_two_ends(text, chat, most, room):
    around = 2 if chat else 0
    fitted = fit(with_tokenizer(Characters()), text, chat=chat, most=most, room=room)
    whole = len(text) + 1
    allowed = min(size for size in (whole, most, None if room is None else room - around) if size is not None)
    if allowed < min(MIN_TOKENS, whole):
        assert fitted is None
        return
    assert [token for token in fitted.ids if token <= CLOSE] == ([BOS, OPEN, CLOSE] if chat else [BOS])
    assert fitted.ids[-1] == CLOSE or not chat
    assert room is None or len(fitted.ids) <= room
    said = characters(fitted.ids)
    if allowed == whole:
        assert (said, fitted.cut) == (text, 0)
    else:
        half = allowed // 2
        assert said == text[: half - 1] + text[-half:]
        assert fitted.cut == whole - 2 * half == len(text) - len(said)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["the", "river", "北京", "42", "\n\n", "x_y()", "é"]), min_size=30, max_size=90))
def test_with_a_real_tokenizer_it_fits_and_its_ends_stay(words):
    text = " ".join(["BEGIN", *words, "END"])
    tokenizer = tiny().tokenizer
    whole = tokenizer(text).input_ids
    fitted = fit(with_tokenizer(tokenizer), text, chat=False, most=40, room=36)
    assert len(fitted.ids) <= 36 < len(whole) or list(fitted.ids) == whole
    said = tokenizer.decode(fitted.ids)
    assert said.startswith("BEGIN")
    assert said.endswith("END")
    assert (fitted.cut > 0) == (len(whole) > 36)


def test_halves_that_join_into_more_tokens_than_before_are_cut_again():
    class Growing(Characters):
        """Where 'b' stands beside 'a', it takes five tokens more."""

        def __call__(self, text, **options):
            return super().__call__(text.replace("ab", "ab....."), **options)

    text = "a" * 40 + "-" * 40 + "b" * 40
    fitted = fit(with_tokenizer(Growing()), text, chat=False, most=80, room=60)
    assert len(fitted.ids) <= 60
    assert fit(with_tokenizer(Growing()), text, chat=False, most=40, room=60).cut == 121 - 40


def test_the_chat_template_goes_around_what_was_cut():
    tokenizer = copy.copy(tiny().tokenizer)
    assert not has_chat_template(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}[{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}]"
    assert has_chat_template(tokenizer)
    fitted = fit(with_tokenizer(tokenizer), "start " + "middle " * 100 + "end", chat=True, most=50, room=45)
    said = tokenizer.decode(fitted.ids)
    assert said.startswith("<s>[user: start middle")
    assert said.endswith("middle end]")
    assert len(fitted.ids) <= 45


def test_a_chat_template_that_does_not_work_is_an_error():
    class Broken(Characters):
        def apply_chat_template(self, *arguments, **options):
            raise TemplateError("a system message must come first")

    with pytest.raises(TextError, match="builtin:tiny cannot be used: a system message must come first"):
        fit(with_tokenizer(Broken()), "text", chat=True, most=None, room=None)


NAMES = [*DATASETS, *(f"{name}_e" for name in DATASETS_E)]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_holds_the_record_as_it_is(name):
    text = render(name, RECORD)
    dataset = name.removesuffix("_e")
    assert text.count(RECORD.context) == 1
    asks = dataset not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    assert text.count(RECORD.input) == asks
    assert len(text) > len(RECORD.context) + len(RECORD.input)


@pytest.mark.parametrize("name", NAMES)
def test_our_table_agrees_with_that_of_lm_eval(name):
    text = (LM_EVAL / f"{name}.yaml").read_text(encoding="utf-8")
    dataset = DATASETS[name.removesuffix("_e")]
    assert int(re.search(r"max_gen_toks: (\d+)", text)[1]) == dataset.max_new_tokens
    assert re.search(r"process_results: !function metrics\.get_(\w+)_with_score", text)[1] + "_score" == dataset.metric
    assert (r'until: ["\n"]' in text) == dataset.first_line


def test_lm_eval_has_the_same_data_sets():
    files = {path.stem for path in LM_EVAL.glob("*.yaml") if not path.stem.startswith("_")}
    assert files == set(NAMES)


def test_a_prompt_that_asks_for_other_fields_is_an_error(monkeypatch):
    monkeypatch.setattr(lm_eval_parts, "prompt_text", lambda name: "{{ title }}")
    with pytest.raises(EvaluationError, match=r"lm-eval's prompt of another asks for more: 'title' is undefined"):
        render("another", RECORD)
