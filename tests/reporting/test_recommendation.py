"""Recommendations in words: every verdict, what a proof lacks, the evidence, and the commands that use a plan."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluating import INFO, uniform

from kvmix_cli.cache.subject import UNQUANTIZED
from kvmix_cli.evaluation.positions import PositionBucket
from kvmix_cli.evaluation.results import Estimate, Metric, Report, Row
from kvmix_cli.plan import Plan
from kvmix_cli.plan.windows import NoWindow
from kvmix_cli.reporting.tables.recommendation import (
    answer_text,
    commands,
    evidence,
    forecast_json,
    forecast_table,
    recommendation_json,
    recommendation_tables,
)
from kvmix_cli.studies.recommend.cost import COMPARED, PROVEN, Forecast, PlannedStep
from kvmix_cli.studies.recommend.judge import Judgement
from kvmix_cli.studies.recommend.study import MeasuredPlan, MeasuredTask, Recommendation

KL = Estimate(0.005, 0.004, 0.006)


def kl(**changes):
    return Judgement("perplexity", "kl", True, "within", KL, limit=0.00995)._replace(**changes)


def recall(**changes):
    own, other = Estimate(0.8, 0.7, 0.9), Estimate(0.9, 0.75, 0.95)
    return Judgement("recall", "recall", True, "within", own, other, 0.75)._replace(**changes)


def measured(task="perplexity", metrics=("kl", "same_token"), records=(), judgement=None):
    """A task with one plan's row and the unquantized one."""
    known = {"kl": KL, "same_token": Estimate.exact(0.97), "recall": Estimate(0.8, 0.7, 0.9)}
    row = Row(task, "plan", 2, 2.5, 0.8, metrics={name: known[name] for name in metrics}, records=records)
    reference = Row(task, UNQUANTIZED, 16, 16, metrics={"recall": Estimate.exact(0.9)}, records=records)
    about = tuple(Metric(name, True, plans_only=name in ("kl", "same_token")) for name in metrics)
    fake = SimpleNamespace(name=task, metrics=about, details=lambda rows: [])
    return MeasuredTask(fake, Report(task, 1, "10 documents", (reference, row)), judgement)


def trial(plan, outcome, *judgements, safe=None, tasks=()):
    """A plan that was measured on all documents, with this outcome."""
    return MeasuredPlan(plan, Path("plans/small.yaml"), tuple(tasks), judgements, outcome, safe)


def found(outcome, *judgements, safe=None, plan=None, tasks=(), others=(), compared=None):
    """A recommendation at 32K with this outcome."""
    best = trial(plan or uniform(2, info=INFO), outcome, *judgements, safe=safe, tasks=tasks)
    compared = compared or {2.0: 0.02, 2.5: 0.005}
    return Recommendation(INFO, 32768, 0.00995, 16384, best, others, compared, 2**30, 2**22, 2**20)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            found("safe", kl(), recall(), safe=32768),
            "safe at 32K: small at 4 stored bits: KL 0.005 [0.004, 0.006] nats a token of at most 0.00995; "
            "recall 0.8 [0.7, 0.9] against 0.9 [0.75, 0.95]",
        ),
        (
            found("safe-up-to", kl(passed=False, reason="above"), recall(), safe=4096),
            "safe up to 4K, not at 32K: small at 4 stored bits: KL 0.005 [0.004, 0.006] nats a token of at most "
            "0.00995: more than counts as safe; recall 0.8",
        ),
        (
            found("not-safe", recall(passed=False, reason="above")),
            "not safe at 32K: no plan passes, the nearest is small at 4 stored bits: recall 0.8 [0.7, 0.9] against 0.9 "
            "[0.75, 0.95]: more than counts as safe",
        ),
        (
            found("not-proven", kl(passed=None, reason="few documents", missing=98304), safe=16384),
            "not proven at 32K: small at 4 stored bits: KL 0.005 [0.004, 0.006] nats a token of at most 0.00995, at "
            "16K: 6 documents of 32K are needed, and 98304 tokens are missing (a longer --text, or a larger --limit); "
            "within 16K its KL is",
        ),
    ],
)
def test_every_verdict_states_its_numbers(given, said):
    assert answer_text(given).startswith(said)


@pytest.mark.parametrize(
    ("judgement", "said"),
    [
        (kl(passed=None, reason="unclear", missing=20000), "about 20000 tokens of it are missing (--limit)"),
        (kl(passed=None, reason="unclear"), "more text does not help"),
        (recall(passed=None, reason="few values", missing=48), "48 more values are needed (a larger --limit)"),
        (recall(passed=None, reason="no interval"), "without an interval it cannot be told"),
        (recall(reason="nothing to lose"), "which says nothing"),
        (kl(passed=None, reason="nothing read"), "hold the whole context, nothing quantized was read"),
        (Judgement("gsm8k", "gsm8k", None, "not measured", error="no data"), "gsm8k could not be measured: no data"),
    ],
)
def test_what_a_proof_lacks_is_said(judgement, said):
    assert said in answer_text(found("not-proven", judgement))


def test_evidence_stands_beside_the_unquantized_caches_numbers():
    answers = [{"recalled": True, "depth": 0.0}, {"recalled": False, "depth": 1.0}]
    tasks = (measured(), measured("recall", ("recall",), ({"answers": answers, "tokens": 1},)))
    some = found("safe", kl(), safe=32768, tasks=tasks)
    rows = [(row.task, row.metric, row.depth, row.own.value, row.reference) for row in evidence(some)]
    assert rows == [
        ("perplexity", "kl", None, 0.005, 0.0),
        ("perplexity", "same_token", None, 0.97, 1.0),
        ("recall", "recall", None, 0.8, 0.9),
        ("recall", "recall", 0.0, 1.0, 1.0),
        ("recall", "recall", 1.0, 0.0, 0.0),
    ]
    main, compared = recommendation_tables(some)
    assert main.rows[4][:2] == ("recall", "recall at depth 100%")
    assert "weights 1 GiB, cache 1 MiB at 32K, activations of such a prompt about 4 MiB" in main.footer
    assert compared.rows == [("2.00", "0.02", "-"), ("2.50", "0.005", "-")]
    data = recommendation_json(some)
    assert data["evidence"][3] == {
        "task": "recall",
        "metric": "recall",
        "value": 1.0,
        "low": pytest.approx(0.206, abs=1e-3),
        "high": 1.0,
        "reference": 1.0,
        "depth": 0.0,
    }
    contract = {
        "command",
        "model",
        "context",
        "verdict",
        "safe_context",
        "plan",
        "stored_bits",
        "cache_bytes",
        "evidence",
    }
    assert contract <= data.keys()


def test_plans_that_did_not_pass_on_all_documents_say_why():
    later = PositionBucket(start=4096, stop=5120, tokens=9, kl=Estimate(0.011, 0.0104, 0.012), same_token=KL)
    above = kl(passed=False, reason="above", own=Estimate(0.007, 0.006, 0.008), part=later)
    worse, best = uniform(2, info=INFO), uniform(3, info=INFO)
    compared = {1.0: 0.02, worse.bits.stored: 0.006, best.bits.stored: 0.003}
    others = (trial(worse, "safe-up-to", above, safe=4096),)
    some = found("safe", kl(part=later), safe=32768, plan=best, others=others, compared=compared)
    (table,) = recommendation_tables(some)[-1:]
    assert [row[1:] for row in table.rows] == [
        ("0.02", "-"),
        ("0.006", "safe up to 4K, not at 32K"),
        ("0.003", "safe at 32K"),
    ]
    assert table.footer == (
        f"{worse.bits.stored:.2f}: KL 0.007 [0.006, 0.008] nats a token of at most 0.00995, but 0.011 [0.0104, 0.012] "
        "from position 4096 to 5119: more than counts as safe\n"
    )


def test_engines_that_can_express_a_plan_get_a_command_and_others_a_reason():
    four = uniform(4, uniform(4, info=INFO).cache.model_copy(update={"window": NoWindow()}), INFO)
    assert commands(found("safe", plan=four)) == {
        "transformers": "kvmix run --plan plans/small.yaml --prompt ...",
        "vLLM": "kvmix export plans/small.yaml --to vllm",
        "llama.cpp": "kvmix export plans/small.yaml --to llama.cpp",
    }
    last = Plan.from_short("0-6:k8v8,7:k16v16", INFO)
    assert commands(found("safe", plan=last))["llama.cpp"].startswith("cannot express this plan: it stores all layers")


def test_a_forecast_says_what_is_there_what_takes_how_long_and_what_cannot_be_told():
    steps = (
        PlannedStep("profile", "profile.yaml is there", 0.0),
        PlannedStep("compare", "KL of plans", 240.0, COMPARED, 60.0),
        PlannedStep("prove", "KL of plans", 400.0, PROVEN, 200.0),
        PlannedStep("gsm8k", "as many prompts as the task has", None),
    )
    some = Forecast(INFO, 4096, 4096, steps, 2**30, "timed")
    table = forecast_table(some)
    assert [row[2:] for row in table.rows] == [
        ("0 s", ""),
        ("4 min", "2 min - 8 min"),
        ("7 min", "3 min - 10 min"),
        ("not known", ""),
    ]
    assert "about 11 min in all, from 5 min to 18 min: that depends on how many plans" in table.footer
    assert "should more than 3 have to be proven, each takes up to 3 min\n" in table.footer
    assert "about 1 GiB of memory" in table.footer
    data = forecast_json(some)
    assert (data["seconds"], data["seconds_range"], data["seconds_per_proof"]) == (640, (320, 1080), 200)
    assert data["steps"][2:] == [
        {"name": "prove", "what": "KL of plans", "seconds": 400, "seconds_range": (200, 600)},
        {"name": "gsm8k", "what": "as many prompts as the task has", "seconds": None, "seconds_range": None},
    ]
    unknown = some.__class__(INFO, 4096, 4096, steps[3:], 2**30, "no times")
    assert "in all" not in forecast_table(unknown).footer
    assert "have to be proven" not in forecast_table(unknown).footer
