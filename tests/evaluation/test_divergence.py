"""KL and same-token share of the perplexity task, against float64 sums over logits of plain forwards."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from evaluating import run_folder, shallow, stand_in, uniform

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.evaluation import alongside, get_task, work
from kvmix_cli.evaluation.alongside import divergence
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.bootstrap import pooled_quantile
from kvmix_cli.evaluation.collect import collect
from kvmix_cli.evaluation.positions import by_position
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.reporting.tables.evaluation import report_tables, row_json

SETTINGS = Settings(length=160, prefix=64, step=16, limit=2)
TWO, THREE = Subject("two", uniform(2, info=shallow().info)), Subject("three", uniform(3, info=shallow().info))
LOGITS = 2e-3
"""Of a divergence: the model's logits differ by about 1e-5 between forwards of different shapes."""


@pytest.fixture(scope="module")
def samples():
    return get_task("perplexity").samples(shallow(), SETTINGS)


def naive(reference, logits):
    """KL of each row in float64, term by term."""
    p, q = (each.double().log_softmax(-1) for each in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def read(cache, ids, prefix, step):
    """Logits of all scored tokens, from the model itself."""
    model = shallow().model
    model(input_ids=torch.tensor([ids[:prefix]]), past_key_values=cache)
    parts = [ids[start : min(start + step, len(ids) - 1)] for start in range(prefix, len(ids) - 1, step)]
    return torch.cat([model(input_ids=torch.tensor([part]), past_key_values=cache).logits[0] for part in parts])


@torch.inference_mode()
def one_pass(ids, prefix):
    return shallow().model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, prefix:-1]


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 10.0])
def test_divergence_is_the_sum_in_float64(change):
    generator = torch.Generator().manual_seed(0)
    reference = 4 * torch.randn(50, 300, generator=generator)
    logits = reference + change * torch.randn(50, 300, generator=generator) + 7.0
    # float32 sums of 300 terms; the logits themselves are rounded where 7 is added, to 1e-6.
    assert divergence(reference, logits).double() == pytest.approx(naive(reference, logits), rel=1e-2, abs=1e-11)
    assert (divergence(reference, logits) >= 0).all()


def test_divergence_of_the_same_predictions_is_zero_and_of_nonsense_large_and_finite():
    reference = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]])
    assert divergence(reference, reference).tolist() == [0.0, 0.0]
    assert divergence(reference, reference + 3).tolist() == [0.0, 0.0]
    assert divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1000.0]])).item() > 50
    assert math.isfinite(divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1000.0]])).item())


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 16, 1000])
def test_every_token_is_compared_as_two_forwards_say(samples, step):
    ids, settings = list(samples[0].ids), dataclasses.replace(SETTINGS, step=step)
    record = get_task("perplexity").measure(shallow(), TWO, samples[0], settings)
    logits = read(MixedCache.from_plan(TWO.plan, shallow().config), ids, 64, step)
    reference = one_pass(ids, 64)
    assert record["first"] == 65
    assert len(record["kl"]) == record["tokens"] == 95
    assert record["kl"] == pytest.approx(naive(reference, logits).tolist(), rel=LOGITS, abs=1e-5)
    assert record["changed"] == (reference.argmax(-1) != logits.argmax(-1)).nonzero()[:, 0].tolist()
    assert 0 < len(record["changed"]) < 95


@pytest.mark.slow
def test_metrics_are_means_over_tokens_and_the_unquantized_row_has_none(samples):
    report = run_task(
        get_task("perplexity"), shallow(), [TWO, THREE, Subject("full", uniform(16, info=shallow().info))], SETTINGS
    )
    assert set(report.reference.metrics) == {"perplexity"}
    two, three, full = report.plans
    kl = np.array([record["kl"] for record in two.records])
    assert two.value("kl") == pytest.approx(kl.mean())
    assert two.value("kl_p99") == pytest.approx(np.quantile(kl, 0.99))
    changed = sum(len(record["changed"]) for record in two.records)
    assert two.value("same_token") == pytest.approx(1 - changed / kl.size)
    assert two.value("kl") > three.value("kl") > 0
    assert two.metrics["kl"].low < two.value("kl") < two.metrics["kl"].high
    assert two.value("kl_p99") > 3 * two.value("kl")
    assert (full.value("kl"), full.value("kl_p99"), full.value("same_token")) == (0, 0, 1)


@pytest.mark.slow
def test_rows_side_by_side_measure_what_each_measures_alone(samples):
    report = run_task(get_task("perplexity"), shallow(), [TWO, THREE], SETTINGS)
    alone = [get_task("perplexity").measure(shallow(), each, samples[1], SETTINGS) for each in (Subject(), TWO, THREE)]
    assert [row.records[1] for row in report.rows] == alone


@pytest.fixture
def forwards(monkeypatch):
    """(tokens, whether the cache is ours) of every forward."""
    model, seen = shallow().model, []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        seen.append((kwargs["input_ids"].shape[1], isinstance(kwargs["past_key_values"], MixedCache)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return seen


def _plans(count):
    return [Subject(f"plan {number}", uniform(2, info=shallow().info)) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("plans", "passes"), [(0, 1), (2, 1), (3, 2)])
def test_the_unquantized_cache_reads_a_sample_once_for_as_many_plans_as_are_together(
    forwards, monkeypatch, plans, passes
):
    monkeypatch.setattr(work, "TOGETHER", 2)
    run_task(get_task("perplexity"), shallow(), _plans(plans), SETTINGS)
    of_one = 1 + 6  # the prefix, and 95 tokens in steps of 16
    assert sum(not ours for _, ours in forwards) == passes * 2 * of_one
    assert sum(ours for _, ours in forwards) == plans * 2 * of_one


def test_a_reading_keeps_one_part_of_the_logits_and_no_cache_after_the_last(samples):
    reading = alongside.UnquantizedReading(shallow(), samples[0].ids, 64, 16)
    for part in reading.parts():
        assert reading.read(part).shape[0] <= 16
        assert reading.read(part) is reading.logits(part)
    assert reading._cache is None


class NoMemory(torch.nn.Module):
    """A model without memory for stock caches of more than some tokens."""

    def __init__(self, most):
        super().__init__()
        self.model, self.most, self.config = shallow().model, most, shallow().model.config

    def forward(self, input_ids, past_key_values, **kwargs):
        if not isinstance(past_key_values, MixedCache) and past_key_values.get_seq_length() > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.model(input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


@pytest.mark.slow
def test_plans_have_their_perplexity_where_the_unquantized_cache_does_not_fit():
    loaded = stand_in(
        model=NoMemory(100),
        info=shallow().info,
        tokenizer=shallow().tokenizer,
        config=shallow().config,
        device=shallow().device,
    )
    report = run_task(get_task("perplexity"), loaded, [TWO, THREE], SETTINGS)
    assert "out of memory" in report.reference.error
    assert [set(row.metrics) for row in report.plans] == [{"perplexity"}] * 2
    assert all(not row.warnings for row in report.plans)


def kept(root, subjects, resume=False, limit=2):
    settings = dataclasses.replace(SETTINGS, limit=limit)
    return run_task(get_task("perplexity"), shallow(), subjects, settings, RunFolders(root, "builtin--tiny", resume))


@pytest.mark.slow
def test_resuming_goes_on_with_the_same_numbers_and_a_new_plan_is_compared_too(tmp_path, forwards):
    whole = kept(tmp_path / "whole", [TWO, THREE])
    kept(tmp_path / "parts", [TWO], limit=1)
    forwards.clear()
    assert kept(tmp_path / "parts", [TWO, THREE], resume=True) == whole
    assert sum(not ours for _, ours in forwards) == 2 * 7, "both samples for the new plan, the second for the old one"
    forwards.clear()
    assert kept(tmp_path / "parts", [TWO, THREE], resume=True) == whole
    assert forwards == []


def without_divergence(folder):
    """Make a run folder what an older version left."""
    path = folder / "samples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{key: value for key, value in each.items() if key not in ("first", "kl", "changed")} for each in records]
    path.write_text("".join(json.dumps(each) + "\n" for each in old))
    row = json.loads((folder / "metrics.json").read_text())
    for name in ("kl", "kl_p99", "same_token"):
        row["metrics"].pop(name), row["metric_info"].pop(name)
    (folder / "metrics.json").write_text(json.dumps(row))


@pytest.mark.slow
def test_runs_of_an_older_version_are_shown_and_resumed_without_a_divergence(tmp_path):
    kept(tmp_path, [TWO, THREE])
    without_divergence(run_folder(tmp_path, "two"))
    resumed = kept(tmp_path, [TWO, THREE], resume=True)
    old, new = resumed.plans
    assert set(old.metrics) == {"perplexity", "loss_increase", "perplexity_increase_percent"}
    assert "kl" in new.metrics
    (warning,) = old.warnings
    assert warning.startswith("two: no KL, because an older version measured some of its samples")
    (group,) = collect([tmp_path]).groups
    (measurement,) = group.measurements
    lines = {line.label: line for line in group.lines}
    assert measurement.estimate(lines["two"], "kl") is None
    assert measurement.estimate(lines["three"], "kl").value == new.value("kl")


def test_positions_are_those_of_the_predicted_tokens():
    record = {"first": 1022, "kl": [1.0, 3.0, 10.0, 20.0, 30.0], "changed": [0, 3], "tokens": 5}
    first, second = by_position([record])
    assert (first["start"], first["stop"], first["tokens"]) == (0, 1024, 2)
    assert (first["kl"].value, first["same_token"].value) == (2.0, 0.5)
    assert (second["start"], second["stop"], second["tokens"]) == (1024, 2048, 3)
    assert (second["kl"].value, second["same_token"].value) == (20.0, pytest.approx(2 / 3))
    assert by_position([{"nll": 1.0}]) == by_position([]) == []


@pytest.mark.slow
def test_positions_are_in_the_json_and_in_a_table_if_there_are_several():
    settings = Settings(length=1100, prefix=900, step=100, limit=1)
    task = get_task("perplexity")
    report = run_task(task, shallow(), [TWO], settings)
    data = row_json(report.plans[0])["by_position"]
    assert [(each["start"], each["tokens"]) for each in data] == [(0, 1023 - 900), (1024, 1100 - 1024)]
    mean = sum(each["kl"]["value"] * each["tokens"] for each in data) / 199
    assert mean == pytest.approx(report.plans[0].value("kl"))
    assert "by_position" not in row_json(report.reference)
    *_, table = report_tables(task, report, shallow().info)
    assert [row[:3] for row in table.rows] == [["two", "0-1023", "123"], ["two", "1024-2047", "76"]]
    short = run_task(task, shallow(), [TWO], SETTINGS)
    assert len(report_tables(task, short, shallow().info)) == 1


def test_a_quantile_is_that_of_all_numbers_and_whole_samples_are_drawn():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=rng.integers(50, 100)) for _ in range(20)]
    estimate = pooled_quantile(groups, 0.99, seed=1)
    assert estimate.value == pytest.approx(np.quantile(np.concatenate(groups), 0.99))
    assert estimate.low < estimate.value < estimate.high
    assert pooled_quantile(groups, 0.99, seed=1) == estimate
    alone = pooled_quantile(groups[:1], 0.5)
    assert alone.low == alone.value == alone.high
    alike = pooled_quantile([[1.0] * 5] * 3, 0.99)
    assert (alike.low, alike.high) == (1.0, 1.0)
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="at least one sample"):
            pooled_quantile(nothing, 0.5)
