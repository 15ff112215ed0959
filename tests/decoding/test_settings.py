"""A checkpoint's generation settings: only its end tokens and its penalties reach a generation."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from evaluating import shallow, uniform
from transformers import GenerationConfig

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.decoding.generate import generate
from kvmix_cli.decoding.settings import RESERVED_TOKENS, continue_tokens, end_tokens, greedy_settings, reserve
from kvmix_cli.errors import ModelError

IDS = list(range(100, 124))
NEW = 12
LEAKS = {
    "the file of a public report": {"eos_token_id": 1, "pad_token_id": 2, "use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 4},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
    "beams and sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.3},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "stopping": {"stop_strings": ["e"], "max_time": 0.0, "max_length": 3, "min_length": 10},
    "another decoding": {"prompt_lookup_num_tokens": 3},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance": {"guidance_scale": 1.5},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 1, "exponential_decay_length_penalty": (2, 9.0)},
    "a watermark": {"watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash"}},
    "prefill in parts": {"prefill_chunk_size": 4},
}


@pytest.fixture
def checkpoint(monkeypatch):
    """The built-in model with another `generation_config.json`."""

    def use(**settings):
        monkeypatch.setattr(shallow().model, "generation_config", GenerationConfig(**settings))
        return shallow()

    return use


def answer(loaded, plan=None, ids=IDS):
    config = loaded.model.config
    cache = unquantized_cache(config) if plan is None else MixedCache.from_plan(plan, config, reserve=64)
    return generate(loaded, ids, cache, max_new_tokens=NEW), cache


@pytest.fixture(scope="module")
def plain():
    """The texts of the unquantized cache and of 2 bits, with the settings of the built-in model itself."""
    return [answer(shallow(), plan)[0].text for plan in (None, uniform(2, info=shallow().info))]


@pytest.mark.slow
@pytest.mark.parametrize("settings", LEAKS.values(), ids=LEAKS)
def test_what_a_checkpoint_says_of_generation_changes_no_answer(settings, checkpoint, plain):
    loaded = checkpoint(**settings)
    theirs = loaded.model.generation_config
    for plan, text in zip((None, uniform(2, info=shallow().info)), plain, strict=True):
        found, cache = answer(loaded, plan)
        assert (found.text, found.new_tokens) == (text, NEW)
        assert cache.get_seq_length() == len(IDS) + NEW - 1
    assert loaded.model.generation_config is theirs


def test_a_checkpoint_without_use_cache_still_feeds_each_token_once(checkpoint):
    loaded, fed = checkpoint(use_cache=False), []
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answer(loaded, uniform(2, info=shallow().info))
    finally:
        hook.remove()
    assert fed == [len(IDS)] + [1] * (NEW - 1)


def test_end_tokens_are_those_of_the_checkpoint_and_of_the_tokenizer(checkpoint):
    for own, expected in ((None, []), (3, [3])):
        tokenizer = SimpleNamespace(eos_token_id=own)
        assert end_tokens(replace(checkpoint(), tokenizer=tokenizer)) == expected
        assert end_tokens(replace(checkpoint(eos_token_id=7), tokenizer=tokenizer)) == [7, *expected]
        assert end_tokens(replace(checkpoint(eos_token_id=[7, 9, 7]), tokenizer=tokenizer)) == [7, 9, *expected]


@pytest.mark.slow
def test_an_answer_ends_at_the_checkpoints_end_token(checkpoint):
    settings = greedy_settings(shallow(), NEW)
    row = continue_tokens(shallow(), torch.tensor([IDS]), unquantized_cache(shallow().config), settings)[0].tolist()
    third = row[len(IDS) + 2]
    found, _ = answer(checkpoint(eos_token_id=third))
    assert found.new_tokens == row[len(IDS) :].index(third) + 1
    settings = greedy_settings(shallow(), NEW, ends=[])
    whole = continue_tokens(shallow(), torch.tensor([IDS]), unquantized_cache(shallow().config), settings)
    assert whole.shape == (1, len(IDS) + NEW)


@pytest.mark.slow
def test_penalties_stay_and_are_said_once(checkpoint):
    plain = answer(shallow())[0].text
    loaded = checkpoint(repetition_penalty=1.9, no_repeat_ngram_size=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        texts = {answer(loaded)[0].text for _ in range(2)}
    assert len(texts) == 1
    assert texts != {plain}
    assert [str(one.message) for one in said] == [
        "generation_config.json of builtin:tiny changes the scores of tokens, and answers follow it: "
        "repetition_penalty 1.9, no_repeat_ngram_size 2"
    ]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": []}])
def test_a_penalty_that_changes_nothing_is_not_mentioned(settings, checkpoint):
    loaded = checkpoint()
    for name, value in settings.items():
        setattr(loaded.model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy_settings(loaded, NEW)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", -1.0),
        ("repetition_penalty", "x"),
        ("no_repeat_ngram_size", "x"),
        ("no_repeat_ngram_size", 2.5),
        ("bad_words_ids", [[10**6]]),
        ("bad_words_ids", "x"),
        ("sequence_bias", [[[10**6], 1.0]]),
        ("sequence_bias", {"x": 1.0}),
        ("suppress_tokens", ["x"]),
        ("eos_token_id", "x"),
        ("eos_token_id", [[3]]),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(name, value, checkpoint):
    loaded = checkpoint()
    setattr(loaded.model.generation_config, name, value)
    with pytest.raises(ModelError, match=f"generation_config.json of builtin:tiny has {name} .*: .*; correct it there"):
        greedy_settings(loaded, NEW)


def test_an_end_token_that_the_model_does_not_know_ends_nothing(checkpoint):
    tokenizer = SimpleNamespace(eos_token_id=4097)
    assert end_tokens(replace(checkpoint(eos_token_id=[7, 10**6]), tokenizer=tokenizer)) == [7]


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_padding_token_that_the_model_does_not_know_is_not_fed_to_it(token, checkpoint):
    assert greedy_settings(checkpoint(pad_token_id=token), NEW).pad_token_id == shallow().tokenizer.pad_token_id


def test_room_is_made_for_some_thousands_of_tokens_at_most():
    assert reserve(10, 256) == 266
    assert reserve(10, 900_000_000) == 10 + RESERVED_TOKENS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_no_score_of_a_token(monkeypatch, temperature):
    """Of NaN the largest is any token, so a damaged model would answer something."""
    model = shallow().model
    monkeypatch.setattr(model.lm_head, "forward", lambda states: torch.full((*states.shape[:2], 4096), torch.nan))
    with pytest.raises(ModelError, match="gives NaN as scores of the next token, in float32: its weights are damaged"):
        generate(shallow(), IDS, unquantized_cache(model.config), max_new_tokens=2, temperature=temperature)
