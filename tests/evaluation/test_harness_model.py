"""The model `kvmix` of lm-eval: the same answers as lm-eval's own at 16 bits, and honest ones below."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from chatty import chatty, ends_texts
from evaluating import shallow, stand_in, tiny, uniform
from generation_files import GENERATION_FILES
from harness_tasks import CHOOSE, DOCUMENTS, GENERATE, NAMES, ROLL, asked, plain, replies, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from transformers import GenerationConfig

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, ModelError, PlanError, TextError
from kvmix_cli.evaluation.tasks.lm_eval.answers import Answerer, RequestAnswer, parse_batch_size
from kvmix_cli.evaluation.tasks.lm_eval.model import KvmixLM
from kvmix_cli.evaluation.tasks.lm_eval.requests import GENERATE as GENERATING
from kvmix_cli.evaluation.tasks.lm_eval.requests import ROLL as ROLLING
from kvmix_cli.evaluation.tasks.lm_eval.requests import SCORE as SCORING
from kvmix_cli.evaluation.tasks.lm_eval.requests import TokenRequest, encode_requests

TWO, FULL = (Subject(name, uniform(bits, info=shallow().info)) for name, bits in (("two", 2), ("full", 16)))


@pytest.fixture(scope="module")
def requests(folder):
    """All requests of the local tasks, by kind."""
    lm = KvmixLM(shallow(), step=8)
    results = asked(folder, lm)
    found = {}
    for task, kind in zip(NAMES, (GENERATING, SCORING, SCORING, ROLLING), strict=True):
        instances = [
            Instance(kind, {}, argument, 0, (task, sample["doc_id"], 1))
            for sample in results["samples"][task]
            if sample["filter"] == "none"
            for argument in sample["arguments"]
        ]
        found[task] = encode_requests(lm, kind, instances)
    return found


def answers(requests, subject, **options):
    reading = Answerer(**{"loaded": shallow(), "subject": subject, "step": 8, **options})
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


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "size"), [(Subject(), "auto"), (FULL, 1)], ids=["unquantized", "sixteen bits"])
def test_at_16_bits_every_reply_and_every_number_is_lm_evals_own(folder, expected, subject, size):
    found = asked(folder, KvmixLM(shallow(), subject=subject, batch_size=size))
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


@pytest.mark.slow
@pytest.mark.parametrize("task", NAMES)
def test_a_batch_reads_what_each_of_its_rows_reads_alone(requests, task):
    some = requests[task]
    assert len({request.prefill for request in some}) > 1 or task == "local_roll"
    close(answers(some, FULL, rows=1), answers(some, FULL, rows=8), 1e-5)
    close(answers(some, TWO, rows=1), answers(some, TWO, rows=8), 5e-3)


@pytest.mark.slow
def test_the_very_first_token_of_an_answer_has_read_quantized_keys_and_values(requests):
    """A plain `generate` would decide it by the prefill pass, at any bits."""
    first = [dataclasses.replace(each, generation=_settings(max_gen_toks=1)) for each in requests["local_generate"]]
    one = Subject("one", uniform(1))
    assert answers(first, one, loaded=tiny()) != answers(first, Subject(), loaded=tiny())
    for answer in Answerer(tiny(), one, 8).answers(first):
        assert answer.tokens == 1
        assert answer.attended["quantized"] > 0.5 * answer.attended["total"]


@pytest.mark.parametrize(("tokens", "prompt", "context"), [(1, 0, 0), (8, 0, 0), (9, 0, 8), (16, 0, 8), (17, 16, 16)])
def test_at_least_the_last_token_before_an_answer_goes_through_the_cache(monkeypatch, tokens, prompt, context):
    monkeypatch.setattr(KvmixLM, "encode_prompt", lambda self, text: [5] * tokens)
    monkeypatch.setattr(KvmixLM, "encode_pairs", lambda self, kind, instance: [([5] * tokens, [6, 7])])
    lm = KvmixLM(shallow(), step=8)
    (asked,) = encode_requests(lm, GENERATING, [Instance(GENERATING, {}, ("", {"max_gen_toks": 2}), 0, ("task", 0, 1))])
    (scored,) = encode_requests(lm, SCORING, [Instance(SCORING, {}, ("", ""), 0, ("task", 0, 1))])
    assert (asked.prefill, scored.prefill) == (prompt, context)
    ((text, *_),) = [answers([asked], TWO)]
    assert isinstance(text, str)


@pytest.mark.slow
def test_below_16_bits_every_kind_of_request_reads_quantized_tokens_and_says_how_many(requests):
    for task in NAMES:
        seen = [answer.attended for answer in Answerer(shallow(), TWO, 8).answers(requests[task])]
        assert all(each["quantized"] > 0.4 * each["total"] > 0 for each in seen), task


def test_text_without_a_context_reads_nothing_quantized_and_the_share_shows_it():
    lm = KvmixLM(shallow(), subject=TWO)
    request = Instance(SCORING, {}, ("", " a few words"), 0, ("task", 0, 1))
    ((value, _),) = lm.loglikelihood([request])
    assert value == pytest.approx(plain().loglikelihood([request])[0][0], rel=1e-4)
    assert lm.quantized_share == 0


@pytest.mark.slow
def test_what_does_not_fit_is_cut_on_the_left_as_lm_eval_cuts_it(folder, limit=48):
    expected = asked(folder, plain(max_length=limit, batch_size=1))
    found = asked(folder, KvmixLM(shallow(), max_length=limit))
    ours, theirs = replies(found), replies(expected)
    assert ours["local_generate"] == theirs["local_generate"]
    for task, metric in (
        ("local_choose", "acc,none"),
        ("local_score", "perplexity,none"),
        ("local_roll", "bits_per_byte,none"),
    ):
        assert found["results"][task][metric] == pytest.approx(expected["results"][task][metric], rel=1e-3)


@pytest.mark.slow
def test_a_long_text_is_scored_in_lm_evals_windows_and_each_of_its_tokens_once(tmp_path):
    text = write_tasks(tmp_path, ROLL)
    lm = KvmixLM(shallow(), subject=TWO, max_length=64)
    asked(text, lm, ["local_roll"])
    instance = Instance(ROLLING, {}, ("one two three " * 80,), 0, ("task", 3, 1))
    found = encode_requests(lm, ROLLING, [instance])
    assert len(found) > 2
    assert {request.owner for request in found} == {0}
    assert sum(request.scored for request in found) == len(lm.tok_encode("one two three " * 80))
    (whole,) = lm.loglikelihood_rolling([instance])
    assert whole == pytest.approx(sum(value for value, _ in answers(found, TWO, step=32)), rel=5e-3)


@pytest.mark.slow
def test_an_end_of_text_inside_a_prompt_does_not_end_the_answer(folder):
    loaded = chatty("{% for m in messages %}<user>{{ m.content }}</s>\n{% endfor %}<model>", shallow())
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    expected = replies(asked(folder, plain(loaded), ["local_generate"], **options), ["local_generate"])
    found = replies(asked(folder, KvmixLM(loaded), ["local_generate"], **options), ["local_generate"])
    assert found == expected
    assert any(text for ((text,),) in found["local_generate"].values())


@pytest.mark.slow
def test_prompts_with_examples_are_lm_evals_own(folder, tmp_path):
    some = write_tasks(tmp_path, GENERATE, CHOOSE, training_split="train", fewshot_split="train")
    names = ("local_generate", "local_choose")
    expected, found = (asked(some, lm, names, num_fewshot=1) for lm in (plain(), KvmixLM(shallow())))
    assert replies(found, names)["local_generate"] == replies(expected, names)["local_generate"]
    assert found["results"]["local_choose"]["acc,none"] == expected["results"]["local_choose"]["acc,none"]


@pytest.mark.slow
def test_sampled_answers_differ_from_each_other_and_come_again():
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "until": []}
    instances = [Instance(GENERATING, {}, ("The value is", sampled), 0, ("task", 0, 3))] * 3
    one, again = (KvmixLM(shallow(), subject=TWO, seed=5).generate_until(instances) for _ in range(2))
    assert one == again
    assert len(set(one)) == 3
    assert KvmixLM(shallow(), subject=TWO, seed=6).generate_until(instances) != one


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(requests, monkeypatch):
    """Requests of different kinds and settings never share a batch."""
    sizes, whole = [], Answerer._answer

    def limited(answerer, batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return whole(answerer, batch)

    some = requests["local_roll"] + requests["local_generate"]
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "_answer", limited)
        found = answers(some, FULL)
    assert sizes.count(DOCUMENTS) == 1
    close(found, answers(some, FULL, rows=1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_request_that_does_not_fit_alone_is_an_error_after_the_answers_before_it(requests, monkeypatch, error):
    some, whole = requests["local_choose"], Answerer._score

    def limited(answerer, batch):
        if some[3] in batch:
            raise error
        return whole(answerer, batch)

    monkeypatch.setattr(Answerer, "_score", limited)
    found = Answerer(shallow(), FULL, 8).answers(some)
    assert [next(found).tokens for _ in range(3)] == [each.scored for each in some[:3]]
    with pytest.raises(EvaluationError, match=rf"out of memory at {some[3].name} alone, \d+ tokens on cpu; .*--resume"):
        next(found)


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

    def count(answerer, batch):
        seen.append(len(batch))
        return [RequestAnswer([0.0, True], 1, {"total": 0, "quantized": 0})] * len(batch)

    monkeypatch.setattr(Answerer, "_score", count)
    some = [TokenRequest(str(n), (0,) * length, SCORING, n, "task", n, 0, 1) for n, length in enumerate(lengths)]
    list(Answerer(stand_in(device=torch.device(device)), FULL, 8).answers(some))
    assert seen == sizes


def test_batch_sizes_are_numbers_or_auto():
    assert [parse_batch_size(size) for size in (None, "auto", "auto:4", 3, "12")] == [None, None, None, 3, 12]
    assert parse_batch_size("auto", 16) == 16
    for size in ("0", "many", -1, "1.5"):
        with pytest.raises(EvaluationError, match="expected a number of at least 1, or auto"):
            parse_batch_size(size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_gen_toks": 64}, "asks for up to 64 new tokens, which leaves no room for a prompt in 64"),
        ({"num_beams": 4}, "wants num_beams 4"),
        ({"do_sample": True, "temperature": 0.0}, "samples at temperature 0; use a temperature above 0"),
        ({"temprature": 0.5}, r"has the generation setting 'temprature' \(did you mean 'temperature'\?\)"),
    ],
)
def test_prompts_that_cannot_be_answered_are_errors(settings, said):
    instance = Instance(GENERATING, {}, ("a prompt", settings), 0, ("task", 7, 1))
    with pytest.raises(EvaluationError, match=f"task/7/0 {said}"):
        KvmixLM(shallow(), max_length=64).generate_until([instance])


def test_settings_without_effect_here_are_passed_over():
    given = {"max_gen_toks": 4, "until": [], "num_beams": 1, "use_cache": True, "max_length": 99}
    instance = Instance(GENERATING, {}, ("a prompt", given), 0, ("task", 7, 1))
    (request,) = encode_requests(KvmixLM(shallow()), GENERATING, [instance])
    assert json.loads(request.generation) == {"do_sample": False, "max_gen_toks": 4, "until": ["</s>"]}


@pytest.mark.slow
@pytest.mark.parametrize("file", GENERATION_FILES[::4], ids=",".join)  # all of them in decoding/test_batch.py
def test_a_checkpoints_generation_settings_change_no_answer(requests, monkeypatch, file):
    some = requests["local_generate"][:2]
    plain = [answers(some, subject) for subject in (Subject(), TWO)]
    monkeypatch.setattr(shallow().model, "generation_config", GenerationConfig(**file))
    assert [answers(some, subject) for subject in (Subject(), TWO)] == plain


def test_a_tokenizer_that_ends_every_text_ends_neither_prompts_nor_contexts():
    """Behind an end token an answer would begin a new document."""
    ending = ends_texts(shallow())
    assert ending.tokenizer("a").input_ids[-1] == ending.tokenizer.eos_token_id
    instances = {
        GENERATING: Instance(GENERATING, {}, ("The value is", {"max_gen_toks": 4}), 0, ("task", 0, 1)),
        SCORING: Instance(SCORING, {}, ("The value is", " a number"), 0, ("task", 0, 1)),
        ROLLING: Instance(ROLLING, {}, ("The value is a number",), 0, ("task", 0, 1)),
    }
    for kind, instance in instances.items():
        plain, ended = (encode_requests(KvmixLM(loaded), kind, [instance]) for loaded in (shallow(), ending))
        assert ended == plain


def test_a_chat_template_that_loses_the_question_is_an_error(folder):
    loaded = chatty(
        "{% for m in messages %}{% for part in m.content if part.text %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(
        TextError, match="chat template of builtin:tiny cannot be used: it leaves out what the user says"
    ):
        asked(folder, KvmixLM(loaded), ["local_generate"], apply_chat_template=True)


@pytest.mark.parametrize("continuation", ["", " word" * 100])
def test_continuations_that_cannot_be_scored_are_errors(continuation):
    instance = Instance(SCORING, {}, ("a context", continuation), 0, ("task", 7, 1))
    with pytest.raises(EvaluationError, match=r"task/7/0: a continuation of \d+ tokens cannot be scored"):
        KvmixLM(shallow(), max_length=64).loglikelihood([instance])


def test_a_model_that_has_fallen_apart_is_an_error_and_not_a_nan():
    class Broken:
        config = shallow().model.config

        def __call__(self, input_ids, **_):
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 4096), torch.nan))

    loaded = stand_in(model=Broken())
    some = [TokenRequest("task/0/0", tuple(range(9)), SCORING, 0, "task", 0, 0, 4)]
    with pytest.raises(
        EvaluationError, match="log-likelihood of task/0/0 is nan, not a finite number; try another --dtype"
    ):
        list(Answerer(loaded, FULL, 8).answers(some))


@pytest.mark.slow
def test_lm_eval_finds_the_model_by_its_name_and_its_plan_in_a_file(folder, tmp_path):
    assert get_model("kvmix") is KvmixLM
    path = tmp_path / "two.yaml"
    uniform(2).save(path)
    given = f"pretrained=builtin:tiny,plan={path},device=cpu"
    results = asked(folder, "kvmix", ["local_choose"], model_args=given, batch_size=2)
    same = asked(folder, KvmixLM(tiny(), subject=Subject("two", uniform(2))), ["local_choose"])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_an_interruption_leaves_in_lm_evals_own_cache_is_no_answer(folder, tmp_path, monkeypatch):
    """HFLM notes down replies as it goes, and ours are not known yet when it takes texts apart."""

    def ask():
        name = ["local_roll"]
        return replies(asked(folder, KvmixLM(shallow()), name, use_cache=str(tmp_path / "cache")), name)["local_roll"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answerer, "_score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ask()
    first = ask()
    assert max(numbers(list(first.values()))) < -10
    assert ask() == first


def _settings(**changes):
    return json.dumps({"do_sample": False, "until": ["</s>"], "max_gen_toks": 8, **changes}, sort_keys=True)
