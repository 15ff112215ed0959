"""The model `kvmix` of lm-eval: the same answers as lm-eval's own at 16 bits, and honest ones below."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from architectures import VOCABULARY, build
from chatty import chatty
from evaluating import SHORT, stand_in, tiny, uniform
from harness_tasks import CHOOSE, DOCUMENTS, GENERATE, NAMES, ROLL, asked, plain, replies, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import EvaluationError, ModelError, PlanError
from kvmix_cli.evaluation.tasks.lm_eval import batches
from kvmix_cli.evaluation.tasks.lm_eval.batches import Reading, rows
from kvmix_cli.evaluation.tasks.lm_eval.model import KvmixLM
from kvmix_cli.evaluation.tasks.lm_eval.requests import GENERATE as GENERATING
from kvmix_cli.evaluation.tasks.lm_eval.requests import ROLL as ROLLING
from kvmix_cli.evaluation.tasks.lm_eval.requests import SCORE as SCORING
from kvmix_cli.evaluation.tasks.lm_eval.requests import Request, encode
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import Plan

TWO, FULL = (Subject(name, uniform(bits)) for name, bits in (("two", 2), ("full", 16)))
ONE = Subject("one", uniform(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def expected(folder):
    """What lm-eval's own model says."""
    return asked(folder, plain(batch_size=4))


@pytest.fixture(scope="module")
def requests(folder):
    """All requests of the local tasks, by kind."""
    lm = KvmixLM(tiny(), step=8)
    results = asked(folder, lm)
    found = {}
    for task, kind in zip(NAMES, (GENERATING, SCORING, SCORING, ROLLING), strict=True):
        instances = [
            Instance(kind, {}, argument, 0, (task, sample["doc_id"], 1))
            for sample in results["samples"][task]
            if sample["filter"] == "none"
            for argument in sample["arguments"]
        ]
        found[task] = encode(lm, kind, instances)
    return found


def answers(requests, subject, **options):
    reading = Reading(**{"loaded": tiny(), "subject": subject, "step": 8, **options})
    return [answer.value for answer in reading.answers(requests)]


def numbers(reply):
    """Everything in a reply of lm-eval's, flat; True counts as 1."""
    return [float(reply)] if not isinstance(reply, list | tuple) else [n for part in reply for n in numbers(part)]


def close(one, other, tolerance):
    """Texts the same, log-likelihoods nearly, and greedy or not the same."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, str):
            assert mine == theirs
        else:
            assert mine[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
            assert mine[1] == theirs[1]


@pytest.mark.parametrize(("subject", "size"), [(Subject(), "auto"), (FULL, 1)], ids=["unquantized", "sixteen bits"])
def test_at_16_bits_every_reply_and_every_number_is_lm_evals_own(folder, expected, subject, size):
    found = asked(folder, KvmixLM(tiny(), subject=subject, batch_size=size))
    ours, theirs = replies(found), replies(expected)
    assert ours["local_generate"] == theirs["local_generate"]
    assert any(text for ((text,),) in ours["local_generate"].values())
    for task in NAMES[1:]:
        for document, reply in theirs[task].items():
            assert numbers(ours[task][document]) == pytest.approx(numbers(reply), rel=1e-4)
    for task in NAMES:
        mine, wanted = (results["results"][task] for results in (found, expected))
        assert {key: mine[key] for key in wanted} == {
            key: value if isinstance(value, str) else pytest.approx(value, rel=1e-3) for key, value in wanted.items()
        }


@pytest.mark.parametrize("task", NAMES)
def test_a_batch_reads_what_each_of_its_rows_reads_alone(requests, task):
    some = requests[task]
    assert len({request.prefill for request in some}) > 1 or task == "local_roll"
    close(answers(some, FULL, rows=1), answers(some, FULL, rows=8), 1e-5)
    close(answers(some, TWO, rows=1), answers(some, TWO, rows=8), 5e-3)


@pytest.mark.parametrize("family", ["gemma3", "falcon", "gpt_neox", "gpt_oss"])
def test_rows_of_other_families_share_contexts_and_batches_as_well(family):
    """With sliding windows, attention of their own, without grouped heads, with attention sinks."""
    model = build(family, torch.float32)
    info = model_info(model.config, family, None)
    plan = Plan.build(info, {index: uniform(4).layers[0] for index in info.quantizable}, SHORT)
    loaded = stand_in(model=model, info=info, tokenizer=tiny().tokenizer)
    contexts = torch.randint(3, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(0)).tolist()
    scored = [
        Request(str(n), (*contexts[n // 3][:70], *range(5, 6 + n)), SCORING, n, "task", n, 64, n + 1) for n in range(6)
    ]
    asked = [
        Request(str(n), tuple(contexts[n][: 66 + 9 * n]), GENERATING, n, "task", n, 64, 0, _settings()) for n in (0, 1)
    ]
    for subject in (Subject(), Subject("four", plan)):
        alone, together = (answers([*scored, *asked], subject, loaded=loaded, rows=rows) for rows in (1, 8))
        close(alone, together, 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("subject", [TWO, FULL], ids=["two bits", "sixteen bits"])
def test_a_continuation_is_scored_by_queries_that_went_through_the_cache(requests, subject):
    """Against one row alone: prefill, then steps, then the probabilities of what follows."""
    for request, (value, _) in zip(requests["local_choose"], answers(requests["local_choose"], subject), strict=True):
        cache = subject.cache(tiny().config, reserve=len(request.ids))
        prefill(tiny(), cache, request.ids[: request.prefill])
        logits = torch.cat([part for _, part in feed(tiny(), cache, request.ids[request.prefill : -1], step=8)])
        wanted = torch.tensor(request.ids[-request.scored :])
        expected = logits.log_softmax(-1)[-request.scored :].gather(1, wanted[:, None]).sum().item()
        assert value == pytest.approx(expected, rel=5e-3)


@torch.inference_mode()
def test_an_answer_is_greedy_decoding_token_by_token_through_the_cache(requests):
    lm = KvmixLM(tiny(), step=8)
    for request, text in zip(requests["local_generate"], answers(requests["local_generate"], TWO), strict=True):
        cache = TWO.cache(tiny().config, reserve=len(request.ids) + 16)
        prefill(tiny(), cache, request.ids[: request.prefill])
        *_, (_, logits) = feed(tiny(), cache, request.ids[request.prefill :], step=1)
        found = [int(logits[-1].argmax())]
        while len(found) < 10:
            ((_, logits),) = feed(tiny(), cache, found[-1:], step=1)
            found.append(int(logits[-1].argmax()))
        whole = lm.tok_decode(found)
        assert text == whole.split(" the")[0].split("\n\n")[0]


def test_the_very_first_token_of_an_answer_has_read_quantized_keys_and_values(requests):
    """A plain `generate` would decide it by the prefill pass, at any bits."""
    first = [dataclasses.replace(each, generation=_settings(max_gen_toks=1)) for each in requests["local_generate"]]
    assert answers(first, ONE) != answers(first, Subject())
    for answer in Reading(tiny(), ONE, 8).answers(first):
        assert answer.tokens == 1
        assert answer.attended["quantized"] > 0.5 * answer.attended["total"]


@pytest.mark.parametrize(("tokens", "prompt", "context"), [(1, 0, 0), (8, 0, 0), (9, 0, 8), (16, 0, 8), (17, 16, 16)])
def test_at_least_the_last_token_before_an_answer_goes_through_the_cache(monkeypatch, tokens, prompt, context):
    monkeypatch.setattr(KvmixLM, "encode_prompt", lambda self, text: [5] * tokens)
    monkeypatch.setattr(KvmixLM, "encode_pairs", lambda self, kind, instance: [([5] * tokens, [6, 7])])
    lm = KvmixLM(tiny(), step=8)
    (asked,) = encode(lm, GENERATING, [Instance(GENERATING, {}, ("", {"max_gen_toks": 2}), 0, ("task", 0, 1))])
    (scored,) = encode(lm, SCORING, [Instance(SCORING, {}, ("", ""), 0, ("task", 0, 1))])
    assert (asked.prefill, scored.prefill) == (prompt, context)
    ((text, *_),) = [answers([asked], TWO)]
    assert isinstance(text, str)


def test_below_16_bits_every_kind_of_request_reads_quantized_tokens_and_says_how_many(requests):
    for task in NAMES:
        seen = [answer.attended for answer in Reading(tiny(), TWO, 8).answers(requests[task])]
        assert all(each["quantized"] > 0.4 * each["total"] > 0 for each in seen), task


def test_text_without_a_context_reads_nothing_quantized_and_the_share_shows_it():
    lm = KvmixLM(tiny(), subject=TWO)
    request = Instance(SCORING, {}, ("", " a few words"), 0, ("task", 0, 1))
    ((value, _),) = lm.loglikelihood([request])
    assert value == pytest.approx(plain().loglikelihood([request])[0][0], rel=1e-4)
    assert lm.quantized_share == 0


def test_what_does_not_fit_is_cut_on_the_left_as_lm_eval_cuts_it(folder, limit=48):
    expected = asked(folder, plain(max_length=limit, batch_size=1))
    found = asked(folder, KvmixLM(tiny(), max_length=limit))
    ours, theirs = replies(found), replies(expected)
    assert ours["local_generate"] == theirs["local_generate"]
    for task, metric in (
        ("local_choose", "acc,none"),
        ("local_score", "perplexity,none"),
        ("local_roll", "bits_per_byte,none"),
    ):
        assert found["results"][task][metric] == pytest.approx(expected["results"][task][metric], rel=1e-3)


def test_a_long_text_is_scored_in_lm_evals_windows_and_each_of_its_tokens_once(folder):
    text = write_tasks(folder / "long", ROLL)
    lm = KvmixLM(tiny(), subject=TWO, max_length=64)
    asked(text, lm, ["local_roll"])
    instance = Instance(ROLLING, {}, ("one two three " * 80,), 0, ("task", 3, 1))
    found = encode(lm, ROLLING, [instance])
    assert len(found) > 2
    assert {request.owner for request in found} == {0}
    assert sum(request.scored for request in found) == len(lm.tok_encode("one two three " * 80))
    (whole,) = lm.loglikelihood_rolling([instance])
    assert whole == pytest.approx(sum(value for value, _ in answers(found, TWO, step=32)), rel=5e-3)


def test_an_end_of_text_inside_a_prompt_does_not_end_the_answer(folder):
    loaded = chatty("{% for m in messages %}<user>{{ m.content }}</s>\n{% endfor %}<model>")
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    expected = replies(asked(folder, plain(loaded), ["local_generate"], **options), ["local_generate"])
    found = replies(asked(folder, KvmixLM(loaded), ["local_generate"], **options), ["local_generate"])
    assert found == expected
    assert any(text for ((text,),) in found["local_generate"].values())


def test_prompts_with_examples_are_lm_evals_own(folder, tmp_path):
    some = write_tasks(tmp_path, GENERATE, CHOOSE, training_split="train", fewshot_split="train")
    names = ("local_generate", "local_choose")
    expected, found = (asked(some, lm, names, num_fewshot=1) for lm in (plain(), KvmixLM(tiny())))
    assert replies(found, names)["local_generate"] == replies(expected, names)["local_generate"]
    assert found["results"]["local_choose"]["acc,none"] == expected["results"]["local_choose"]["acc,none"]


def test_sampled_answers_differ_from_each_other_and_come_again():
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "until": []}
    instances = [Instance(GENERATING, {}, ("The value is", sampled), 0, ("task", 0, 3))] * 3
    one, again = (KvmixLM(tiny(), subject=TWO, seed=5).generate_until(instances) for _ in range(2))
    assert one == again
    assert len(set(one)) == 3
    assert KvmixLM(tiny(), subject=TWO, seed=6).generate_until(instances) != one


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(requests, monkeypatch, most=1):
    sizes = []
    for name in ("generate", "score"):
        whole = getattr(batches, name)

        def limited(loaded, subject, batch, *rest, whole=whole):
            sizes.append(len(batch))
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return whole(loaded, subject, batch, *rest)

        monkeypatch.setattr(batches, name, limited)
    some = requests["local_roll"] + requests["local_generate"]
    found = answers(some, FULL)
    assert sizes.count(DOCUMENTS) == 1
    monkeypatch.undo()
    close(found, answers(some, FULL, rows=1), 1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_a_request_that_does_not_fit_alone_is_an_error_after_the_answers_before_it(requests, monkeypatch, error):
    whole = batches.score

    def limited(loaded, subject, batch, step):
        if some[3] in batch:
            raise error
        return whole(loaded, subject, batch, step)

    some = requests["local_choose"]
    monkeypatch.setattr(batches, "score", limited)
    found = Reading(tiny(), FULL, 8).answers(some)
    assert [next(found).tokens for _ in range(3)] == [each.scored for each in some[:3]]
    with pytest.raises(EvaluationError, match=rf"out of memory at {some[3].name} alone, \d+ tokens on cpu; .*--resume"):
        next(found)


def test_other_errors_are_not_taken_for_a_lack_of_memory(requests, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(batches, "score", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        answers(requests["local_choose"], FULL)


def test_a_context_that_several_requests_share_is_prefilled_once(requests, monkeypatch):
    from kvmix_cli.evaluation.tasks.lm_eval import rows as entering

    shapes = []
    whole = entering.prefill
    monkeypatch.setattr(
        entering, "prefill", lambda loaded, cache, ids: shapes.append(ids.shape) or whole(loaded, cache, ids)
    )
    some = requests["local_choose"]
    answers(some, TWO, rows=3)
    assert len(some) == 3 * DOCUMENTS
    assert [rows for rows, _ in shapes] == [1] * DOCUMENTS


@pytest.mark.parametrize(
    ("device", "lengths", "sizes"),
    [
        ("cpu", [100] * 20, [8, 8, 4]),
        ("cpu", [8000] * 4, [2, 2]),
        ("cpu", [50_000] * 2, [1, 1]),
        ("cuda", [100] * 70, [64, 6]),
    ],
)
def test_a_batch_size_that_fits_is_found(monkeypatch, device, lengths, sizes):
    seen = []

    def count(loaded, subject, batch, step):
        seen.append(len(batch))
        return [(0.0, True)] * len(batch), {}

    monkeypatch.setattr(batches, "score", count)
    some = [Request(str(n), (0,) * length, SCORING, n, "task", n, 0, 1) for n, length in enumerate(lengths)]
    list(Reading(stand_in(device=torch.device(device)), FULL, 8).answers(some))
    assert seen == sizes


def test_batch_sizes_are_numbers_or_auto():
    assert [rows(size) for size in (None, "auto", "auto:4", 3, "12")] == [None, None, None, 3, 12]
    assert rows("auto", 16) == 16
    for size in ("0", "many", -1, "1.5"):
        with pytest.raises(EvaluationError, match="is no batch size; use a number or auto"):
            rows(size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_gen_toks": 64}, "asks for up to 64 new tokens, which leaves no room for a prompt in 64"),
        ({"num_beams": 4}, "wants num_beams 4"),
    ],
)
def test_prompts_that_cannot_be_answered_are_errors(settings, said):
    instance = Instance(GENERATING, {}, ("a prompt", settings), 0, ("task", 7, 1))
    with pytest.raises(EvaluationError, match=f"task/7/0 {said}"):
        KvmixLM(tiny(), max_length=64).generate_until([instance])


@pytest.mark.parametrize("continuation", ["", " word" * 100])
def test_continuations_that_cannot_be_scored_are_errors(continuation):
    instance = Instance(SCORING, {}, ("a context", continuation), 0, ("task", 7, 1))
    with pytest.raises(EvaluationError, match=r"task/7/0: a continuation of \d+ tokens cannot be scored"):
        KvmixLM(tiny(), max_length=64).loglikelihood([instance])


def test_a_model_that_has_fallen_apart_is_an_error_and_not_a_nan():
    class Broken:
        config = tiny().model.config

        def __call__(self, input_ids, **_):
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 4096), torch.nan))

    loaded = stand_in(model=Broken())
    some = [Request("task/0/0", tuple(range(9)), SCORING, 0, "task", 0, 0, 4)]
    with pytest.raises(EvaluationError, match="the log-likelihood of task/0/0 is nan; try another --dtype"):
        list(Reading(loaded, FULL, 8).answers(some))


def test_lm_eval_finds_the_model_by_its_name_and_its_plan_in_a_file(folder, tmp_path):
    assert get_model("kvmix") is KvmixLM
    path = tmp_path / "two.yaml"
    uniform(2).save(path)
    given = f"pretrained=builtin:tiny,plan={path},device=cpu"
    results = asked(folder, "kvmix", ["local_choose"], model_args=given, batch_size=2)
    same = asked(folder, KvmixLM(tiny(), subject=TWO), ["local_choose"])
    for document, replied in replies(same, ["local_choose"])["local_choose"].items():
        mine = replies(results, ["local_choose"])["local_choose"][document]
        assert [each[0][0] for each in mine] == pytest.approx([each[0][0] for each in replied], rel=5e-3)
    assert results["config"]["plan"] == "0-7:k2v2"
    assert results["config"]["nominal_bits"] == 2
    assert results["config"]["quantized_share"] > 0.5


def test_the_device_that_lm_evals_command_asks_for_by_itself_is_taken_if_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert KvmixLM("builtin:tiny", device="cuda:0").loaded.device.type == "cpu"
    with pytest.raises(ModelError, match="no device 'cuda:1' here"):
        KvmixLM("builtin:tiny", device="cuda:1")


def test_lm_eval_is_told_if_nothing_quantized_was_read(folder, caplog):
    results = asked(folder, "kvmix", ["local_choose"], model_args="pretrained=builtin:tiny,plan=0-7:k2v2,device=cpu")
    assert results["config"]["quantized_share"] == 0
    assert "nothing quantized was read" in caplog.text


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"pretrained": "no/such/model"}, ModelError, "no folder no/such/model"),
        ({"plan": "0-3:k4"}, PlanError, "k4"),
        ({"plan": "no.yaml"}, PlanError, "no.yaml"),
    ],
)
def test_models_and_plans_that_are_not_there_are_errors(given, error, said):
    with pytest.raises(error, match=said):
        KvmixLM(**{"pretrained": "builtin:tiny", "device": "cpu", **given})


def test_what_an_interruption_leaves_in_lm_evals_own_cache_is_no_answer(folder, tmp_path, monkeypatch):
    """HFLM notes down replies as it goes, and ours are not known yet when it takes texts apart."""

    def ask():
        name = ["local_roll"]
        return replies(asked(folder, KvmixLM(tiny()), name, use_cache=str(tmp_path / "cache")), name)["local_roll"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batches, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ask()
    first = ask()
    assert max(numbers(list(first.values()))) < -10
    assert ask() == first


def _settings(**changes):
    return json.dumps({"do_sample": False, "until": ["</s>"], "max_gen_toks": 8, **changes}, sort_keys=True)
