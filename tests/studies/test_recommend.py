"""The smallest safe plan: what numbers prove, in which order plans are measured, and which of them is the answer."""

import itertools
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
from evaluating import INFO, uniform
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import patient

from kvmix_cli import turns
from kvmix_cli.cache.subject import UNQUANTIZED
from kvmix_cli.errors import BudgetError, EvaluationError, InUseError, ModelError, PlanError
from kvmix_cli.evaluation import positions
from kvmix_cli.evaluation.results import Estimate, Metric, Report, Row
from kvmix_cli.models import sources
from kvmix_cli.plan import Plan
from kvmix_cli.studies.recommend import forecast, study
from kvmix_cli.studies.recommend.bench import ModelBench, Purpose, read_purpose, usable_length
from kvmix_cli.studies.recommend.cost import ANSWERED, COMPARED, PROVEN, ModelSpeed
from kvmix_cli.studies.recommend.judge import (
    FEWEST,
    is_within,
    judge_divergence,
    judge_number,
    judge_values,
    outcome,
    reach,
)
from kvmix_cli.studies.recommend.plans import STORED_BITS, Calibrated, Way, first_guess
from kvmix_cli.studies.recommend.study import _Search, questions, smallest_passing

PATIENT = settings(patient, suppress_health_check=[HealthCheck.function_scoped_fixture])
PART = 16
"""Tokens of a part of the positions, here; 1,024 otherwise."""


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch):
    monkeypatch.setattr(positions, "BUCKET", PART)


def read(*documents, share=0.8, error=None):
    """A row of perplexity: of each document the KL of every part of its positions, the same at all of them."""
    records = tuple(
        {"tokens": len(kl) * PART, "first": 0, "kl": [each for each in kl for _ in range(PART)], "changed": []}
        for kl in documents
    )
    every = [sum(kl) / len(kl) for kl in documents]
    metrics = {"kl": Estimate(sum(every) / len(every), min(every), max(every))} if documents else {}
    return Row("perplexity", "plan", 2, 2, share, metrics=metrics, records=records, error=error)


def asked(recalled, values=60, own=None, share=0.8, task="recall"):
    """A row of recall with this share of values recalled, and an interval of a tenth to both sides."""
    answers = [{"recalled": number < recalled * values, "depth": 0.5} for number in range(values)]
    estimate = own or Estimate(recalled, recalled - 0.1, min(1.0, recalled + 0.1))
    return Row(task, "plan", 2, 2, share, metrics={task: estimate}, records=({"answers": answers, "tokens": 1},))


def test_kl_is_proven_where_its_upper_end_and_every_part_are_within_the_limit():
    judged = judge_divergence(read(*[[0.002, 0.004]] * FEWEST), 0.005, 2 * PART)
    assert (judged.passed, judged.reason, judged.reach) == (True, "within", 2 * PART)
    assert outcome([judged], 32) == ("safe", 32)


def test_kl_that_rises_is_safe_up_to_the_part_before():
    row = read(*[[0.002, 0.004, 0.02, 0.004]] * FEWEST)
    judged = judge_divergence(row, 0.01, 4 * PART)
    assert (judged.passed, judged.reach) == (False, 2 * PART), "the mean is within the limit, the third part is not"
    assert (judged.part["start"], judged.part["kl"].value) == (2 * PART, pytest.approx(0.02))
    assert outcome([judged], 4 * PART) == ("safe-up-to", 2 * PART)
    assert not is_within(row, 0.01)


def test_kl_above_the_limit_from_the_beginning_is_not_safe():
    judged = judge_divergence(read(*[[0.02, 0.03]] * FEWEST), 0.01, 2 * PART)
    assert outcome([judged], 2048) == ("not-safe", None)


def test_an_interval_on_both_sides_of_the_limit_proves_nothing_and_says_how_much_text_would():
    documents = [[0.004, 0.004]] * 4 + [[0.012, 0.012]] * 2
    judged = judge_divergence(read(*documents), 0.008, 2 * PART)
    assert (judged.passed, judged.reason) == (None, "unclear")
    assert judged.may_pass
    # The value is .00667, the upper end .012: 4 times as near takes 16 times the documents.
    assert judged.missing == pytest.approx((96 - 6) * 2 * PART, rel=0.02)
    assert judge_divergence(read(*documents), 0.006, 2 * PART).missing is None, "its value is above the limit"
    assert outcome([judged], 2048) == ("not-proven", None)


def test_more_text_does_not_help_where_a_part_is_above_the_limit_though_the_mean_is_not():
    judged = judge_divergence(read(*[[0.002, 0.004]] * 3 + [[0.002, 0.014]] * 3), 0.008, 2 * PART)
    assert (judged.passed, judged.reason, judged.own.value) == (None, "unclear", pytest.approx(0.0055))
    assert judged.missing is None
    assert judged.part["kl"].value == pytest.approx(0.009)


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_few_documents_prove_nothing_but_that_a_plan_is_bad(count):
    judged = judge_divergence(read(*[[0.002]] * count), 0.01, PART)
    assert (judged.passed, judged.reason, judged.missing) == (None, "few documents", (FEWEST - count) * PART)
    assert not judged.may_pass, "more bits would not help"
    assert judge_divergence(read(*[[0.02]] * count), 0.01, PART).passed is False


def test_documents_shorter_than_the_context_prove_their_own_length_only():
    judged = judge_divergence(read(*[[0.002]] * FEWEST), 0.01, PART, lacking=30000)
    assert (judged.passed, judged.missing, judged.reach) == (None, 30000, PART)
    assert outcome([judged], 32768) == ("not-proven", PART)


def test_what_read_nothing_quantized_or_could_not_be_measured_proves_nothing():
    assert judge_divergence(read(*[[0.0]] * FEWEST, share=0.0), 0.01, PART).reason == "nothing read"
    assert judge_divergence(read(error="no memory"), 0.01, PART).error == "no memory"
    assert "unquantized cache" in judge_divergence(read(), 0.01, PART).error
    assert not is_within(read(), 0.01)


@settings(PATIENT, max_examples=10)
@given(st.lists(st.lists(st.floats(0, 0.02), min_size=3, max_size=3), min_size=FEWEST, max_size=FEWEST))
def test_no_part_within_reach_is_above_the_limit(documents):
    records = read(*documents).records
    found = reach(records, positions.by_position(records), 0.01, 3 * positions.BUCKET)
    means = [sum(parts) / len(parts) for parts in zip(*documents, strict=True)]
    assert all(mean <= 0.01 + 1e-12 for mean in means[: found // positions.BUCKET])


@pytest.mark.parametrize(
    ("own", "reference", "passed", "reason"),
    [
        (asked(0.8), asked(0.85), True, "within"),
        (asked(0.7), asked(0.85), False, "above"),
        (asked(0.9), asked(0.85), True, "within"),
        (asked(0.8, values=12), asked(0.85, values=12), None, "few values"),
        (asked(0.7, values=12), asked(0.85, values=12), False, "above"),
        (asked(0.0), asked(0.0), True, "nothing to lose"),
        (asked(0.8, share=0.0), asked(0.85), None, "nothing read"),
        (asked(0.5), asked(0.6, own=Estimate.exact(0.6)), None, "no interval"),
    ],
)
def test_recall_must_not_be_below_the_interval_of_the_unquantized_cache(own, reference, passed, reason):
    judged = judge_values(own, reference)
    assert (judged.passed, judged.reason) == (passed, reason)


def test_a_number_of_which_less_is_better_must_not_be_above_the_interval():
    own, other = (Row("word", "plan", 2, 2, 0.5, metrics={"ppl": Estimate(v, v - 1, v + 1)}) for v in (11.5, 10.0))
    metric = Metric("ppl", higher_is_better=False)
    assert judge_number(own, other, metric).passed is False
    assert judge_number(other, own, metric).passed


def test_recall_that_is_lost_makes_a_plan_unsafe_at_any_context():
    kl = judge_divergence(read(*[[0.002, 0.02]] * FEWEST), 0.01, 2 * PART)
    lost = judge_values(asked(0.5), asked(0.9))
    assert outcome([kl, lost], 2048) == ("not-safe", None)


@PATIENT
@given(st.integers(1, 20), st.data())
def test_the_smallest_that_passes_is_found_in_few_steps(count, data):
    smallest = data.draw(st.integers(0, count))
    seen = []

    def passes(index):
        seen.append(index)
        return index >= smallest

    assert smallest_passing(count, data.draw(st.integers(0, count - 1)), passes) == smallest
    assert len(seen) == len(set(seen)) <= 2 * count.bit_length() + 1


def test_a_forecast_counts_as_many_comparisons_as_the_search_may_take():
    count = len(STORED_BITS)
    asked = []
    for start, smallest in itertools.product(range(1, count), range(1, count)):
        seen = set()
        assert smallest_passing(count, start, lambda index: seen.add(index) or index >= smallest) == smallest  # noqa: B023
        asked.append(len(seen))
    assert (min(asked), max(asked)) == (COMPARED.least, COMPARED.most)


@PATIENT
@given(st.integers(1, 20), st.data())
def test_answers_given_ahead_are_those_that_the_search_asks_for(count, data):
    """Whatever question is answered next, the search ends with the same number, and the first question is its own."""
    smallest, start = data.draw(st.integers(0, count)), data.draw(st.integers(0, count - 1))
    asked = []

    def passes(index):
        asked.append(index)
        return index >= smallest

    assert smallest_passing(count, start, passes) == smallest
    answers = {}
    while ahead := list(islice(questions(count, start, answers), 4)):
        assert ahead[0] in asked and ahead[0] not in answers
        assert len(ahead) == len(set(ahead))
        taken = data.draw(st.sampled_from(ahead))
        answers[taken] = taken >= smallest
    assert smallest_passing(count, start, answers.__getitem__) == smallest


@PATIENT
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(64, 8192))
def test_documents_are_as_long_as_the_text_has_enough_of(lengths, context):
    usable, missing = usable_length(lengths, context)
    count = sum(tokens // usable for tokens in lengths)
    assert 1 <= usable <= context
    if missing:
        have = sum(tokens // context for tokens in lengths)
        assert missing == (FEWEST - have) * context
        assert count >= FEWEST or usable == min(context, max(lengths))
    else:
        assert (usable, count >= FEWEST) == (context, True)


def test_a_loss_that_is_no_share_is_refused():
    with pytest.raises(BudgetError, match="max_loss is a share of the perplexity"):
        Purpose("m", max_loss=-1).check()
    assert Purpose("m", max_loss=0.01).loss == pytest.approx(0.00995033)


def rising(*bits, predicted=None):
    """Plans of these stored bits, about: of two widths in other shares, with a predicted loss that falls."""
    found = []
    for place, wide in enumerate(bits):
        layers = ",".join(f"{layer}:k{4 if layer < wide else 2}v2" for layer in range(8))
        plan = Plan.from_short(layers, INFO)
        loss = None if predicted is None else predicted[place]
        facts = {"budget": {"stored_bits": float(wide)}, "predicted_loss": loss}
        found.append(plan.model_copy(update={"provenance": facts}))
    return found


def test_the_first_guess_does_not_believe_all_of_a_prediction():
    some = rising(0, 1, 2, 3, predicted=[0.02, 0.008, 0.003, 0.001])
    assert first_guess(some, 0.01) == 2
    assert first_guess(some, 0.0001) == 3
    assert first_guess(rising(0, 1), 0.01) == 1, "without a prediction the safest"


class Scripted:
    """Plans that are measured by looking up what is made up for them; remembers the order.

    Args:
        kl: by the number of the plan.
        recall: likewise; 0.9 where nothing is said.
        documents: tokens of documents and tokens that are missing.
    """

    def __init__(self, monkeypatch, kl, recall=None, documents=(2 * PART, 0), **purpose):
        self.kl, self.recall, self.seen = kl, recall or {}, []
        self.plans = rising(*range(len(kl)))
        self.bench = SimpleNamespace(
            purpose=Purpose("builtin:tiny", **purpose),
            loaded=SimpleNamespace(info=INFO),
            context=2 * PART,
            documents=documents,
            weights=100,
            activations=10,
            cache_bytes=lambda plan: 7,
            measure=self.measure,
        )
        monkeypatch.setattr(study, "make_task", lambda name: SimpleNamespace(name=name, metrics=()))
        monkeypatch.setattr(study.Plan, "load", staticmethod(lambda path: path))

    def save(self, plan, command):
        return next(index for index, each in enumerate(self.plans) if each.sha256 == plan.sha256)

    def measure(self, task, name, plan, limit, length):
        kl = self.kl[plan]
        self.seen.append((task.name, plan, limit, length))
        if isinstance(kl, str):
            row, other = read(error=kl), read()
        elif task.name == "perplexity":
            row, other = read(*[kl if isinstance(kl, list) else [kl, kl]] * (limit or 10)), read()
        else:
            row, other = asked(self.recall.get(plan, 0.9)), asked(0.9)
        return Report(task.name, 1, "", (replace(other, plan=UNQUANTIZED), row))

    def run(self):
        made = SimpleNamespace(save=lambda plan, command: Numbered(self.save(plan, command)))
        return _Search(self.bench, made, self.plans, "").run()


class Numbered(int):
    """The number of a plan in the place of its file."""

    stem = "plan"


def test_the_smallest_plan_within_the_limit_is_proven_on_all_documents_and_tasks(monkeypatch):
    scripted = Scripted(monkeypatch, [0.1, 0.03, 0.008, 0.002, 0.001])
    found = scripted.run()
    assert (found.best.path, found.best.outcome, found.best.safe_context) == (2, "safe", 2 * PART)
    assert [(task, plan) for task, plan, *_ in scripted.seen[-2:]] == [("perplexity", 2), ("recall", 2)]
    few = [plan for task, plan, limit, _ in scripted.seen if limit == study.FIRST_DOCUMENTS]
    assert len(few) == len(found.compared) <= 4
    assert found.compared[scripted.plans[2].bits.stored] == pytest.approx(0.008)


@pytest.mark.slow
def test_what_another_process_is_at_is_come_back_to(monkeypatch):
    """Whichever measurements are in other hands at first, the answer is that of a process alone."""
    monkeypatch.setattr(turns, "PAUSE", 0)
    scripted = Scripted(monkeypatch, [0.1, 0.03, 0.008, 0.002, 0.001], recall={2: 0.3})
    alone, measure, left = scripted.run(), scripted.bench.measure, {}

    def shared(task, name, plan, limit, length):
        what = (task.name, plan, limit)
        left[what] = left.get(what, (plan + len(task.name)) % 3) - 1
        if left[what] >= 0:
            raise InUseError("another process is at it")
        return measure(task, name, plan, limit, length)

    scripted.bench.measure = shared
    found = scripted.run()
    assert (found.best.path, found.best.outcome) == (alone.best.path, alone.best.outcome) == (3, "safe")
    assert alone.compared.items() <= found.compared.items()


def test_a_forecast_counts_as_many_proofs_as_a_first_plan_that_fails_late_makes_needed(monkeypatch):
    scripted = Scripted(monkeypatch, [0.1, 0.004, 0.004])
    measure = scripted.bench.measure

    def rises_in_later_documents(task, name, plan, limit, length):
        scripted.kl[1] = 0.004 if limit else [0.004, 0.0105]
        return measure(task, name, plan, limit, length)

    scripted.bench.measure = rises_in_later_documents
    found = scripted.run()
    assert (found.best.path, found.best.outcome) == (2, "safe")
    whole = [task for task, _, limit, _ in scripted.seen if limit is None]
    assert (whole.count("perplexity"), whole.count("recall")) == (PROVEN.usual, ANSWERED.usual)


def test_a_plan_that_loses_recall_makes_way_for_the_next_one(monkeypatch):
    found = Scripted(monkeypatch, [0.1, 0.008, 0.004, 0.002], recall={1: 0.3, 2: 0.5}).run()
    assert (found.best.path, found.best.outcome) == (3, "safe")
    assert [(each.path, each.outcome) for each in found.others] == [(1, "not-safe"), (2, "not-safe")]


def test_if_no_plan_passes_the_answer_is_the_one_that_came_nearest(monkeypatch):
    scripted = Scripted(monkeypatch, [0.1, 0.08, 0.04])
    found = scripted.run()
    assert (found.best.path, found.best.outcome, found.best.safe_context) == (2, "not-safe", None)
    assert not any(task == "recall" for task, *_ in scripted.seen), "nothing more is measured of a plan that fails"


def test_a_plan_that_is_safe_to_some_position_is_asked_for_values_there(monkeypatch):
    scripted = Scripted(monkeypatch, [[0.1, 0.2], [0.004, 0.03]])
    found = scripted.run()
    assert (found.best.path, found.best.outcome, found.best.safe_context) == (1, "safe-up-to", PART)
    assert scripted.seen[-1] == ("recall", 1, None, PART)
    found = Scripted(monkeypatch, [[0.1, 0.2], [0.004, 0.03]], recall={1: 0.3}).run()
    assert (found.best.outcome, found.best.safe_context) == ("not-safe", None)


def test_text_that_is_too_short_ends_the_search(monkeypatch):
    scripted = Scripted(monkeypatch, [0.1, 0.008, 0.004, 0.002], documents=(PART, 5000))
    found = scripted.run()
    assert (found.best.path, found.best.outcome, found.length) == (1, "not-proven", PART)
    assert found.best.judgements[0].missing == 5000
    assert scripted.seen[-1] == ("recall", 1, None, 2 * PART), "what can be measured at the context is"


def test_a_plan_that_cannot_run_is_a_reason_for_another_method_and_a_lack_of_memory_is_not(monkeypatch):
    with pytest.raises(PlanError, match="no basis"):
        Scripted(monkeypatch, ["no basis"] * 2).run()
    with pytest.raises(EvaluationError, match="out of memory at 2048 tokens on cpu; use a smaller --context"):
        Scripted(monkeypatch, ["out of memory at 2048 tokens on cpu; use a smaller --length"] * 2).run()


def tried(monkeypatch, **failures):
    """Recommend with methods of which some fail; return what was said."""
    said = []
    monkeypatch.setattr(study, "prepare", lambda *args: SimpleNamespace(loaded=None, progress=None, affordable=list))

    def calibrate(way, *args, **options):
        if way.method in failures:
            raise failures[way.method]
        return SimpleNamespace(way=way, plans=list)

    monkeypatch.setattr(study, "calibrate", calibrate)
    monkeypatch.setattr(study._Search, "run", lambda self: self.made.way.method)
    return study.recommend(Purpose("m"), None, None, say=said.append), said


def test_a_model_that_transform_codes_cannot_be_used_with_gets_widths(monkeypatch):
    assert tried(monkeypatch) == ("transform", [])
    method, (line,) = tried(monkeypatch, transform=ModelError("no gradients"))
    assert method == "ilp"
    assert line == "method ilp, because transform cannot be used with this model: no gradients"
    with pytest.raises(ModelError, match="no gradients"):
        tried(monkeypatch, transform=ModelError("no gradients"), ilp=PlanError("no heads"))


def test_a_plan_file_of_the_same_name_is_never_overwritten(tmp_path):
    made = Calibrated(Way("ilp", "fisher"), None, tmp_path / "profile.yaml", None)
    one, other = rising(1, 1)[0], rising(2)[0]
    other = other.model_copy(update={"provenance": one.provenance})
    path = made.save(one, "kvmix recommend")
    assert path == tmp_path / "plans" / "ilp-stored-1.yaml"
    before = path.read_text()
    assert made.save(one, "another command") == path
    second = made.save(other, "kvmix recommend")
    assert second.name == f"ilp-stored-1-{other.sha256[:6]}.yaml"
    assert path.read_text() == before
    assert Plan.load(second).sha256 == other.sha256


def test_memory_is_for_weights_activations_and_cache_together():
    facts, context = read_purpose(Purpose("builtin:tiny", context=2048))
    assert context == 2048
    weights = facts.weights.at("float32")
    loaded = SimpleNamespace(dtype="float32", model=SimpleNamespace(dtype=SimpleNamespace(itemsize=4)))
    some = [uniform(2, info=facts.info), uniform(4, info=facts.info)]

    def bench(memory):
        return ModelBench(Purpose("builtin:tiny", memory=memory), facts, loaded, context, None, None)

    free = bench(None)
    assert free.weights == weights
    small, large = map(free.cache_bytes, some)
    assert small == some[0].cache_bytes(2048, element_bytes=4).total < large
    beside = weights + free.activations
    assert bench(beside + large).affordable(some) == some
    assert bench(beside + large - 1).affordable(some) == some[:1]
    with pytest.raises(
        BudgetError, match=r"no plan fits .*: weights take .*, a prompt of 2048 tokens .* smallest cache"
    ):
        bench(beside + small - 1).affordable(some)


def test_what_the_configuration_says_is_refused_before_weights_are_read():
    with pytest.raises(ModelError, match="--context 5000 is more than the 4096 tokens that builtin:tiny was made for"):
        read_purpose(Purpose("builtin:tiny", context=5000))
    with pytest.raises(ModelError, match=r"builtin:tiny needs .* for its weights alone, and --memory is 1 MiB: give"):
        read_purpose(Purpose("builtin:tiny", memory=2**20))
    assert read_purpose(Purpose("builtin:tiny"))[1] == 4096


def test_a_forecast_downloads_nothing(monkeypatch):
    monkeypatch.setattr(sources, "has_weights", lambda model, revision: False)
    found = forecast(Purpose("builtin:tiny", context=2048), lambda: pytest.fail("the model was loaded"))
    assert [step.name for step in found.steps] == ["download", "profile", "compare", "perplexity", "recall"]
    assert all(step.seconds is None for step in found.steps)
    assert "the weights are not on this machine" in found.basis
    assert found.memory > read_purpose(Purpose("builtin:tiny"))[0].weights.total


@PATIENT
@given(st.floats(1e-4, 10), st.floats(0, 1e-2), st.integers(0, 500), st.integers(1, 500))
def test_reading_takes_what_its_steps_take(base, slope, start, count):
    speed = ModelSpeed(32, base, slope, 0.5, compare=base)
    steps = [start + 32 * number for number in range(count)]
    exact = sum(base + slope * (tokens + 16) for tokens in steps)
    assert speed.read(start, start + 32 * count) == pytest.approx(exact, rel=0.01)
    assert speed.prefill(64) == pytest.approx(speed.read(0, 64) / 2)
    read = speed.prefill(start) + speed.read(start, start + 32 * count)
    assert speed.read_back(start, start + 32 * count) == pytest.approx(read + 32 * count * base)
