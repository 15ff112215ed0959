import dataclasses
import json
import math

import pytest
import torch
from architectures import build
from evaluating import SHORT, stand_in, tiny, uniform
from transformers.cache_utils import DynamicCache

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Sample, Settings, chunks
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.plan import Plan
from kvmix_cli.texts.tokens import encode

SETTINGS = Settings(length=160, prefix=64, step=16, limit=2)


@pytest.fixture(scope="module")
def samples():
    return get_task("perplexity").samples(tiny(), SETTINGS)


def measure(subject, sample, **changes):
    return get_task("perplexity").measure(tiny(), subject, sample, dataclasses.replace(SETTINGS, **changes))


@torch.inference_mode()
def one_pass_nll(sample, first):
    """Of tokens `first`, first + 1, ... of a sample, from a single forward without a cache."""
    ids = torch.tensor([sample.ids])
    logits = tiny().model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].double()
    return -logits.log_softmax(-1).gather(1, ids[0, first:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 16, 64, 1000])
def test_at_16_bits_it_is_the_loss_of_a_plain_forward(samples, step):
    record = measure(Subject("full", uniform(16)), samples[0], step=step)
    assert record["tokens"] == 160 - 64 - 1
    assert record["nll"] == pytest.approx(one_pass_nll(samples[0], first=65), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 16])
def test_at_16_bits_it_is_what_the_stock_cache_gives(samples, step):
    full, stock = (measure(subject, samples[0], step=step) for subject in (Subject("full", uniform(16)), Subject()))
    assert full["nll"] == pytest.approx(stock["nll"], rel=1e-6)  # the same products, of tensors with other strides


@pytest.mark.slow
def test_the_scored_tokens_read_the_quantized_cache(samples):
    records = {bits: measure(Subject("plan", uniform(bits)), samples[0]) for bits in (1, 4, 16)}
    assert records[1]["nll"] > records[16]["nll"] + 10
    assert 0 < abs(records[4]["nll"] - records[16]["nll"]) < 10
    assert records[16]["attended"]["quantized"] == 0
    assert records[1]["attended"]["quantized"] == records[4]["attended"]["quantized"] > 0


def test_the_share_counts_what_the_scored_tokens_attended_to_and_no_more():
    sample = Sample("97 tokens", tuple(range(100, 197)))
    seen = measure(Subject("plan", uniform(4)), sample, length=97)["attended"]
    # Two steps of 16 after a prefix of 64, pages of 16 and no window: all that came before a step is packed.
    pairs = sum(before + own for before in (64, 80) for own in range(1, 17))
    assert seen["total"] / tiny().info.layers == pairs
    assert seen["quantized"] / tiny().info.layers == 16 * 64 + 16 * 80


@pytest.mark.slow
def test_a_report_puts_every_plan_beside_the_unquantized_cache_on_the_same_tokens(samples):
    subjects = [Subject("eight", uniform(8)), Subject("one", uniform(1)), Subject("full", uniform(16))]
    report = run_task(get_task("perplexity"), tiny(), subjects, SETTINGS)
    assert [row.plan for row in report.rows] == ["unquantized", "eight", "one", "full"]
    assert report.tokens == 2 * 95
    reference, eight, one, full = report.rows
    expected = sum(one_pass_nll(sample, first=65) for sample in samples) / report.tokens
    assert reference.value("perplexity") == pytest.approx(math.exp(expected), rel=1e-4)
    assert reference.quantized_share == full.quantized_share == 0
    assert eight.quantized_share > 0.5
    assert set(reference.metrics) == {"perplexity"}
    assert abs(eight.value("loss_increase")) < 0.01
    assert one.metrics["loss_increase"].low > 0.5
    assert full.value("perplexity_increase_percent") == pytest.approx(0, abs=1e-4)  # rounding
    increase = one.value("perplexity") / reference.value("perplexity") - 1
    assert one.value("perplexity_increase_percent") == pytest.approx(100 * increase)
    assert [bool(row.warnings) for row in report.rows] == [False, False, False, True]


def test_samples_are_seeded_distinct_and_exactly_as_long_as_asked(samples):
    again, other = (get_task("perplexity").samples(tiny(), dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 1))
    assert again == samples
    assert other != samples
    assert {len(sample.ids) for sample in samples} == {160}
    assert len({sample.name for sample in samples}) == 2


def test_every_document_gives_a_sample_before_any_gives_two():
    texts = ["alpha beta gamma " * 60, "too short", "one two three " * 60]
    found = chunks(tiny(), texts, "here", 64, 100, seed=0)
    assert {sample.name for sample in found[:2]} == {"document 0 part 0", "document 2 part 0"}
    whole = encode(tiny().tokenizer, texts[0])
    parts = [token for sample in found if "document 0" in sample.name for token in sample.ids]
    assert parts == whole[: len(whole) // 64 * 64]


def test_a_long_document_is_encoded_as_far_as_it_is_needed():
    """Samples are those of the whole text, whose encoding would take a minute for every 40 MB."""
    words = "alpha beta, gamma = delta(1) " * 2
    text = "".join(f"{number} {words[number % 20 :]}" for number in range(20_000))
    read = []

    class Counting:
        bos_token_id = None

        def __call__(self, text, **options):
            read.append(len(text))
            return tiny().tokenizer(text, **options)

    found = chunks(stand_in(tokenizer=Counting()), [text], "here", 64, 9, seed=0)
    assert sum(read) < len(text) / 10
    whole = encode(tiny().tokenizer, text)
    assert [sample.ids for sample in found] == [tuple(whole[64 * part : 64 * part + 64]) for part in range(9)]


def test_the_token_a_tokenizer_opens_texts_with_opens_every_sample():
    class Opening:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = [ord(character) for character in text]
            return type("Encoding", (), {"input_ids": [7] * add_special_tokens + ids})

    found = chunks(stand_in(tokenizer=Opening()), ["abcdefgh"], "here", 4, 5, seed=0)
    assert [sample.ids for sample in found] == [(7, *map(ord, "abc")), (7, *map(ord, "def"))]


def test_short_text_is_an_error_that_says_what_was_needed(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    with pytest.raises(TextError, match=r"short\.txt: no document has 160 tokens, the longest has \d+; give longer"):
        get_task("perplexity").samples(tiny(), dataclasses.replace(SETTINGS, text=str(text)))


@pytest.mark.parametrize("prefix", [159, 160, 500])
def test_a_prefix_that_leaves_nothing_to_score_is_an_error(prefix):
    with pytest.raises(EvaluationError, match=f"--prefix {prefix} leaves nothing to score of --length 160"):
        get_task("perplexity").samples(tiny(), dataclasses.replace(SETTINGS, prefix=prefix))


def test_a_model_that_has_fallen_apart_is_an_error_and_not_a_nan():
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    sample = Sample("document", tuple(range(160)))
    with pytest.raises(EvaluationError, match="the loss on document is nan"):
        get_task("perplexity").measure(stand_in(model=model), Subject(), sample, SETTINGS)


def test_a_model_of_another_family_goes_through_the_same_task():
    model = build("gemma3", torch.float32)
    info = _info(model)
    plan = Plan.build(info, {i: uniform(4).layers[i] for i in info.quantizable}, SHORT)
    sample = Sample("document", tuple(range(160)))
    loaded = stand_in(model=model, info=info)
    records = [
        get_task("perplexity").measure(loaded, subject, sample, SETTINGS) for subject in (Subject(), Subject("p", plan))
    ]
    assert records[1]["nll"] != records[0]["nll"]
    steps = [(before, min(16, 159 - before)) for before in range(64, 159, 16)]
    assert records[1]["attended"]["quantized"] == 2 * sum(before * queries for before, queries in steps)
    assert records[1]["attended"]["total"] > 2 * sum(before * queries for before, queries in steps)
    assert isinstance(Subject().cache(loaded.config, 160), DynamicCache)


def _info(model):
    from kvmix_cli.models.geometry import model_info

    return model_info(model.config, "gemma3", None)


def rows_of_a_file(tmp_path):
    """Lines of text, as WikiText has them, in one file of rows."""
    lines = [f"line {number}: " + " ".join(str(number * other) for other in range(30)) for number in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path, lines


def test_wikitext2_is_read_in_consecutive_parts_of_one_document(tmp_path):
    path, lines = rows_of_a_file(tmp_path)
    settings = dataclasses.replace(SETTINGS, text=f"wikitext2:{path}", limit=4)
    samples = get_task("perplexity").samples(tiny(), settings)
    whole = encode(tiny().tokenizer, "\n\n".join(lines))
    assert [token for sample in samples for token in sample.ids] == whole[: 4 * 160]
    described = get_task("perplexity").describe(samples, settings)
    assert described.startswith(
        f"4 consecutive parts of 160 tokens from wikitext2 ({path}, rows joined): 64 prefilled,"
    )
    assert described.endswith("compare with the unquantized row, not with one-pass figures")


def test_c4_is_read_in_documents_that_are_long_enough(tmp_path):
    path, lines = rows_of_a_file(tmp_path)
    settings = dataclasses.replace(SETTINGS, text=f"c4:{path}", length=66, limit=4)
    samples = get_task("perplexity").samples(tiny(), settings)
    starts = [tuple(encode(tiny().tokenizer, line)[:66]) for line in lines]
    assert all(sample.ids in starts for sample in samples)
    assert "documents of 66 tokens from c4" in get_task("perplexity").describe(samples, settings)
