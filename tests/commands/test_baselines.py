"""`kvmix eval --baseline`: who is measured beside the plans, and what becomes of those who cannot be."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import transformers.cache_utils
from commandline import TINY, kvmix, kvmix_json, refused
from evaluating import INFO, SHORT, Counting, run_folder, stand_in, tiny, uniform
from others import need_quanto

from kvmix_cli import evaluation
from kvmix_cli.cache.baselines.casting import CastCache
from kvmix_cli.cache.baselines.named import BASELINES
from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.plan import LayerPlan, Plan, TensorPlan
from kvmix_cli.studies.baselines import baseline_subjects, check_baselines, shuffled

QUICK = ("--length", 332, "--prefix", 300, "--limit", 1)
MIXED = "0-2:k3v4,3-7:k2v2"


pytestmark = pytest.mark.usefixtures("loaded_shallow")


def mixed():
    return Plan.from_short(MIXED, INFO, SHORT)


def subjects(*names, plans=None, seed=0):
    return baseline_subjects(names, tiny(), plans or {}, seed)


@pytest.mark.slow
def test_caches_of_others_are_rows_with_bits_and_a_share_that_is_theirs():
    need_quanto()
    names = ("bf16", "fp8", "hf-fp8", "hf-quanto-4")
    options = [option for name in names for option in ("--baseline", name)]
    result = kvmix_json("eval", *TINY, *QUICK, *options)
    rows = {row["plan"]: row for row in result["rows"]}
    assert list(rows) == ["unquantized", *names]
    assert [rows[name]["nominal_bits"] for name in names] == [16, 8, 8, 4]
    assert [round(rows[name]["stored_bits"], 2) for name in names] == [16, 8, 8, 5]
    assert [rows[name]["quantized_share"] for name in names[:3]] == [0, 1, 1]
    assert 0.9 < rows["hf-quanto-4"]["quantized_share"] < 1
    losses = {name: abs(rows[name]["metrics"]["loss_increase"]["value"]) for name in names}
    assert 0 < losses["bf16"] < 0.01
    assert 0 < losses["hf-quanto-4"] < 0.5


@pytest.mark.slow
def test_memory_of_a_cache_of_others_is_that_of_its_codes():
    need_quanto()
    names = ("bf16", "hf-fp8", "hf-quanto-2")
    options = [option for name in names for option in ("--baseline", name)]
    result = kvmix_json("eval", *TINY, "--task", "memory", "--length", 513, *options)
    rows = {row["plan"]: row["metrics"] for row in result["rows"]}
    compression = [rows[name]["compression"]["value"] for name in names]
    assert compression == [1, pytest.approx(2, abs=0.01), pytest.approx(16 / 3, abs=0.1)]
    assert all("predicted_bytes" not in rows[name] for name in names)


@pytest.mark.slow
def test_a_cache_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(transformers.cache_utils, "is_hqq_available", lambda: False)
    result = kvmix("eval", *TINY, *QUICK, "--baseline", "hf-hqq-4", "--baseline", "bf16", "--json")
    assert result.exit_code == 1
    _, broken, sound = json.loads(result.stdout)["rows"]
    assert broken["error"] == "hf-hqq-4 needs hqq: pip install hqq"
    assert broken["stored_bits"] is None
    assert "metrics" in sound


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nmore"), AssertionError("axis"), OSError("gone")])
def test_a_cache_that_crashes_is_a_row_that_says_so(error, monkeypatch):
    def crash(*arguments, **options):
        raise error

    (bf16,) = subjects("bf16")
    monkeypatch.setattr(CastCache, "update", crash)
    report = run_task(evaluation.get_task("perplexity"), tiny(), [bf16], Settings(length=40, prefix=20, limit=1))
    assert report.reference.error is None
    assert report.plans[0].error == f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_uniform_plans_have_the_cache_settings_of_the_first_plan():
    ours = {"ours": uniform(4, SHORT)}
    (alone,), (beside,) = subjects("uniform-2"), subjects("uniform-2", plans=ours)
    assert alone.plan.cache != beside.plan.cache == SHORT
    assert alone.plan.short == beside.plan.short == "0-7:k2v2"


@pytest.mark.parametrize("seed", range(5))
def test_a_random_plan_has_the_same_widths_in_other_layers(seed):
    plan = mixed()
    other = shuffled(plan, seed)
    assert other.layers != plan.layers
    for kind in "kv":
        widths = [Counter(getattr(layer, kind).bits for layer in each.layers.values()) for each in (plan, other)]
        assert widths[0] == widths[1]
    assert other.bits == plan.bits
    assert other.cache == plan.cache
    assert other == shuffled(plan, seed)


def test_a_random_plan_is_equal_in_bytes_also_where_groups_differ():
    layers = dict(mixed().layers)
    layers[5] = LayerPlan(k=TensorPlan(bits=4, group_size=32), v=TensorPlan(bits=2))
    plan = Plan.build(INFO, layers, SHORT)
    assert shuffled(plan, 3).bits.stored == plan.bits.stored


def test_random_plans_are_of_the_first_plan_and_have_seeds():
    plans = {"first": mixed(), "second": uniform(4, info=INFO)}
    names = ("random-plan", "random-plan-1", "random-plan-7")
    zero, one, seven = (subject.plan for subject in subjects(*names, plans=plans, seed=1))
    assert zero == one == shuffled(plans["first"], 1)
    assert seven == shuffled(plans["first"], 7) != one


def test_a_random_plan_needs_a_plan_with_several_widths():
    with pytest.raises(EvaluationError, match="random-plan needs a plan to be made of: give one with --plan"):
        subjects("random-plan")
    with pytest.raises(EvaluationError, match="random-plan-3 would be plan 'two': in every layer"):
        subjects("random-plan-3", plans={"two": uniform(2, info=INFO)})


def test_all_stands_for_every_cache():
    check_baselines(["all"])
    assert [subject.name for subject in subjects("all", "uniform-2")] == [*BASELINES, "uniform-2"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["hf-quanto-5"], r"no baseline 'hf-quanto-5' \(did you mean 'hf-quanto-4'\?\); there are bf16, fp8, "),
        (["uniform-5"], r"no baseline 'uniform-5' .*uniform-N with N one of 1, 2, 3, 4, 8, 16"),
        (["random"], r"no baseline 'random' \(did you mean 'random-plan'\?\)"),
        ([""], "no baseline ''"),
        (["bf16", "bf16"], "two rows would be called 'bf16'"),
        (["all", "hf-hqq-4"], "two rows would be called 'hf-hqq-4'"),
    ],
)
def test_wrong_names_are_errors(names, said):
    with pytest.raises(EvaluationError, match=said):
        check_baselines(names)


def test_a_baseline_may_not_have_a_plans_name():
    message = refused(kvmix("eval", *TINY, *QUICK, "--uniform", 2, "--baseline", "uniform-2"))
    assert message == "two rows would be called 'uniform-2'; leave one out"


@pytest.mark.slow
def test_what_a_run_was_made_with_is_kept_and_asked_for_on_resume(tmp_path):
    pytest.importorskip("hqq")
    (subject,) = subjects("hf-hqq-4")
    run_task(Counting(), stand_in(), [subject], Settings(), RunFolders(tmp_path, "tiny"))
    config = (run_folder(tmp_path, "hf-hqq-4", "counting", "tiny") / "config.yaml").read_text()
    assert "baseline: {backend: hqq, nbits: 4, axis_key: 1, axis_value: 1, transformers: " in config
    baseline = subject.baseline
    newer = Subject("hf-hqq-4", baseline=replace(baseline, settings={**baseline.settings, "hqq": "9.9"}))
    with pytest.warns(UserWarning, match=r"with another baseline\.hqq"):
        run_task(Counting(), stand_in(), [newer], Settings(), RunFolders(tmp_path, "tiny", resume=True))
