"""Batches of prompts through one cache: each row reads what it would read alone."""

import itertools

import pytest
import torch
from architectures import VOCABULARY, build
from evaluating import SHORT, shallow, stand_in, uniform
from generation_files import GENERATION_FILES
from transformers import GenerationConfig

from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding import batch as batches
from kvmix_cli.decoding.batch import StopRule, generate_batch, run_in_batches, score_batch
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import EvaluationError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import Plan

TWO, FULL = (Subject(f"{bits} bits", uniform(bits, info=shallow().info)) for bits in (2, 16))
TEXT = "def area(width, height):\n    return width * height\n\n" * 6 + "def area("
IDS = shallow().tokenizer(TEXT).input_ids
END = shallow().tokenizer.eos_token_id
HELLO, WORLD, NEWLINE = (shallow().tokenizer(text).input_ids[-1] for text in ("one", "two", "\n"))
ROUNDING = 5e-3
"""Two bits: a rounding error of another batch size may tip a code. Log-likelihoods then differ by less than this."""


def decode_alone(subject, ids, prefilled, count):
    """Greedy decoding of one prompt, token by token."""
    cache = subject.cache(shallow().config, reserve=len(ids) + count)
    prefill(shallow(), cache, ids[:prefilled])
    *_, (_, logits) = feed(shallow(), cache, ids[prefilled:], step=1)
    found = [int(logits[-1].argmax())]
    while len(found) < count:
        ((_, logits),) = feed(shallow(), cache, found[-1:], step=1)
        found.append(int(logits[-1].argmax()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "falcon", "gpt_neox", "gpt_oss"])
def test_rows_of_every_family_share_contexts_and_batches(family):
    """With sliding windows, attention of their own, without grouped heads, with attention sinks."""
    model = build(family, torch.float32)
    info = model_info(model.config, family, None)
    loaded = stand_in(model=model, info=info, tokenizer=shallow().tokenizer)
    plan = Plan.build(info, {index: uniform(4, info=shallow().info).layers[0] for index in info.quantizable}, SHORT)
    contexts = torch.randint(3, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[*contexts[n // 3][:70], *range(5, 6 + n)] for n in range(6)]
    scored = [n + 1 for n in range(6)]
    prompts = [contexts[n][: 66 + 9 * n] for n in (0, 1)]
    for subject in (Subject(), Subject("four", plan)):
        together = score_batch(loaded, subject, rows, scored, 64, 8)
        alone = [score_batch(loaded, subject, [row], [count], 64, 8) for row, count in zip(rows, scored, strict=True)]
        assert together.log_likelihoods == pytest.approx([one.log_likelihoods[0] for one in alone], rel=1e-4)
        assert together.greedy == [one.greedy[0] for one in alone]
        answers = generate_batch(loaded, subject, prompts, 64, StopRule(8)).tokens
        assert answers == [generate_batch(loaded, subject, [one], 64, StopRule(8)).tokens[0] for one in prompts]


@torch.inference_mode()
@pytest.mark.parametrize("subject", [TWO, FULL], ids=["two bits", "sixteen bits"])
def test_a_continuation_is_scored_by_queries_that_went_through_the_cache(subject, prefilled=64):
    """Against one row alone: prefill, then steps, then the probabilities of what follows."""
    rows, scored = [IDS[:90], [*IDS[:70], *IDS[80:84]], IDS[:67]], [20, 4, 1]
    found = score_batch(shallow(), subject, rows, scored, prefilled, step=8)
    for ids, count, value, greedy in zip(rows, scored, found.log_likelihoods, found.greedy, strict=True):
        cache = subject.cache(shallow().config, reserve=len(ids))
        prefill(shallow(), cache, ids[:prefilled])
        logits = torch.cat([part for _, part in feed(shallow(), cache, ids[prefilled:-1], step=8)])[-count:]
        wanted = torch.tensor(ids[-count:])
        assert value == pytest.approx(logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item(), rel=ROUNDING)
        assert greedy == bool((logits.argmax(-1) == wanted).all())


@pytest.mark.slow
def test_an_answer_is_greedy_decoding_token_by_token_through_the_cache():
    prompts = [IDS[:72], IDS[:69], IDS[:65]]
    found = generate_batch(shallow(), TWO, prompts, 64, StopRule(10)).tokens
    assert found == [decode_alone(TWO, prompt, 64, 10) for prompt in prompts]


@pytest.mark.slow
def test_an_unquantized_cache_gives_what_a_plain_generate_does():
    prompt = IDS[:40]
    inputs = torch.tensor([prompt])
    generated = shallow().model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False
    )
    plain = generated[0, len(prompt) :].tolist()
    for subject in (Subject(), FULL):
        for prefilled in (0, 32, 39):
            assert generate_batch(shallow(), subject, [prompt], prefilled, StopRule(12)).tokens == [plain]


def test_already_the_first_token_is_read_out_of_the_quantized_cache():
    """A plain `generate` would decide it by the prefill pass, at any bits."""
    found = generate_batch(shallow(), TWO, [IDS, IDS], len(IDS) - 1, StopRule(1))
    layers, page = shallow().info.layers, SHORT.page
    assert [len(tokens) for tokens in found.tokens] == [1, 1]
    assert found.attended["total"] == layers * len(IDS)
    assert found.attended["quantized"] == layers * (len(IDS) // page * page)


@pytest.mark.slow
def test_prompts_of_the_same_length_are_answered_together_as_they_are_alone():
    rows = [IDS, [*IDS[:-9], *reversed(IDS[-9:])], [IDS[0], *reversed(IDS[1:])]]
    together = generate_batch(shallow(), TWO, rows, len(IDS) - 1, StopRule(8)).tokens
    assert together == [generate_batch(shallow(), TWO, [row], len(IDS) - 1, StopRule(8)).tokens[0] for row in rows]


def test_a_context_that_several_rows_share_is_prefilled_once(monkeypatch):
    shapes, whole = [], batches.prefill
    monkeypatch.setattr(
        batches, "prefill", lambda loaded, cache, ids: shapes.append(ids.shape) or whole(loaded, cache, ids)
    )
    other = [IDS[0], *reversed(IDS[1:])]
    rows = [IDS[:70], other[:70], IDS[:68]]
    shared = score_batch(shallow(), TWO, rows, [4, 4, 2], 64, 8)
    assert shapes == [(2, 64)]
    alone = [score_batch(shallow(), TWO, [row], [count], 64, 8) for row, count in zip(rows, [4, 4, 2], strict=True)]
    assert shared.log_likelihoods == pytest.approx([one.log_likelihoods[0] for one in alone], rel=ROUNDING)


@pytest.mark.slow
def test_sampled_answers_differ_and_come_again_with_their_seed():
    def sample(seed):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.5}
        return generate_batch(shallow(), TWO, [IDS[:66]] * 3, 64, StopRule(8), settings).tokens

    assert sample(5) == sample(5) != sample(6)
    assert len({tuple(tokens) for tokens in sample(5)}) == 3


# Ends


@pytest.fixture
def scripted(monkeypatch):
    """The built-in model, made to prefer the same tokens in every row; each step has the best one first."""
    hooks = []

    def use(*steps):
        call = itertools.count(-1)  # the first one is the prefill

        def prefer(module, arguments, output):
            if (number := next(call)) >= 0:
                output.logits[:, -1] = -100.0
                for rank, token in enumerate(steps[min(number, len(steps) - 1)]):
                    output.logits[:, -1, token] = -float(rank)
            return output

        hooks.append(shallow().model.register_forward_hook(prefer))
        return shallow()

    yield use
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (StopRule(5), [HELLO, NEWLINE, END, WORLD, WORLD]),
        (StopRule(5, (END,)), [HELLO, NEWLINE, END]),
        (StopRule(2, (END,)), [HELLO, NEWLINE]),
        (StopRule(5, (END, NEWLINE)), [HELLO, NEWLINE]),
        (StopRule(5, (END, HELLO), min_new_tokens=1), [WORLD, NEWLINE, END]),
        (StopRule(5, (), ("\n",)), [HELLO, NEWLINE]),
        (StopRule(5, (), ("e\n",)), [HELLO, NEWLINE]),
        (StopRule(5, (), ("none of it",)), [HELLO, NEWLINE, END, WORLD, WORLD]),
    ],
)
def test_an_answer_ends_where_its_rule_says(scripted, stop, wanted):
    loaded = scripted([HELLO, WORLD], [NEWLINE], [END], [WORLD])
    assert generate_batch(loaded, Subject(), [IDS[:20], IDS[1:21]], 19, stop).tokens == [wanted, wanted]


@pytest.mark.slow
def test_an_end_token_inside_a_prompt_ends_nothing():
    prompt = [*IDS[:70], END, *IDS[70:80]]
    (answer,) = generate_batch(shallow(), TWO, [prompt], 64, StopRule(6, (END,))).tokens
    assert answer == decode_alone(TWO, prompt, 64, 6)


def answers():
    """Of two prompts, by the unquantized cache and at 2 bits."""
    prompts, stop = [IDS[:70], IDS[:67]], StopRule(8, (END,))
    return [generate_batch(shallow(), subject, prompts, 64, stop) for subject in (Subject(), TWO)]


@pytest.fixture(scope="module")
def plain():
    """Answers with the settings of the built-in model itself."""
    return answers()


@pytest.mark.slow
@pytest.mark.parametrize("file", GENERATION_FILES, ids=",".join)
def test_a_checkpoints_generation_settings_change_no_answer(file, monkeypatch, plain):
    monkeypatch.setattr(shallow().model, "generation_config", GenerationConfig(**file))
    assert answers() == plain


# Memory


def too_large(batch):
    return EvaluationError(f"{len(batch)} at {batch[0]}")


def run(items, fits, *, size, least=1, error=None):
    """The results, and the sizes of all batches that were tried."""
    tried = []

    def work(batch):
        tried.append(len(batch))
        if not fits(batch):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [10 * item for item in batch]

    def take(batch):
        return list(itertools.takewhile(lambda item: item % 2 == batch[0] % 2, batch))

    found = run_in_batches(
        items, work, take=take, size=size, least=least, device=torch.device("cpu"), too_large=too_large
    )
    return found, tried


@pytest.mark.slow
def test_a_batch_is_halved_until_it_fits_and_nothing_is_lost():
    found, tried = run([1] * 7, lambda batch: len(batch) <= 2, size=8)
    assert list(found) == [10] * 7
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_items_that_cannot_share_a_batch_are_worked_on_apart_and_in_order():
    found, tried = run([1, 3, 5, 2, 4, 7], lambda batch: True, size=2)
    assert list(found) == [10, 30, 50, 20, 40, 70]
    assert tried == [2, 1, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_an_item_that_does_not_fit_alone_is_an_error_after_the_results_before_it(error):
    found, _ = run([1, 3, 5], lambda batch: 5 not in batch, size=4, error=error)
    assert [next(found), next(found)] == [10, 30]
    with pytest.raises(EvaluationError, match="1 at 5"):
        next(found)


@pytest.mark.slow
def test_a_batch_is_not_halved_below_the_least_size():
    found, tried = run([1, 3, 5], lambda batch: False, size=3, least=3)
    with pytest.raises(EvaluationError, match="3 at 1"):
        next(found)
    assert tried == [3]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    found, _ = run([1], lambda batch: False, size=1, error=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        next(found)
