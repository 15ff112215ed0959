"""The timed generation: the work that is timed, and under which attention. No test asserts a speed."""

import gc

import pytest
import torch
from evaluating import SHORT, tiny, uniform

from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding import timing
from kvmix_cli.decoding.timing import time_generation

TWO = Subject("two", uniform(2))
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Forwards:
    """A model's forward, noted: shapes of ids, and the attention that ran."""

    def __init__(self, model):
        self.model = model
        self.calls = []

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _note(self, module, args, kwargs):
        self.calls.append((tuple(kwargs["input_ids"].shape), module.config._attn_implementation))


def baseline(name):
    return named_cache(name, tiny().config, tiny().model.dtype, tiny().device)


def everyone():
    return [
        Subject(),
        TWO,
        Subject("bf16", baseline=baseline("bf16")),
    ]


def test_the_work_is_the_same_for_everyone_one_forward_a_token():
    ids = torch.arange(3 * 48).reshape(3, 48)
    for subject in everyone():
        with Forwards(tiny().model) as seen:
            made = time_generation(tiny(), subject, ids, new_tokens=5)
        assert [shape for shape, _ in seen.calls] == [(3, 48), *[(3, 1)] * 4]
        assert made.prompt_seconds > 0
        assert made.decode_seconds > 0


def test_ours_runs_under_our_attention_and_others_under_sdpa_and_the_model_is_left_as_it_was():
    ids = torch.arange(32).reshape(1, 32)
    for subject, attention in zip(everyone(), ("sdpa", "kvmix", "sdpa"), strict=True):
        with Forwards(tiny().model) as seen:
            assert time_generation(tiny(), subject, ids, 2).attention == attention
        assert {ran for _, ran in seen.calls} == {attention}
        assert tiny().model.config._attn_implementation == "kvmix"


def slow(function, seconds, clock):
    """The same function, which moves a clock by some seconds."""

    def timed(*arguments):
        clock[0] += seconds
        return function(*arguments)

    return timed


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("a bug"), KeyboardInterrupt])
def test_the_attention_and_the_collector_are_put_back_after_an_error(error, monkeypatch):
    def fail(*arguments):
        assert tiny().model.config._attn_implementation == "sdpa"
        assert not gc.isenabled()
        raise error

    monkeypatch.setattr(timing, "fill", fail)
    with pytest.raises(BaseException, match=r"CUDA out|a bug|^$"):
        time_generation(tiny(), Subject(), torch.ones(1, 4, dtype=torch.long), 2)
    assert tiny().model.config._attn_implementation == "kvmix"
    assert gc.isenabled()


def test_prompt_and_decode_are_timed_apart(monkeypatch):
    """A clock that only forwards move: a prompt takes 100 seconds, a decoded token 1."""
    clock = [0.0]
    for name, seconds in (("fill", 100.0), ("last_logits", 1.0)):
        monkeypatch.setattr(timing, name, slow(getattr(timing, name), seconds, clock))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    made = time_generation(tiny(), Subject(), torch.arange(32).reshape(1, 32), new_tokens=8)
    assert (made.prompt_seconds, made.decode_seconds) == (100.0, 7.0)


def test_tokens_are_those_of_greedy_decoding():
    model, ids = tiny().model, torch.arange(20, 52).reshape(1, 32)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 32:]
    fed = []
    with Forwards(model) as seen:
        hook = model.register_forward_pre_hook(lambda *call: fed.append(call[-1]["input_ids"]), with_kwargs=True)
        time_generation(tiny(), Subject(), ids, new_tokens=5)
        hook.remove()
    assert len(seen.calls) == 5
    assert torch.equal(torch.cat(fed[1:], dim=1)[0], expected[:4])


def test_only_what_decoding_reads_counts_as_attended():
    subject = Subject("two", uniform(2, SHORT))
    made = time_generation(tiny(), subject, torch.arange(64).reshape(1, 64), new_tokens=3)
    assert made.attended["total"] == 8 * (65 + 66)
    assert made.attended["quantized"] == 8 * 2 * 64
