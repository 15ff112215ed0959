"""Any task of lm-eval, from its name to its numbers, and all that can be wrong with one."""

import json
from itertools import takewhile

import forking
import pytest
import yaml
from chatty import chatty
from commandline import kvmix, kvmix_json, refused
from evaluating import run_folder, shallow, uniform
from harness_tasks import CHOOSE, DOCUMENTS, GENERATE, GROUP, NAMES, ROLL, SCORE, write_tasks

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation import get_task, tasks
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.evaluation.tasks import lm_eval as harness
from kvmix_cli.evaluation.tasks.lm_eval import metrics, replay
from kvmix_cli.evaluation.tasks.lm_eval.answers import Answerer

TWO, FULL = (Subject(name, uniform(bits, info=shallow().info)) for name, bits in (("two", 2), ("full", 16)))
SETTINGS = Settings(step=8)


def task(folder, name, **options):
    return get_task(name, {"include_path": folder, **options})


def metric_names(found):
    return [metric.name for metric in found.metrics]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_lm_evals_own_and_each_has_an_interval(folder, expected, name):
    found = task(folder, name)
    report = run_task(found, shallow(), [FULL, TWO], SETTINGS)
    reference, full, two = report.rows
    theirs = {
        metrics.metric_name(name, *key.split(",")): value
        for key, value in expected["results"][name].items()
        if "," in key and "_stderr" not in key
    }
    assert set(reference.metrics) == set(metric_names(found)) == set(theirs)
    for metric, value in theirs.items():
        assert reference.value(metric) == pytest.approx(value, rel=1e-3)
        assert full.value(metric) == pytest.approx(reference.value(metric), rel=1e-4)
        for row in report.rows:
            assert row.metrics[metric].low <= row.metrics[metric].value <= row.metrics[metric].high
    if name != "local_generate":  # no answer of two layers is the expected one
        assert any(row.metrics[metric].low < row.metrics[metric].high for row in report.rows for metric in theirs)
    assert reference.quantized_share == 0 < two.quantized_share
    assert report.tokens > 0
    assert f"{DOCUMENTS} documents of {name}, 0-shot" in report.description


@pytest.mark.slow
def test_a_group_and_a_tag_and_a_pattern_report_all_that_is_in_them(folder):
    assert metric_names(task(folder, "local_group"))[0] == "local_group_acc"
    assert set(metric_names(task(folder, "local_group"))) >= {"local_choose_acc_norm", "local_score_perplexity"}
    assert set(task(folder, "local_tag")._selection.tasks) == set(NAMES)
    report = run_task(task(folder, "local_group"), shallow(), [TWO], Settings(step=8, limit=3))
    numbers = report.reference.metrics
    choose, score, both = (numbers[f"{name}_acc"].value for name in ("local_choose", "local_score", "local_group"))
    assert both == pytest.approx((choose + score) / 2)
    assert numbers["local_group_acc"].low < both < numbers["local_group_acc"].high
    assert "6 documents of local_group" in report.description


def test_directions_and_filters_are_in_the_names_of_metrics(folder):
    assert [(metric.name, metric.higher_is_better) for metric in task(folder, "local_generate").metrics] == [
        ("local_generate_exact_match_with_an_e", True),
        ("local_generate_exact_match", True),
    ]
    assert [metric.higher_is_better for metric in task(folder, "local_roll").metrics] == [False] * 3
    assert metrics.metric_name("20_news-groups", "F1") == "task_20_news_groups_f1"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), [("unquantized", 1), ("unquantized", 2), ("two", 2), ("full", 1)])
def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path, monkeypatch, name, call):
    def run(place, *, resume=False):
        runs = RunFolders(tmp_path / place, "builtin--tiny", resume)
        return run_task(
            task(folder, "local_choose", batch_size=3), shallow(), [TWO, FULL], Settings(step=8, limit=2), runs
        )

    whole = run("whole")
    calls, score = [], Answerer._score

    def interrupted(answerer, batch):
        calls.append(answerer.subject.name)
        if calls.count(name) == call:
            raise KeyboardInterrupt
        return score(answerer, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answerer, "_score", interrupted)
        run("cut")
    left = (run_folder(tmp_path / "cut", name, "local_choose") / "samples.jsonl").read_text()
    assert left.count("\n") == 3 * (call - 1)
    assert run("cut", resume=True) == whole


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_of_a_batch(folder, tmp_path):
    def run(*, resume=False, **options):
        runs = RunFolders(tmp_path, "builtin--tiny", resume)
        return run_task(task(folder, "local_group", **options), shallow(), [TWO], SETTINGS, runs).plans[0]

    whole = run()
    path = run_folder(tmp_path, "two", "local_group") / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    resumed = run(resume=True, batch_size=3)
    for metric, estimate in whole.metrics.items():
        assert resumed.value(metric) == pytest.approx(estimate.value, rel=2e-2)
    assert resumed.records[:4] == whole.records[:4]
    assert [each["request"] for each in resumed.records] == [each["request"] for each in whole.records]


@pytest.mark.slow
def test_memory_that_runs_out_in_the_middle_keeps_what_there_is(folder, tmp_path, monkeypatch):
    score = Answerer._score

    def limited(answerer, batch):
        if answerer.subject.name == "two" and any(request.document == 0 for request in batch):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return score(answerer, batch)

    monkeypatch.setattr(Answerer, "_score", limited)
    runs = RunFolders(tmp_path, "builtin--tiny")
    found = task(folder, "local_choose")
    _, two, full = run_task(found, shallow(), [TWO, FULL], SETTINGS, runs).rows
    assert "out of memory at local_choose/0/" in two.error
    assert full.metrics
    kept = (run_folder(tmp_path, "two", "local_choose") / "samples.jsonl").read_text().splitlines()
    before = takewhile(lambda request: request.document != 0, found.samples(shallow(), SETTINGS))
    assert [json.loads(line)["request"] for line in kept] == [request.name for request in before] != []


@pytest.mark.slow
def test_contexts_that_do_not_fit_are_counted_and_said(folder):
    report = run_task(task(folder, "local_choose", max_length=80), shallow(), [], Settings(limit=3))
    assert any("contexts do not fit and have lost their first tokens, up to" in said for said in report.warnings)
    assert run_task(task(folder, "local_choose"), shallow(), [], Settings(limit=2)).warnings == ()


@pytest.mark.slow
def test_a_limit_is_in_documents_of_each_task_and_may_be_more_than_there_are(folder):
    some = task(folder, "local_tag").samples(shallow(), Settings(limit=2))
    assert len({(each.task, each.document) for each in some}) == 2 * len(NAMES)
    report = run_task(task(folder, "local_score"), shallow(), [], Settings(limit=100))
    assert report.description.startswith(f"{DOCUMENTS} documents")
    assert report.warnings == ()


def test_examples_come_before_a_prompt_and_a_task_that_forbids_them_is_named(tmp_path):
    some = write_tasks(tmp_path, CHOOSE, training_split="train", fewshot_split="train")
    short, long = (task(some, "local_choose", num_fewshot=shots).samples(shallow(), SETTINGS) for shots in (0, 2))
    assert sum(len(each.ids) for each in long) > 2 * sum(len(each.ids) for each in short)
    other = write_tasks(tmp_path / "fixed", CHOOSE, num_fewshot=0)
    report = run_task(task(other, "local_choose", num_fewshot=2), shallow(), [], Settings(limit=1))
    assert report.warnings == ("local_choose: always asked without examples, so --num-fewshot has no effect",)


def test_the_seed_draws_the_examples(tmp_path):
    some = write_tasks(tmp_path, CHOOSE, training_split="train", fewshot_split="train")
    found = [task(some, "local_choose", num_fewshot=2).samples(shallow(), Settings(seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_chat_template_is_put_around_prompts(folder):
    loaded = chatty(loaded=shallow())
    without, within = (
        task(folder, "local_generate", apply_chat_template=chat).samples(loaded, SETTINGS) for chat in (False, True)
    )
    opening = tuple(shallow().tokenizer("<user>").input_ids[:-1])
    assert all(each.ids[: len(opening)] == opening for each in within)
    assert not any(each.ids[: len(opening)] == opening for each in without)


@pytest.mark.slow
def test_a_task_that_makes_its_own_contexts_gets_the_tokenizer_and_the_length(tmp_path):
    """As RULER does: its metrics are called by the length."""
    (tmp_path / "making.py").write_text(
        "import datasets\n"
        "from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name\n"
        "def make(**metadata):\n"
        "    tokenizer = get_tokenizer(resolve_tokenizer_name(metadata))\n"
        "    (length,) = metadata['max_seq_lengths']\n"
        "    text = tokenizer.decode([300] * (length - 8))\n"
        "    return {'test': datasets.Dataset.from_list([{'text': text, 'length': length}] * 2)}\n"
        "def score(doc, results):\n"
        "    return {'4096': -1.0, str(doc['length']): 1.0}\n"
    )
    (tmp_path / "made.yaml").write_text(
        "task: made\ndataset_path: ''\noutput_type: generate_until\ntest_split: test\n"
        "custom_dataset: !function making.make\nprocess_results: !function making.score\n"
        "doc_to_text: '{{text}}'\ndoc_to_target: ''\ngeneration_kwargs: {max_gen_toks: 4, until: []}\n"
        "metric_list: [{metric: '4096', aggregation: mean, higher_is_better: true},"
        " {metric: '256', aggregation: mean, higher_is_better: true}]\n"
    )
    found = task(tmp_path, "made", max_length=256)
    assert metric_names(found) == ["made_256"]
    report = run_task(found, shallow(), [TWO], SETTINGS)
    assert {name: value.value for name, value in report.reference.metrics.items()} == {"made_256": 1.0}
    assert report.plans[0].quantized_share > 0.5


def test_a_task_that_is_a_class_says_itself_what_it_reports(tmp_path):
    write_tasks(tmp_path, SCORE)
    config = yaml.safe_load((tmp_path / "local_score.yaml").read_text())
    (tmp_path / "local_score.yaml").unlink()
    (tmp_path / "own.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n"
        "class Own(ConfigurableTask):\n"
        f"    def __init__(self, config=None):\n        super().__init__(config={config!r} | {{'task': 'own'}})\n"
        "    def process_results(self, doc, results):\n        return {'nats': -results[0][0]}\n"
        "    def higher_is_better(self):\n        return {'nats': False}\n"
        "    def aggregation(self):\n        return {'nats': max}\n"
    )
    (tmp_path / "own.yaml").write_text("task: own\nclass: !function own.Own\n")
    found = task(tmp_path, "own")
    assert [(metric.name, metric.higher_is_better) for metric in found.metrics] == [("own_nats", False)]
    report = run_task(found, shallow(), [], Settings(limit=2))
    assert report.reference.value("own_nats") == max(-each["answer"][0] for each in report.reference.records)


def test_numbers_that_a_task_did_not_announce_are_reported_as_well(tmp_path):
    (tmp_path / "more.py").write_text("def score(doc, results):\n    return {'nats': -results[0][0], 'bits': 1.0}\n")
    path = write_tasks(
        tmp_path, SCORE, metric_list=[{"metric": "nats", "aggregation": "mean", "higher_is_better": False}]
    )
    file = path / "local_score.yaml"
    file.write_text(file.read_text() + "process_results: !function more.score\n")
    found = task(path, "local_score")
    assert metric_names(found) == ["local_score_nats"]
    report = run_task(found, shallow(), [], Settings(limit=2))
    assert set(report.reference.metrics) == set(metric_names(found)) == {"local_score_nats", "local_score_bits"}


@pytest.mark.parametrize(
    ("aggregate", "items", "value"),
    [
        (replay.lm_eval_metrics.mean, [0, 1], 0.5),
        (replay.lm_eval_metrics.perplexity, [-1.0, -2.0, -3.0], replay.math.exp(2)),
        (replay.lm_eval_metrics.weighted_perplexity, [(-2.0, 1), (-3.0, 4)], replay.math.exp(1)),
        (replay.lm_eval_metrics.bits_per_byte, [(-2.0, 1), (-3.0, 4)], 1 / replay.math.log(2)),
        (lambda items: sum(items) / len(items), [0.2, 0.6], 0.4),
    ],
)
def test_intervals_are_of_documents_drawn_again(aggregate, items, value):
    assert aggregate(items) == pytest.approx(value)
    found = replay._estimate(value, items, aggregate, "N/A", seed=0)
    assert found.value == value
    assert found.low < value < found.high
    assert [found.low, found.high] == pytest.approx(sorted(aggregate([item]) for item in (min(items), max(items))))


def test_where_documents_cannot_be_drawn_lm_evals_standard_error_is_taken():
    assert replay._estimate(0.5, [("a", 1)], max, 0.1, seed=0) == replay.Estimate(0.5, 0.5 - 0.196, 0.5 + 0.196)
    assert replay._estimate(0.5, [("a", 1)], max, "N/A", seed=0) == replay.Estimate.exact(0.5)


@pytest.mark.slow
def test_lm_eval_is_not_imported_for_our_own_tasks():
    script = (
        "import sys\nfrom kvmix_cli.evaluation import get_tasks\n"
        "get_tasks(['perplexity', 'recall'], {})\nsys.exit('lm_eval' in sys.modules)"
    )
    assert forking.run(code=script).returncode == 0


def test_without_lm_eval_its_tasks_are_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"no task 'gsm8k'; .*not installed: pip install 'kvmix\[eval\]'"):
        get_task("gsm8k")
    with pytest.raises(EvaluationError, match=r"no task 'recal' \(did you mean 'recall'\?\)"):
        get_task("recal")
    assert get_task("recall").name == "recall"


@pytest.mark.slow
def test_names_that_nobody_knows_are_errors_with_the_nearest_of_both(folder):
    with pytest.raises(EvaluationError, match=r"no task 'recal' \(did you mean 'recall'\?\); there are perplexity, "):
        get_task("recal")
    with pytest.raises(EvaluationError, match=r"and \d{4,} of lm-eval, the nearest .*gsm8k"):
        get_task("gsm8kk")
    with pytest.raises(EvaluationError, match="the nearest local_choose"):
        task(folder, "local_choos")
    with pytest.raises(EvaluationError, match=r"no task of lm-eval matches 'nothing_\*'"):
        get_task("nothing_*")


@pytest.mark.slow
def test_tasks_of_lm_eval_are_known_with_what_they_report_before_any_data_is_there():
    assert set(metric_names(get_task("gsm8k"))) == {
        "gsm8k_exact_match_strict_match",
        "gsm8k_exact_match_flexible_extract",
    }
    assert set(metric_names(get_task("wikitext"))) >= {"wikitext_word_perplexity", "wikitext_bits_per_byte"}
    assert "truthfulqa_gen_bleu_max" in metric_names(get_task("truthfulqa_gen"))
    assert metric_names(get_task("niah_single_1")) == ["niah_single_1_4096"]
    ruler = get_task("ruler_*", {"max_length": 8192})
    assert set(metric_names(ruler)) >= {"ruler_vt_8192", "ruler_cwe_8192"}
    whole = get_task("ruler*")
    assert whole._selection.names == ("ruler",)
    assert len(whole._selection.tasks) == 13
    mmlu = get_task("mmlu")
    assert metric_names(mmlu)[0].startswith("mmlu")
    assert {"mmlu_acc", "mmlu_stem_acc", "mmlu_anatomy_acc"} <= set(metric_names(mmlu))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("bad.yaml", "task: bad\n  x: [\n", r"bad\.yaml:2: broken YAML: mapping values are not allowed here"),
        ("list.yaml", "- task: bad\n", r"list\.yaml: a task file is a mapping with `task:` or `group:`, not a list"),
        ("lost.yaml", "task: lost\ninclude: base.yaml\n", r"lost\.yaml: includes base\.yaml, which does not exist"),
        ("bytes.yaml", b"\xff\xfe\x00", r"cannot read .*bytes\.yaml"),
    ],
)
def test_a_broken_file_in_the_users_folder_is_an_error_that_names_it(tmp_path, file, text, said):
    write_tasks(tmp_path, CHOOSE)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EvaluationError, match=said):
        task(tmp_path, "local_choose")


@pytest.mark.parametrize(
    ("item", "said"), [({"dataset_path": "x", "metric": "y"}, "only dataset_path, metric"), (3, "3")]
)
def test_a_group_with_an_item_that_has_no_name_is_an_error(tmp_path, item, said):
    write_tasks(tmp_path, CHOOSE, {"group": "ours", "task": ["local_choose", item]})
    with pytest.raises(EvaluationError, match=f"ours: an item of its list of tasks has no name, {said}; give one"):
        task(tmp_path, "ours")


def test_a_group_of_the_users_may_change_a_task_of_lm_evals(tmp_path):
    write_tasks(tmp_path, {"group": "ours", "task": [{"task": "gsm8k", "num_fewshot": 3}, {"task": "new", "x": 1}]})
    tasks = task(tmp_path, "ours")._selection.tasks
    assert tasks["gsm8k"]["num_fewshot"] == 3
    assert tasks["gsm8k"]["dataset_path"]
    assert tasks["ours::new"] == {"x": 1}


def test_a_folder_without_tasks_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="has no task: there is no"):
        task(tmp_path, "local_choose")
    with pytest.raises(EvaluationError, match="does not exist"):
        task(tmp_path / "none", "local_choose")
    (tmp_path / "file.yaml").write_text("task: x")
    with pytest.raises(EvaluationError, match="is a file; give the folder it is in"):
        task(tmp_path / "file.yaml", "local_choose")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_split": "dev"}, "local_choose: its data has no split 'dev', which the task needs"),
        ({"test_split": None}, "it names no split to measure on"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, "its data cannot be loaded: Unable to find"),
        (
            {"dataset_path": "no/such-data", "dataset_kwargs": {}},
            "its data cannot be loaded: Couldn't reach 'no/such-data'",
        ),
        ({"doc_to_target": "{{answer.missing}}"}, "local_choose: lm-eval cannot set it up: UndefinedError"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "nothing"}]}]}, "lm-eval cannot"),
    ],
)
def test_a_task_that_cannot_be_set_up_is_one_line(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    some = write_tasks(tmp_path, CHOOSE, **changes)
    with pytest.raises(EvaluationError, match=said) as error:
        run_task(task(some, "local_choose"), shallow(), [], SETTINGS)
    assert "\n" not in str(error.value)


def test_more_examples_than_there_are_is_an_error(tmp_path):
    some = write_tasks(tmp_path, CHOOSE, training_split="train", fewshot_split="train")
    with pytest.raises(EvaluationError, match="local_choose: no prompts can be made of its documents: ValueError"):
        task(some, "local_choose", num_fewshot=100).samples(shallow(), SETTINGS)


def test_an_answer_that_the_tasks_own_code_cannot_score_is_an_error_in_its_row(tmp_path):
    (tmp_path / "failing.py").write_text("def score(doc, results):\n    raise KeyError('no such thing')\n")
    path = write_tasks(tmp_path, SCORE)
    file = path / "local_score.yaml"
    file.write_text(file.read_text() + "process_results: !function failing.score\n")
    report = run_task(task(path, "local_score"), shallow(), [], Settings(limit=1))
    assert report.reference.error == "local_score: lm-eval cannot score the answers: KeyError: 'no such thing'"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unsafe_code": True}, "local_score runs code that the model has written"),
        ({"doc_to_image": "{{context}}"}, "local_score asks about images or sound"),
    ],
)
def test_kinds_of_tasks_that_cannot_be_run_here_are_refused_at_once(tmp_path, changes, said):
    with pytest.raises(EvaluationError, match=said):
        task(write_tasks(tmp_path, SCORE, **changes), "local_score")


def test_options_that_the_model_cannot_follow_are_errors(folder):
    with pytest.raises(EvaluationError, match="the tokenizer of builtin:tiny has no chat template; leave out"):
        task(folder, "local_choose", apply_chat_template=True).samples(shallow(), SETTINGS)
    with pytest.raises(EvaluationError, match="--max-length 5000 is more than the model's limit of 4096 tokens"):
        task(folder, "local_choose", max_length=5000).samples(shallow(), SETTINGS)


@pytest.fixture
def given(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["eval", "--model", "builtin:tiny", "--device", "cpu", "--uniform", "2", "--include-path", folder]


@pytest.mark.slow
def test_the_command_measures_a_local_task_and_checks_a_gate(given):
    found = kvmix_json(*given, "--task", "local_choose", "--limit", "2", "--fail-if", "local_choose_acc<-101%")
    assert [row["plan"] for row in found["rows"]] == ["unquantized", "uniform-2"]
    assert set(found["rows"][1]["metrics"]) == {"local_choose_acc", "local_choose_acc_norm"}
    assert found["gates"][0]["passed"]
    failed = kvmix(*given, "--task", "local_choose", "--limit", "2", "--resume", "--fail-if", "local_choose_acc>=0")
    assert failed.exit_code == 3
    assert "documents of local_choose" in failed.stdout


def test_the_command_names_a_metric_that_a_gate_has_wrong_before_anything_is_loaded(given):
    said = refused(kvmix(*given, "--task", "local_choose", "--fail-if", "local_chose_acc<0.5"))
    assert "no metric 'local_chose_acc' (did you mean 'local_choose_acc'?)" in said


def test_the_command_refuses_options_of_lm_eval_for_our_own_tasks(given):
    assert "--include-path is no option of recall" in refused(kvmix(*given, "--task", "recall"))


def test_all_local_tasks_are_of_the_kinds_there_are():
    assert {each["output_type"] for each in (GENERATE, CHOOSE, SCORE, ROLL)} == {
        "generate_until",
        "multiple_choice",
        "loglikelihood",
        "loglikelihood_rolling",
    }
    assert GROUP["group"] not in tasks()
