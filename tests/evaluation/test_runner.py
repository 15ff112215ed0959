import pytest
import torch
from evaluating import INFO, SHORT, Counting, stand_in, tiny, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, PolicyError, QuantizationError
from kvmix_cli.evaluation import SETS, get_task, tasks
from kvmix_cli.evaluation.base import Sample, Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks import lm_eval as harness
from kvmix_cli.plan import CacheSettings

TWO, EIGHT = (Subject(name, uniform(bits, info=INFO)) for name, bits in (("two", 2), ("eight", 8)))


def run(task, *subjects, **settings):
    return run_task(task, stand_in(), subjects, Settings(**settings))


def test_the_unquantized_cache_comes_first_on_the_same_samples():
    task = Counting()
    report = run(task, TWO, EIGHT)
    assert [name for name, _ in task.measured] == ["unquantized"] * 4 + ["two"] * 4 + ["eight"] * 4
    assert [row.value("number") for row in report.rows] == [17.5, 3.5, 9.5]
    assert [row.value("gain") for row in report.rows] == [None, 56, 32]
    assert [(row.nominal_bits, row.stored_bits) for row in report.rows] == [(16, 16), (2, 4), (8, 10)]
    assert [row.quantized_share for row in report.rows] == [0, 0.5, 0.5]
    assert report.tokens == 4


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (QuantizationError("layer 3 keys: NaN"), "layer 3 keys: NaN"),
        (PolicyError("layer 3: its queries are not shown"), "layer 3: its queries are not shown"),
        (EvaluationError("the loss is nan"), "the loss is nan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory at 1024 tokens on cpu"),
    ],
)
def test_a_plan_that_cannot_be_measured_does_not_take_the_others_with_it(error, said):
    def fail(subject, sample):
        if subject.name == "two" and sample.name == "2":
            raise error

    report = run(Counting(before=fail), TWO, EIGHT)
    broken = report.plans[0]
    assert said in broken.error
    assert broken.metrics == {}
    assert set(broken.as_json()) == {"task", "plan", "nominal_bits", "stored_bits", "quantized_share", "error"}
    assert report.plans[1].value("gain") == 32


def test_plans_are_measured_even_where_the_unquantized_cache_does_not_fit():
    def fail(subject, sample):
        if subject.plan is None:
            raise torch.OutOfMemoryError

    report = run(Counting(before=fail), TWO)
    assert report.reference.error
    assert report.plans[0].value("number") == 3.5
    assert report.plans[0].value("gain") is None
    assert report.tokens == 4


def test_other_errors_are_not_swallowed():
    def fail(subject, sample):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(Counting(before=fail), TWO)


def test_a_row_that_read_nothing_quantized_warns_and_says_why():
    report = run(Counting(share=0), TWO, Subject("full", uniform(16, info=INFO)))
    assert report.reference.warnings == ()
    assert "two: NOTHING QUANTIZED WAS READ" in report.plans[0].warnings[0]
    assert "larger --length" in report.plans[0].warnings[0]
    assert "16 bits everywhere" in report.plans[1].warnings[0]
    assert report.plans[0].as_json()["warnings"] == list(report.plans[0].warnings)


class Prompts(Counting):
    """Its samples have lengths of their own."""

    def context(self, settings):
        return None


def test_no_length_is_blamed_where_prompts_have_lengths_of_their_own():
    def fail(subject, sample):
        if subject is EIGHT:
            raise torch.OutOfMemoryError

    report = run(Prompts(share=0, before=fail), TWO, EIGHT, length=5000)
    assert report.plans[0].warnings[0].endswith("; ask something with longer prompts")
    assert report.plans[1].error == "out of memory on cpu; free some and go on with --resume"


@pytest.mark.parametrize(
    ("name", "options", "context", "advice"),
    [
        ("perplexity", {}, ("--length", 1024), "use a larger --length and --prefix"),
        ("memory", {}, ("--length", 1024), "use a larger --length"),
        ("recall", {}, ("--length", 1024), "use a larger --length"),
        ("passkey", {"contexts": (512, 2048)}, ("--contexts", 2048), "use a larger --contexts"),
        ("throughput", {"contexts": (512, 256)}, ("--contexts", 512), "use a larger --contexts"),
        ("longbench:qasper", {}, None, "ask something with longer prompts"),
    ],
)
def test_advice_names_the_option_that_makes_contexts_longer(name, options, context, advice):
    task = get_task(name, options)
    assert task.context(Settings()) == context
    assert task.longer(Settings()) == advice


def test_contexts_of_a_sweep_are_held_against_the_limit_and_not_the_length_that_they_replace():
    task = get_task("throughput", {"contexts": (64,), "batches": (1,), "new_tokens": 2, "repeats": 1})
    report = run_task(task, tiny(), [], Settings(length=5000))
    assert report.reference.value("decode_tokens_per_s") > 0


def test_a_window_that_holds_the_whole_context_is_found_out():
    plan = uniform(2, CacheSettings(page=512))
    settings = Settings(length=64, prefix=32, limit=1)
    report = run_task(get_task("perplexity"), tiny(), [Subject("two", plan)], settings)
    assert "NOTHING QUANTIZED WAS READ" in report.plans[0].warnings[0]
    assert report.plans[0].value("loss_increase") == pytest.approx(0, abs=1e-5)


def test_fewer_samples_than_asked_for_are_mentioned():
    class Short(Counting):
        def samples(self, loaded, settings):
            return [Sample("only", (1,))]

    assert run(Short(), TWO, limit=3).warnings == ("counting: builtin has 1 sample, not 3",)
    assert run(Short(), TWO, limit=1).warnings == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 4097}, "--length 4097 is more than the model's limit of 4096 tokens"),
        ({"length": 0}, "--length must be at least 1"),
        ({"prefix": -1}, "--prefix must be at least 1"),
        ({"step": 0}, "--step must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
    ],
)
def test_settings_out_of_range_are_errors(settings, said):
    with pytest.raises(EvaluationError, match=said):
        run(Counting(), TWO, **settings)


def test_unknown_tasks_are_errors_that_list_the_tasks(monkeypatch):
    """Those of lm-eval are tested in test_harness.py; here it is not installed."""
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert tasks()[:2] == ("perplexity", "recall")
    with pytest.raises(EvaluationError, match=r"no task 'recal' \(did you mean 'recall'\?\); there are perplexity, "):
        get_task("recal")
    with pytest.raises(
        EvaluationError, match=rf"no task 'long'.*; there are {', '.join([*tasks(), *SETS])}, and those of lm-eval"
    ):
        get_task("long")
    with pytest.raises(EvaluationError, match=r"\(did you mean 'longctx_bench'\?\)"):
        get_task("longctxbench")


def test_a_plan_for_other_layers_is_a_row_with_an_error():
    info = INFO.model_copy(update={"layers": 4})
    subject = Subject("four", uniform(2, SHORT, info))
    report = run_task(get_task("perplexity"), tiny(), [subject], Settings(length=64, prefix=32, limit=1))
    assert report.plans[0].error == "the plan has 4 layers and the model 8"
