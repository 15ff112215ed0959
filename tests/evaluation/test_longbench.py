import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from chatty import LOSES_TEXT, ends_texts
from commandline import kvmix, kvmix_json, refused
from evaluating import shallow, tiny, uniform
from generation_files import GENERATION_FILES
from longbench_files import lines, record, write
from transformers import GenerationConfig

from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.batch import StopRule, generate_batch
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task, get_tasks, split_tasks, tasks
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.evaluation.tasks import lm_eval as harness
from kvmix_cli.evaluation.tasks.longbench import task as module
from kvmix_cli.evaluation.tasks.longbench.datasets import DATASETS, DATASETS_E, MEMBERS
from kvmix_cli.evaluation.tasks.longbench.lm_eval_parts import score
from kvmix_cli.models import loading as models

SETTINGS = Settings()
TWO = Subject("two", uniform(2, info=shallow().info))
EIGHT = {
    "triviaqa",
    "qasper",
    "multifieldqa_en",
    "qmsum",
    "2wikimqa",
    "repobench-p",
    "trec",
    "passage_retrieval_en",
}


@pytest.fixture
def brief(monkeypatch):
    """Answers of at most three tokens."""
    for name, dataset in list(DATASETS.items()):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(dataset, max_new_tokens=3))


def longbench(name, folder, **options):
    return get_task(name, {"data_dir": Path(folder), **options})


def metric_names(task):
    return [metric.name for metric in task.metrics]


def with_tokenizer(loaded, template):
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(loaded, tokenizer=tokenizer)


# What is chosen


def test_all_21_data_sets_are_chosen_unless_some_are():
    assert len(get_task("longbench").datasets) == 21
    assert len(get_task("longbench-e").datasets) == 13
    assert [one.name for one in get_task("longbench:trec,qasper,trec").datasets] == ["trec", "qasper"]
    assert {one.name for one in get_task("longbench:kvmix8").datasets} == EIGHT
    assert get_task("longbench:lcc,kvmix8").datasets[0].name == "lcc"
    assert get_task("longbench:kvmix8").name == "longbench:kvmix8"


def test_a_list_of_tasks_may_hold_data_sets():
    wanted = ("perplexity", "longbench:qasper,trec", "recall", "longbench-e:lcc")
    assert split_tasks("perplexity,longbench:qasper,trec,recall,longbench-e:lcc") == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("longbench:qasper,trce", r"longbench has no data set 'trce' \(did you mean 'trec'\?\); it has narrativeqa, "),
        ("longbench:qasper,trce,lcc", r"longbench has no data set 'trce'.*; and there is no task of this name"),
        ("longbench-e:qasper,narrativeqa", r"longbench-e has no data set 'narrativeqa'.*longbench_narrativeqa"),
        ("longbench,trce", "no task 'trce'"),
    ],
)
def test_an_unknown_member_of_a_list_is_named_as_a_data_set(names, said):
    with pytest.raises(EvaluationError, match=said):
        get_tasks(split_tasks(names), {})


def test_a_set_of_tasks_stands_for_its_tasks():
    ours = ("recall", "passkey", "kv_retrieval", "multi_hop", "code_completion")
    assert split_tasks("long-context") == ours
    assert split_tasks("perplexity,long-context,recall") == ("perplexity", *ours)
    assert split_tasks("longctx_bench,memory") == ("longbench:longctx", "passkey", "memory")
    datasets = [dataset.name for dataset in get_task("longbench:longctx").datasets]
    assert len(datasets) == 16
    assert not any(name.endswith("_zh") for name in datasets)


def test_an_unknown_member_is_named_without_lm_eval_too(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"longbench has no data set 'trce' .*trec"):
        get_tasks(split_tasks("longbench:qasper,trce"), {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("longbench:qaspr", r"longbench has no data set 'qaspr' \(did you mean 'qasper'\?\); it has narrativeqa, "),
        ("longbench:qasper,repobench_p", r"'repobench_p' \(did you mean 'repobench-p'\?\)"),
        ("longbench:", "longbench has no data set ''"),
        ("longbench-e:musique", "longbench-e has no data set 'musique'"),
        ("longbench-e:kvmix8", "longbench-e has no data set 'kvmix8'"),
    ],
)
def test_an_unknown_data_set_is_an_error_with_the_nearest_name(name, said):
    with pytest.raises(EvaluationError, match=said):
        get_task(name)


def test_names_of_metrics_are_unique_over_all_tasks_and_fit_a_gate():
    names = [name for task in tasks() for name in metric_names(get_task(task))]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in names if name.startswith("longbench"))
    assert {"longbench", "longbench_qasper", "longbench_repobench_p", "longbench_kvmix8"} <= set(names)
    assert {"longbench_e", "longbench_e_8k", "longbench_e_qasper", "longbench_e_qasper_0_4k"} <= set(names)


def test_the_average_of_eight_is_there_when_all_eight_are():
    assert "longbench_kvmix8" not in metric_names(get_task("longbench:qasper,trec"))
    assert "longbench_kvmix8" in metric_names(get_task("longbench:lcc,kvmix8"))


# Averages


def made(dataset, number, length=10):
    return {"dataset": dataset, "score": number, "length": length, "tokens": 1}


def test_every_data_set_counts_the_same_however_many_samples_it_has():
    records = [made("qasper", 10), made("trec", 100), made("qasper", 20), made("qasper", 60)]
    reference = [{**one, "score": one["score"] + 2} for one in records]
    metrics = get_task("longbench:qasper,trec").summarise(records, reference, seed=0)
    values = {name: estimate.value for name, estimate in metrics.items()}
    assert values == {"longbench": 65, "longbench_qasper": 30, "longbench_trec": 100, "longbench_change": -2}
    change, qasper, trec = (metrics[f"longbench_{name}"] for name in ("change", "qasper", "trec"))
    assert (change.low, change.high) == (-2, -2), "paired with the same samples of the unquantized cache"
    assert 10 <= qasper.low < 30 < qasper.high <= 60
    assert (trec.low, trec.high) == (100, 100)


def test_eight_data_sets_have_their_average_among_more():
    records = [made(name, 50) for name in EIGHT] + [made("lcc", 95)]
    metrics = get_task("longbench:lcc,kvmix8").summarise(records, None, seed=0)
    assert metrics["longbench_kvmix8"].value == 50
    assert metrics["longbench"].value == 55
    assert "longbench_change" not in metrics


def test_longbench_e_is_averaged_in_each_bin_of_lengths():
    lengths = {0: 10, 3999: 20, 4000: 30, 7999: 50, 8000: 60, 90_000: 80}
    records = [made("qasper", number, length) for length, number in lengths.items()] + [made("trec", 100, 5000)]
    metrics = get_task("longbench-e:qasper,trec").summarise(records, records, seed=0)
    values = {name.removeprefix("longbench_e"): estimate.value for name, estimate in metrics.items()}
    assert {name: values[f"_qasper_{name}"] for name in ("0_4k", "4_8k", "8k")} == {"0_4k": 15, "4_8k": 40, "8k": 70}
    assert values["_qasper"] == pytest.approx(250 / 6)
    assert (values["_0_4k"], values["_4_8k"], values["_8k"]) == (15, 70, 70)
    assert values["_trec_4_8k"] == 100
    assert "_trec_8k" not in values, "nothing was measured there"
    assert values["_change"] == 0


# From files to rows


@pytest.mark.slow
def test_all_data_sets_run_from_end_to_end(tmp_path, brief):
    write(tmp_path, *DATASETS, count=1)
    report = run_task(longbench("longbench", tmp_path), shallow(), [TWO], SETTINGS)
    assert report.tokens <= 21 * 3
    assert report.warnings == ()
    for row in report.rows:
        assert row.error is None
        assert {one["dataset"] for one in row.records} == set(DATASETS)
        assert set(row.metrics) == set(metric_names(get_task("longbench"))) - (
            {"longbench_change"} if row.plan == "unquantized" else set()
        )
        for one in row.records:
            wanted = record(one["dataset"])
            again = score(DATASETS[one["dataset"]], one["prediction"], wanted["answers"], wanted["all_classes"] or ())
            assert one["score"] == again
            assert row.value(f"longbench_{DATASETS[one['dataset']].key}") == one["score"]
        mean = sum(one["score"] for one in row.records) / 21
        assert row.value("longbench") == pytest.approx(mean)
    assert report.rows[0].quantized_share == 0 < report.rows[1].quantized_share


def test_longbench_e_reads_its_own_files(tmp_path, brief):
    write(tmp_path, "qasper", count=5)
    write(tmp_path, "qasper", suffix="_e")
    report = run_task(longbench("longbench-e:qasper", tmp_path), shallow(), [], SETTINGS)
    assert len(report.rows[0].records) == 2
    assert "longbench_e_qasper_0_4k" in report.rows[0].metrics


def test_the_limit_is_of_each_data_set_and_the_longest_prompt_comes_first(tmp_path):
    write(tmp_path, "qasper", "trec", count=5)
    prompts = longbench("longbench:qasper,trec", tmp_path).samples(shallow(), Settings(limit=3))
    assert [prompt.name for prompt in prompts] == [
        f"{name} {line}" for name in ("qasper", "trec") for line in (3, 2, 1)
    ]
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths[:3] == sorted(lengths[:3], reverse=True)


def test_prompts_are_told_apart_by_all_that_scores_depend_on(tmp_path):
    write(tmp_path, "trec", count=1)
    (prompt,) = longbench("longbench:trec", tmp_path).samples(shallow(), SETTINGS)
    changes = ({"ids": prompt.ids[1:]}, {"answers": ("Number",)}, {"classes": ("Reason",)}, {"length": 5})
    seen = {repr(dataclasses.replace(prompt, **change)) for change in ({}, *changes)}
    assert len(seen) == 5


# The cache


@pytest.mark.slow
def test_the_batch_changes_no_score(tmp_path, brief):
    text = lines(record("qasper", 0, input=f"What is {word}?") for word in ("one", "two", "six", "it", "ten"))
    (tmp_path / "qasper.jsonl").write_text(text)
    write(tmp_path, "trec", count=1)

    def rows(batch):
        return run_task(longbench("longbench:qasper,trec", tmp_path, batch_size=batch), shallow(), [TWO], SETTINGS).rows

    alone = rows(None)
    for size in (2, "auto"):
        for one, other in zip(alone, rows(size), strict=True):
            assert one.metrics == other.metrics
            assert [each["prediction"] for each in one.records] == [each["prediction"] for each in other.records]


# Answers


@pytest.mark.parametrize(("eos", "ends"), [(1, (1,)), ([1, 5], (1, 5)), (None, (1,))])
def test_an_answer_ends_at_any_end_token_and_on_samsum_at_a_newline_but_not_at_once(eos, ends, monkeypatch):
    monkeypatch.setattr(shallow().model, "generation_config", GenerationConfig(eos_token_id=eos))
    newline = shallow().tokenizer("\n").input_ids[-1]
    assert module.stop_rule(shallow(), DATASETS["qasper"]) == StopRule(128, ends)
    assert module.stop_rule(shallow(), DATASETS["samsum"]) == StopRule(128, (*ends, newline), min_new_tokens=1)


def test_the_built_in_model_stops_where_it_should(tmp_path):
    write(tmp_path, "samsum", count=1)
    task = longbench("longbench:samsum", tmp_path)
    (prompt,) = task.samples(tiny(), SETTINGS)
    text = task.measure(tiny(), Subject(), prompt, SETTINGS)["prediction"]
    assert text.endswith("\n")
    assert "\n" not in text[:-1]
    assert text.strip()
    (plain,) = generate_batch(tiny(), Subject(), [prompt.ids], len(prompt.ids) - 1, StopRule(1)).tokens
    assert tiny().tokenizer.decode(plain) == "\n", "which would have ended it at once"


def test_only_samsum_stops_at_a_newline():
    assert [name for name, dataset in DATASETS.items() if dataset.stop_at_newline] == ["samsum"]


@pytest.mark.slow
@pytest.mark.parametrize("file", GENERATION_FILES[::4], ids=",".join)  # all of them in decoding/test_batch.py
def test_a_checkpoints_generation_settings_change_no_answer(file, tmp_path, brief, monkeypatch):
    task = longbench("longbench:qasper", equal_prompts(tmp_path, 2), batch_size=2)
    prompts = task.samples(shallow(), SETTINGS)

    def records():
        return [list(task.records(shallow(), subject, prompts, SETTINGS)) for subject in (Subject(), TWO)]

    plain = records()
    monkeypatch.setattr(shallow().model, "generation_config", GenerationConfig(**file))
    assert records() == plain


# The chat template, and what is said of it

TEMPLATE = "[{% for m in messages %}{{ m.content }}{% endfor %}]"


def test_a_chat_template_is_put_around_all_but_few_shot_and_code(tmp_path):
    write(tmp_path, *DATASETS, count=1)
    prompts = longbench("longbench", tmp_path).samples(with_tokenizer(shallow(), TEMPLATE), SETTINGS)
    bare = {prompt.dataset.name for prompt in prompts if not prompt.chat}
    assert bare == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    for prompt in prompts:
        text = shallow().tokenizer.decode(prompt.ids)
        assert (text.startswith("[") and text.endswith("]")) == prompt.chat


def test_a_chat_template_that_loses_the_question_is_an_error(tmp_path):
    write(tmp_path, "qasper", count=1)
    with pytest.raises(TextError, match="chat template of builtin:tiny cannot be used: it leaves out"):
        longbench("longbench:qasper", tmp_path).samples(with_tokenizer(shallow(), LOSES_TEXT), SETTINGS)


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(tmp_path):
    write(tmp_path, "qasper", "trec", count=1)
    task = longbench("longbench:qasper,trec", tmp_path)
    assert task.samples(ends_texts(shallow()), SETTINGS) == task.samples(shallow(), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "template", "said"),
    [
        ("qasper,trec", TEMPLATE, "chat template around qasper;"),
        ("qasper,trec", None, "no chat template: the tokenizer has none"),
        ("trec", TEMPLATE, "no chat template: LongBench asks these data sets without"),
    ],
)
def test_the_description_names_the_protocol(members, template, said, tmp_path):
    write(tmp_path, "qasper", "trec", count=30)
    task = longbench(f"longbench:{members}", tmp_path, max_length=400)
    prompts = task.samples(with_tokenizer(shallow(), template), SETTINGS)
    description = task.describe(prompts, SETTINGS)
    assert said in description
    cut = sum(prompt.cut > 0 for prompt in prompts)
    assert 0 < cut < len(prompts)
    assert f", {cut} of them cut in the middle to fit --max-length 400; " in description
    assert "prompts and metrics of lm-eval 0." in description
    assert "trec 30" in description


@pytest.mark.slow
def test_a_prompt_leaves_room_for_its_answer(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(lines([record("qasper", 400)]))
    task = longbench("longbench:qasper", tmp_path)
    (prompt,) = task.samples(shallow(), SETTINGS)
    assert prompt.cut > 0
    assert shallow().max_length - 128 - 8 <= len(prompt.ids) <= shallow().max_length - 128
    (endless,) = task.samples(dataclasses.replace(shallow(), max_length=None), SETTINGS)
    assert (endless.cut, len(endless.ids) > shallow().max_length) == (0, True)


@pytest.mark.parametrize(
    ("options", "limit", "said"),
    [
        ({"max_length": 8}, 4096, "--max-length must be at least 16, got 8"),
        ({"max_length": 5000}, 4096, "--max-length 5000 is more than the model's limit of 4096 tokens"),
        ({}, 140, r"qasper, line 1: no room for the prompt: the model's limit is 140 tokens and an answer takes 128"),
    ],
)
def test_a_context_that_does_not_fit_is_an_error(options, limit, said, tmp_path):
    write(tmp_path, "qasper")
    task = longbench("longbench:qasper", tmp_path, **options)
    with pytest.raises(EvaluationError, match=said):
        task.samples(dataclasses.replace(shallow(), max_length=limit), SETTINGS)


def test_malformed_lines_are_a_warning_of_the_report(tmp_path, brief):
    (tmp_path / "qasper.jsonl").write_text("{\n" + lines([record("qasper")]))
    (tmp_path / "trec.jsonl").write_text(lines([record("trec"), record("trec", answers=[])]))
    report = run_task(longbench("longbench:qasper,trec", tmp_path), shallow(), [], SETTINGS)
    qasper, trec = report.warnings
    assert "qasper.jsonl: skipped 1 malformed line of 2 (line 1: not valid JSON" in qasper
    assert "trec.jsonl: skipped 1 malformed line of 2 (line 2: no answers)" in trec
    with pytest.raises(EvaluationError, match=r"qasper\.jsonl, line 1: "):
        run_task(longbench("longbench:qasper,trec", tmp_path, strict=True), shallow(), [], SETTINGS)


# Memory


def exhausted(monkeypatch, fits):
    """No memory for a batch that does not fit; gives the sizes of all that were tried."""
    tried = []

    def scarce(loaded, subject, prompts, *rest):
        tried.append(len(prompts))
        if not fits(len(tried), len(prompts)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate_batch(loaded, subject, prompts, *rest)

    monkeypatch.setattr(module, "generate_batch", scarce)
    return tried


def equal_prompts(folder, count):
    (folder / "qasper.jsonl").write_text(lines([record("qasper")] * count))
    return folder


@pytest.mark.slow
def test_an_automatic_batch_shrinks_until_it_fits(tmp_path, brief, monkeypatch):
    tried = exhausted(monkeypatch, lambda call, size: size <= 2)
    task = longbench("longbench:qasper", equal_prompts(tmp_path, 5), batch_size="auto")
    report = run_task(task, shallow(), [], SETTINGS)
    assert tried == [5, 2, 2, 1]
    assert len(report.rows[0].records) == 5


@pytest.mark.slow
def test_out_of_memory_keeps_what_there_is_and_a_smaller_batch_goes_on(tmp_path, brief, monkeypatch):
    data = equal_prompts(tmp_path, 5)
    tried = exhausted(monkeypatch, lambda call, size: call != 2)
    task = longbench("longbench:qasper", data, batch_size=2)
    report = run_task(task, shallow(), [], SETTINGS, RunFolders(tmp_path / "out", "tiny"))
    (kept,) = (tmp_path / "out").glob("*/samples.jsonl")
    assert len(kept.read_text().splitlines()) == 2
    length = json.loads(kept.read_text().splitlines()[0])["prompt_tokens"]
    assert report.rows[0].error == (
        f"out of memory at 2 prompts of {length} tokens (qasper 3) on cpu; "
        "use a smaller --batch-size and go on with --resume, or use a smaller --max-length"
    )
    tried.clear()
    exhausted(monkeypatch, lambda call, size: True)
    smaller = longbench("longbench:qasper", data, batch_size=1)
    report = run_task(smaller, shallow(), [], SETTINGS, RunFolders(tmp_path / "out", "tiny", resume=True))
    assert report.rows[0].error is None
    assert [one["sample"] for one in report.rows[0].records] == [f"qasper {line}" for line in range(1, 6)]


@pytest.mark.slow
def test_a_resumed_run_must_be_of_the_same_prompts(tmp_path, brief, monkeypatch):
    runs = RunFolders(tmp_path / "out", "tiny", resume=True)
    answered = exhausted(monkeypatch, lambda call, size: True)
    write(tmp_path, "qasper", count=1)
    task = longbench("longbench:qasper", tmp_path)
    first = run_task(task, shallow(), [], SETTINGS, runs)
    assert run_task(task, shallow(), [], SETTINGS, runs) == first
    assert answered == [1], "the second time it is only read"
    write(tmp_path, "qasper", count=2)
    with pytest.warns(UserWarning, match=r"was measured with another samples\.count"):
        changed = run_task(task, shallow(), [], SETTINGS, runs)
    assert sum(answered) == 1 + 2
    assert len(changed.rows[0].records) == 2


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *arguments, **options: tiny())
    return ("eval", "--model", "builtin:tiny", "--device", "cpu", "--data-dir", write(tmp_path / "data", *MEMBERS))


@pytest.mark.slow
def test_the_command_measures_data_sets_and_their_average(command, brief):
    options = ("--task", "longbench:qasper,trec", "--uniform", 2, "--limit", 1, "--batch-size", 2)
    result = kvmix_json(*command, *options, "--fail-if", "longbench_qasper<0")
    assert result["task"] == "longbench:qasper,trec"
    rows = {row["plan"]: row for row in result["rows"]}
    assert set(rows["unquantized"]["metrics"]) == {"longbench", "longbench_qasper", "longbench_trec"}
    assert set(rows["uniform-2"]["metrics"]) - set(rows["unquantized"]["metrics"]) == {"longbench_change"}
    assert rows["uniform-2"]["quantized_share"] > 0
    assert result["gates"][0]["passed"]


@pytest.mark.slow
def test_many_data_sets_are_the_lines_of_a_table(command, brief):
    result = kvmix(*command, "--task", "longbench:kvmix8", "--uniform", 2, "--limit", 1)
    table = [line.split() for line in result.stdout.splitlines() if line.startswith(("plan ", "longbench "))]
    head, *rows = table[1:] if table[0][1] == "of" else table
    assert head == ["plan", "unquantized", "uniform-2"]
    assert {" ".join(row[1:-2]) for row in rows} >= {"kvmix8", "qasper", "repobench p", "passage retrieval en"}
    assert "8 prompts (triviaqa 1, qasper 1, " in result.stdout


@pytest.mark.slow
def test_the_command_says_what_was_wrong_with_the_data(command, brief):
    Path("data/qasper.jsonl").write_text("{\n" + lines([record("qasper")]))
    options = ("--task", "longbench:qasper", "--uniform", 16)
    result = kvmix(*command, *options)
    assert result.exit_code == 0
    assert "warning: data/qasper.jsonl: skipped 1 malformed line of 2 (line 1: " in result.stderr
    assert "data/qasper.jsonl, line 1: not valid JSON" in refused(kvmix(*command, *options, "--strict"))
    assert "did you mean 'qasper'" in refused(kvmix(*command, "--task", "longbench:qaspr", "--uniform", 2))
    assert "has no musique_e.jsonl" not in refused(kvmix(*command, "--task", "longbench-e:musique", "--uniform", 2))
    assert "has no trec_e.jsonl (did you mean" in refused(kvmix(*command, "--task", "longbench-e:trec", "--uniform", 2))
    assert "--data-dir is no option of recall" in refused(kvmix(*command, "--task", "recall", "--uniform", 2))


def test_all_files_of_longbench_e_have_their_names():
    assert set(DATASETS_E) < set(DATASETS)
    assert len(DATASETS_E) == 13
