"""`kvmix fit`: rows of plans and of other formats, what a memory holds, refusals of one line."""

import json
import shutil

import pytest
from commandline import kvmix, kvmix_json, refused
from gguf_files import TINY, write

from kvmix_cli.models.loading import load_info
from kvmix_cli.plan import Plan

WEIGHTS = 13_902_336
ROW = {"plan", "nominal_bits", "stored_bits", "cache_bytes", "total_bytes", "fits", "max_context", "max_batch"}
OTHERS = [
    "fp8",
    "vllm-bf16",
    "vllm-fp8",
    *(f"llama.cpp-{kind}" for kind in ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")),
]


def rows_of(answer):
    return {row["plan"]: row for row in answer["rows"]}


def test_a_table_over_widths_where_nothing_is_named():
    answer = kvmix_json("fit", "builtin:tiny")
    assert (answer["command"], answer["model"], answer["weights_bytes"]) == ("fit", "builtin:tiny", WEIGHTS)
    assert (answer["context"], answer["batch"], answer["memory"]) == (4096, 1, None)
    rows = rows_of(answer)
    assert list(rows) == ["unquantized", "uniform-8", "uniform-4", "uniform-3", "uniform-2", *OTHERS]
    assert all(row.keys() >= ROW for row in rows.values())
    info = load_info("builtin:tiny")
    for bits in (8, 4, 3, 2):
        assert rows[f"uniform-{bits}"]["cache_bytes"] == Plan.uniform(info, bits, bits).cache_bytes(4096).total
    assert rows["unquantized"]["cache_bytes"] == 8 * 2 * 2 * 64 * 4096 * 2
    assert all(row["total_bytes"] == WEIGHTS + row["cache_bytes"] + row["activation_bytes"] for row in rows.values())
    assert all(row["fits"] is row["max_context"] is row["max_batch"] is None for row in rows.values())


def test_plans_presets_widths_and_averages(tmp_path):
    info = load_info("builtin:tiny")
    plan = Plan.from_short("0-1:k8v4,2-7:k2v2", info)
    file = plan.save(tmp_path / "mine.yaml")
    options = ["--plan", file, "--preset", "mikv", "--uniform", 4, "--avg-bits", 2.3, "--context", "1K", "--batch", 3]
    rows = rows_of(kvmix_json("fit", "builtin:tiny", *options))
    assert list(rows) == ["unquantized", "mine", "mikv", "uniform-4", "avg-2.3", *OTHERS]
    assert rows["mine"]["cache_bytes"] == plan.cache_bytes(1024, 3).total
    assert (rows["mine"]["nominal_bits"], rows["mine"]["stored_bits"]) == (plan.bits.nominal, plan.bits.stored)
    assert rows["avg-2.3"]["nominal_bits"] == 2.25  # two of eight layers at 3 bits


def test_gpus_have_bytes_of_their_own_and_a_speed():
    answer = kvmix_json("fit", "builtin:tiny", "--gpu", "H100", "--tp", 2, "--uniform", 4, "--context", "4K")
    assert answer["gpu"] == {"name": "h100", "tp": 2}
    rows = rows_of(answer)
    for name in ("unquantized", "uniform-4", "vllm-fp8"):
        on = rows[name]["gpu"]
        assert 2 * on["cache_bytes"] == rows[name]["cache_bytes"]
        assert on["tokens_per_s"] == pytest.approx(1 / on["step_seconds"])
        assert (on["fits"], on["max_context"], on["bound"]) == (True, 4096, "memory")
    assert rows["llama.cpp-q8_0"]["gpu"] is None
    assert rows["uniform-4"]["gpu"]["max_tokens_per_s"] > 2 * rows["unquantized"]["gpu"]["max_tokens_per_s"]
    shown = kvmix("fit", "builtin:tiny", "--gpu", "h100", "--tp", 4, "--uniform", 4)
    for words in ("on 4 x NVIDIA H100 SXM 80 GB", "each KV head is on 2 GPUs", "a bound, not a forecast", "waits for"):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "h10"), "unknown GPU 'h10' (did you mean 'h100'?)"),
        (("--gpu", "h100", "--tp", 3), "--tp 3 neither divides 2 KV heads nor is a multiple of them"),
    ],
)
def test_gpus_that_cannot_be(options, said):
    assert said in refused(kvmix("fit", "builtin:tiny", *options))


@pytest.mark.parametrize("options", [("--tp", 2), ("--gpu", "h100", "--memory", "1GiB")])
def test_options_of_gpus_that_do_not_go_together(options):
    ran = kvmix("fit", "builtin:tiny", *options)
    assert ran.exit_code == 2
    assert "--gpu" in ran.stderr


def test_the_model_of_a_plan_is_enough(tmp_path):
    file = Plan.uniform(load_info("builtin:tiny"), 2, 2).save(tmp_path / "mine.yaml")
    assert list(rows_of(kvmix_json("fit", "--plan", file)))[:2] == ["unquantized", "mine"]


def test_a_memory_holds_a_context_a_batch_and_so_many_bits():
    options = ["--memory", "120MiB", "--context", "4K", "--batch", 3]
    answer = kvmix_json("fit", "builtin:tiny", *options)
    row, *_ = answer["rows"]
    assert (row["fits"], row["max_context"] < 4096, row["max_batch"]) == (False, True, 2)
    chunked = kvmix_json("fit", "builtin:tiny", *options, "--prefill-chunk", 512)
    assert rows_of(chunked)["unquantized"]["fits"]
    assert chunked["needed_bits"] > answer["needed_bits"] > 0
    context = ["--memory", "120MiB", "--context", row["max_context"], "--batch", 3]
    assert rows_of(kvmix_json("fit", "builtin:tiny", *context))["unquantized"]["fits"]


def test_the_tables_say_what_was_counted():
    shown = kvmix("fit", "builtin:tiny", "--memory", "64MiB", "--uniform", 2)
    assert shown.exit_code == 0, shown.stderr
    for words in (
        "memory of builtin:tiny at 4096 tokens",
        "from the headers of the safetensors files",
        "its activations take about",
        "8 full (2 x 64)",
        "uniform-2 is the widest of these plans that fits",
        "kvmix allocate --memory ",
    ):
        assert words in shown.stdout
    assert "cache by kind of layer" not in shown.stdout


def test_kinds_of_layers_have_a_table(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    kinds = {
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    }
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **kinds, "architectures": ["Gemma3ForCausalLM"]}))
    answer = kvmix_json("fit", folder, "--uniform", 2)
    assert answer["layers"] == {"sliding": 4, "full": 4}
    by_kind = rows_of(answer)["unquantized"]["cache_bytes_by_kind"]
    assert by_kind == {"sliding": 4 * 511 * 2 * 2 * 64 * 2, "full": 4 * 4096 * 2 * 2 * 64 * 2}
    assert answer["weights"]["source"] == "the architecture, counted with torch"
    shown = kvmix("fit", folder, "--uniform", 2)
    assert "cache by kind of layer" in shown.stdout
    assert "4 sliding (2 x 64, 511 tokens), 4 full (2 x 64)" in shown.stdout


@pytest.mark.slow
def test_gguf_files_and_dtypes(tmp_path):
    file = write(tmp_path / "tiny.gguf", "Q8_0")
    stored = kvmix_json("fit", file)
    assert (stored["weights"]["source"], stored["weights_bytes"] < WEIGHTS) == ("the header of the GGUF file", True)
    unpacked = kvmix_json("fit", tmp_path, "--weights-dtype", "bf16")
    assert unpacked["weights_bytes"] == WEIGHTS
    whole = kvmix_json("fit", "builtin:tiny", "--dtype", "fp32")
    assert whole["weights_bytes"] == 2 * WEIGHTS
    assert rows_of(whole)["unquantized"]["cache_bytes"] == 2 * 8 * 2 * 2 * 64 * 4096 * 2


def test_refusals(tmp_path):
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.mkdir()
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "no-such-type"}')
    cases = {
        ("fit", empty): "has no config.json",
        ("fit", odd): "model type `no-such-type`",
        ("fit", "builtin:tiny", "--context", "128K"): "--context 131072 is more than the 4096 tokens",
        ("fit", "builtin:tiny", "--memory", "10MB"): "needs 13.3 MiB for weights alone",
        ("fit", "builtin:tiny", "--uniform", 5): "--uniform 5",
        ("fit", "builtin:tiny", "--plan", "nowhere.yaml"): "nowhere.yaml",
        ("fit", "builtin:tiny", "--preset", "mikvv"): "did you mean 'mikv'",
        ("fit", "builtin:tiny", "--weights-dtype", "int5"): "unknown dtype of weights 'int5' (did you mean 'int",
        ("fit", "builtin:tiny", "--avg-bits", 0.5): "--avg-bits 0.5",
    }
    for words, said in cases.items():
        assert said in refused(kvmix(*words)), words


def test_a_plan_of_another_model_is_refused(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    file = Plan.uniform(load_info("builtin:tiny"), 2, 2).save(tmp_path / "mine.yaml")
    assert "the plan was made for builtin:tiny" in refused(kvmix("fit", other, "--plan", file))


@pytest.mark.parametrize("option", [("--batch", "0"), ("--memory", "much"), ("--encode", "refit")])
def test_usage(option):
    assert kvmix("fit", "builtin:tiny", *option).exit_code == 2
