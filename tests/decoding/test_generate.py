import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from evaluating import tiny, uniform

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.decoding import generate as generation
from kvmix_cli.decoding.generate import generate
from kvmix_cli.decoding.sampling import LEAST_TEMPERATURE
from kvmix_cli.errors import KvmixError

PROMPT = "def fibonacci(n):"


def ids(text=PROMPT):
    return tiny().tokenizer(text).input_ids


def stock():
    return unquantized_cache(tiny().model.config)


@pytest.mark.slow
def test_it_writes_what_the_model_itself_would_write():
    pieces = []
    result = generate(tiny(), ids(), stock(), max_new_tokens=24, on_text=pieces.append)
    expected = tiny().model.generate(torch.tensor([ids()]), max_new_tokens=24, do_sample=False)[0, len(ids()) :]
    assert result.text == "".join(pieces) == tiny().tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 3
    assert (result.prompt_tokens, result.new_tokens) == (len(ids()), 24)


@pytest.mark.slow
def test_at_16_bits_the_quantized_cache_writes_the_same():
    cache = MixedCache.from_plan(uniform(16), tiny().model.config, reserve=len(ids()) + 24)
    assert (
        generate(tiny(), ids(), cache, max_new_tokens=24).text
        == generate(tiny(), ids(), stock(), max_new_tokens=24).text
    )


def test_prompt_and_decoding_are_timed_apart(monkeypatch):
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(generation, "time", clock)
    result = generate(tiny(), ids(), stock(), max_new_tokens=9)
    assert (result.prompt_seconds, result.decode_seconds) == (2.0, 8.0)  # a tick for what is fed before `generate`
    assert result.prompt_tokens_per_s == len(ids()) / 2
    assert result.decode_tokens_per_s == 1.0


def test_a_single_token_has_no_decoding_speed():
    result = generate(tiny(), ids(), stock(), max_new_tokens=1)
    assert (result.new_tokens, result.decode_seconds, result.decode_tokens_per_s) == (1, 0.0, None)
    assert result.prompt_tokens_per_s > 0


def test_a_prompt_of_one_token_is_enough():
    assert generate(tiny(), [100], stock(), max_new_tokens=3).prompt_tokens == 1


def test_greedy_is_the_default_whatever_the_model_came_with(monkeypatch):
    plain = generate(tiny(), ids(), stock(), max_new_tokens=16).text
    for name, value in (("do_sample", True), ("temperature", 5.0), ("top_k", 50)):
        monkeypatch.setattr(tiny().model.generation_config, name, value)
    assert generate(tiny(), ids(), stock(), max_new_tokens=16, seed=1).text == plain


@pytest.mark.slow
def test_sampling_follows_its_seed():
    def sample(seed, temperature=1.5, **settings):
        return generate(tiny(), ids(), stock(), max_new_tokens=16, temperature=temperature, seed=seed, **settings).text

    assert sample(0) == sample(0)
    assert len({sample(seed) for seed in range(4)}) > 1
    greedy = generate(tiny(), ids(), stock(), max_new_tokens=16).text
    assert sample(3, top_p=1e-6) == sample(3, temperature=LEAST_TEMPERATURE) == greedy


def test_the_answer_is_cut_to_what_the_model_has_room_for():
    small = dataclasses.replace(tiny(), max_length=len(ids()) + 5)
    result = generate(small, ids(), stock(), max_new_tokens=50)
    assert (result.max_new_tokens, result.new_tokens) == (5, 5)
    unbounded = dataclasses.replace(tiny(), max_length=None)
    assert generate(unbounded, ids(), stock(), max_new_tokens=6).max_new_tokens == 6


@pytest.mark.parametrize("limit", [5, 9])
def test_a_prompt_beyond_the_limit_is_an_error_with_both_numbers(limit):
    small = dataclasses.replace(tiny(), max_length=limit)
    with pytest.raises(KvmixError, match=f"the prompt has 9 tokens and the model's limit, answer included, is {limit}"):
        generate(small, list(range(100, 109)), stock(), max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "--temperature must be 0"),
        ({"temperature": 1e-40}, "--temperature must be 0 .greedy. or a number from 1e-06 up, got 1e-40"),
        ({"temperature": float("nan")}, "--temperature must be 0"),
        ({"temperature": float("inf")}, "--temperature must be 0"),
        ({"top_p": 0.0}, "--top-p must be more than 0 and at most 1"),
        ({"top_p": float("nan")}, "--top-p must be more than 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_errors(settings, said):
    with pytest.raises(KvmixError, match=said):
        generate(tiny(), ids(), stock(), **settings)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(KvmixError, match="the prompt is empty"):
        generate(tiny(), [], stock())


@pytest.mark.slow
def test_an_answer_longer_than_what_was_reserved_makes_the_cache_grow():
    texts = []
    for reserved in (0, len(ids()) + 40):
        cache = MixedCache.from_plan(uniform(2), tiny().model.config, reserve=reserved)
        texts.append(generate(tiny(), ids(), cache, max_new_tokens=40).text)
        assert cache.get_seq_length() == len(ids()) + 39
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(tiny().model, "generate", fail)
    with pytest.raises(
        KvmixError, match="out of memory on cpu after a prompt of 8 tokens and 0 new ones; use a shorter"
    ):
        generate(tiny(), ids()[:8], stock(), max_new_tokens=3)


def test_another_runtime_error_is_not_taken_for_memory(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(tiny().model, "generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        generate(tiny(), ids(), stock(), max_new_tokens=3)
