import json
from pathlib import Path

import pytest
from commandline import TINY, kvmix, kvmix_json, refused
from evaluating import save_plan, uniform

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.errors import QuantizationError
from kvmix_cli.evaluation.results import Estimate, Metric

SHORT = ("--length", 332, "--prefix", 300, "--limit", 2)


pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.mark.slow
def test_the_json_object_has_the_stable_keys():
    result = kvmix_json("eval", *TINY, *SHORT, "--uniform", 2, "--uniform", 16, "--fail-if", "perplexity>+900%")
    assert {"command", "model", "task", "tokens", "rows", "reference", "gates"} <= set(result)
    assert (result["command"], result["model"], result["task"]) == ("eval", "builtin:tiny", "perplexity")
    assert result["tokens"] == 2 * 31
    assert result["reference"] == "unquantized"
    assert result["layers"] == {"quantized": 8, "total": 8, "full_precision": 0, "stock": {}}
    assert [row["plan"] for row in result["rows"]] == ["unquantized", "uniform-2", "uniform-16"]
    for row in result["rows"]:
        assert {"plan", "nominal_bits", "stored_bits", "quantized_share", "metrics"} <= set(row)
        for estimate in row["metrics"].values():
            assert set(estimate) == {"value", "low", "high"}
            assert all(type(number) is float for number in estimate.values())
    shares = [row["quantized_share"] for row in result["rows"]]
    assert shares[0] == shares[2] == 0 < shares[1]
    full, reference = result["rows"][2]["metrics"], result["rows"][0]["metrics"]
    assert full["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-6)  # tensors with other strides
    assert [(gate["expression"], gate["passed"]) for gate in result["gates"]] == [("perplexity>+900%", True)]


@pytest.mark.slow
def test_every_task_runs_on_the_built_in_model():
    options = ("--task", "perplexity,recall,memory", "--length", 450, "--prefix", 400, "--limit", 1, "--uniform", 4)
    result = kvmix_json("eval", *TINY, *options)
    rows = {(row["task"], row["plan"]): row for row in result["rows"]}
    tasks = ("perplexity", "recall", "memory")
    assert list(rows) == [(task, plan) for task in tasks for plan in ("unquantized", "uniform-4")]
    assert 0 <= rows["recall", "uniform-4"]["metrics"]["recall"]["value"] <= 1
    assert rows["memory", "uniform-4"]["metrics"]["prediction_error_percent"]["value"] == 0
    assert {path.name.split("__")[0] for path in Path("results").iterdir()} == set(tasks)


@pytest.mark.slow
def test_the_long_context_suite_runs_at_several_lengths_and_says_what_it_left_out(loaded_shallow):
    options = ("--task", "long-context", "--length", "380,420,8K", "--limit", 2, "--uniform", 2)
    result = kvmix_json("eval", *TINY, *options)
    names = ["recall", "passkey", "kv_retrieval", "multi_hop", "code_completion"]
    assert list(dict.fromkeys(row["task"] for row in result["rows"])) == names
    assert all(row["quantized_share"] > 0 for row in result["rows"] if row["plan"] == "uniform-2")
    assert result["warnings"] == [
        f"{name}: left out 8192 tokens: --limit 2 is fewer than the lengths" for name in names
    ]
    assert all("in 2 exercises of 380 and 420 tokens" in result["descriptions"][name] for name in names)


def test_several_lengths_are_for_tasks_that_have_contexts():
    said = refused(kvmix("eval", *TINY, "--uniform", 2, "--length", "512,1K"))
    assert said == "several --length are for tasks with contexts of their own, which perplexity is not; give one"


def test_a_table_shows_bits_share_intervals_and_what_was_measured(counting):
    result = kvmix("eval", *TINY, "--uniform", 2)
    assert result.exit_code == 0
    for word in ("counting of builtin:tiny", "nominal", "stored", "quantized", "unquantized", "uniform-2", "4 numbers"):
        assert word in result.stdout
    assert "50.0%" in result.stdout
    assert "3.5 [2.5, 4.5]" in result.stdout


@pytest.mark.parametrize(("gate", "code"), [("number>20", 0), ("number>+1%", 0), ("number<4", 3), ("number<-10%", 3)])
def test_a_gate_that_fails_exits_with_3_and_is_printed(counting, gate, code):
    result = kvmix("eval", *TINY, "--uniform", 2, "--fail-if", gate)
    assert result.exit_code == code
    assert f"gate {gate}: {'FAILED' if code else 'passed'}" in result.stdout
    assert ("uniform-2: number 3.5 <" in result.stdout) == bool(code)


def test_with_json_a_failing_gate_is_in_the_object_and_on_stderr(counting):
    result = kvmix("eval", *TINY, "--uniform", 2, "--json", "-q", "--fail-if", "number>20", "--fail-if", "number<4")
    assert result.exit_code == 3
    assert [gate["passed"] for gate in json.loads(result.stdout)["gates"]] == [True, False]
    assert result.stderr == "kvmix: gate number<4 failed: uniform-2: number 3.5 < 4\n"


def test_plans_are_files_names_or_short_forms_in_the_order_given(counting):
    save_plan("named", uniform(4))
    path = uniform(8).save(Path("elsewhere.yaml"))
    options = ("--plan", "0-7:k2v2", "--plan", path, "--plan", "named", "--uniform", 3)
    rows = kvmix_json("eval", *TINY, *options)["rows"]
    assert [row["plan"] for row in rows] == ["unquantized", "0-7:k2v2", "elsewhere", "named", "uniform-3"]
    assert [row["stored_bits"] for row in rows] == [16, 4, 10, 6, 5], "all have the cache settings of elsewhere.yaml"


def test_the_newest_plan_is_the_default(counting):
    save_plan("newest", uniform(4))
    result = kvmix("eval")
    assert "profiles/builtin--tiny/plans/newest.yaml" in result.stderr
    assert "newest" in result.stdout


def test_a_preset_of_kvtuner_is_a_plan(counting):
    Path("preset.yaml").write_text("".join(f"{i}: {{nbits_key: 8, nbits_value: 4}}\n" for i in range(8)))
    row = kvmix_json("eval", *TINY, "--plan", "preset.yaml")["rows"][1]
    assert (row["plan"], row["nominal_bits"]) == ("preset", 6)


def test_a_map_of_modelopt_is_a_plan(counting):
    layers = {f"model.layers.{i}.self_attn": {"quant_algo": "FP8"} for i in range(4)}
    Path("hf_quant_config.json").write_text(json.dumps({"quantization": {"kv_cache_quantized_layers": layers}}))
    row = kvmix_json("eval", *TINY, "--plan", "hf_quant_config.json")["rows"][1]
    assert (row["plan"], row["nominal_bits"]) == ("hf_quant_config", 12)


def test_an_interrupted_evaluation_is_gone_on_with(counting):
    def stop(subject, sample):
        if (subject.name, sample.name) == ("uniform-2", "2"):
            raise KeyboardInterrupt

    counting.before = stop
    interrupted = kvmix("eval", *TINY, "--uniform", 2, "--output-dir", "out")
    assert interrupted.exit_code == 130
    assert "--resume" in interrupted.stderr
    counting.before = lambda subject, sample: None
    counting.measured.clear()
    resumed = kvmix_json("eval", *TINY, "--uniform", 2, "--output-dir", "out", "--resume")
    assert counting.measured == [("uniform-2", "2"), ("uniform-2", "3")]
    afresh = kvmix_json("eval", *TINY, "--uniform", 2, "--output-dir", "afresh")
    assert {**resumed, "options": None} == {**afresh, "options": None}  # which say what was asked
    assert "with another settings.step" in refused(
        kvmix("eval", *TINY, "--uniform", 2, "--output-dir", "out", "--resume", "--step", 1)
    )


@pytest.mark.slow
def test_a_row_that_cannot_be_measured_has_an_error_and_the_exit_code_says_so(monkeypatch):
    def broken(*arguments, **options):
        raise QuantizationError("layer 3 keys: NaN or Inf among the values to quantize")

    monkeypatch.setattr(MixedCache, "from_plan", broken)
    result = kvmix("eval", *TINY, *SHORT, "--uniform", 2, "--json")
    assert result.exit_code == 1
    row = json.loads(result.stdout)["rows"][1]
    assert row["error"] == "layer 3 keys: NaN or Inf among the values to quantize"
    assert "metrics" not in row
    assert "uniform-2 could not be measured: layer 3 keys" in result.stderr
    assert kvmix("eval", *TINY, *SHORT, "--uniform", 2, "--fail-if", "perplexity>+50%").exit_code == 3


@pytest.mark.parametrize(("plans", "turned"), [(1, True), (12, False)])
def test_a_table_of_many_numbers_is_turned_unless_there_are_more_plans(counting, monkeypatch, plans, turned):
    names = [f"number_{index}" for index in range(8)]
    counting.metrics = tuple(Metric(name, higher_is_better=True) for name in names)
    monkeypatch.setattr(counting, "summarise", lambda records, reference, seed: dict.fromkeys(names, Estimate.exact(1)))
    options = [option for seed in range(plans - 1) for option in ("--baseline", f"random-plan-{seed}")]
    lines = kvmix("eval", *TINY, "--plan", "0-3:k4v2,4-7:k2v2", *options).stdout.splitlines()
    assert any(line.startswith("number 7  ") for line in lines) == turned
    assert sum(line.startswith(("0-3:k4v2", "random-plan")) for line in lines) == (0 if turned else plans)


def test_a_run_that_read_nothing_quantized_warns_loudly(counting):
    counting.share = 0
    result = kvmix("eval", *TINY, "--uniform", 2, "-q")
    assert "kvmix: warning: uniform-2: NOTHING QUANTIZED WAS READ" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            ("--task", "perplexity,recal"),
            "no task 'recal' (did you mean 'recall'?)",
            marks=pytest.mark.slow,  # lm-eval's thousands of names are read
        ),
        (("--fail-if", "perplexity"), "'perplexity' is not a gate"),
        (("--fail-if", "recall<0.8"), "no metric 'recall'; the tasks report perplexity"),
        (("--fail-if", "perplexity>1%"), "a percentage needs a sign"),
        (("--uniform", "7"), "must be one of 1, 2, 3, 4, 8, 16"),
        (("--uniform", "2"), "two rows would be called 'uniform-2'"),
        (("--plan", "nowhere.yaml"), "nowhere.yaml"),
        (("--plan", "0-7:k2"), "no plan"),
        (("--length", "5000"), "--length 5000 is more than the model's limit of 4096 tokens"),
        (("--prefix", "1023"), "--prefix 1023 leaves nothing to score of --length 1024"),
        (("--step", "0"), "--step must be at least 1"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--text", "nowhere"), "no text at nowhere"),
        (("--text", "empty.txt"), "no text in empty.txt"),
        (("--text", "short.txt"), "no document has 1024 tokens"),
        (("--output-dir", "short.txt"), "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, said):
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("only this")
    assert said in refused(kvmix("eval", *TINY, "--uniform", 2, *options))
    assert sorted(path.name for path in Path().iterdir()) == ["empty.txt", "short.txt"]


def test_without_any_plan_there_is_nothing_to_evaluate():
    assert "no plan" in refused(kvmix("eval"))
    assert "no plan" in refused(kvmix("eval", "--uniform", 2))


def test_a_plan_may_not_pass_for_the_unquantized_row():
    path = uniform(2).save(Path("unquantized.yaml"))
    assert "two rows would be called 'unquantized'" in refused(kvmix("eval", "--plan", path))


def test_uniform_plans_can_have_an_encoder(counting):
    rows = kvmix_json("eval", *TINY, "--uniform", 2, "--encode", "fitted")["rows"]
    assert [row["plan"] for row in rows] == ["unquantized", "uniform-2-fitted"]
    assert "--encode is for --uniform" in refused(kvmix("eval", *TINY, "--encode", "fitted"))


def test_an_unknown_encoder_is_a_mistake_of_usage():
    result = kvmix("eval", *TINY, "--uniform", 2, "--encode", "fited")
    assert result.exit_code == 2
    assert "'fited' is no encoder (did you mean 'fitted'?)" in " ".join(result.stderr.split())
