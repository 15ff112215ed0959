"""`kvmix export`: the text alone on stdout, what it stores beside it, and nothing written that cannot be expressed."""

from pathlib import Path

import pytest
from evaluating import save_plan, tiny, uniform
from made_up import make_info, make_profile

from kvmix_cli.plan import Plan


@pytest.fixture
def save(tmp_path):
    def write(short, name="plan"):
        path = tmp_path / "profiles" / "org--model" / "plans" / f"{name}.yaml"
        return Plan.from_short(short, make_info(4)).save(path)

    return write


def test_the_text_is_on_stdout_and_the_caution_on_stderr(kvmix, save):
    ran = kvmix("export", save("0:k16v16,1-3:k8v8"), "--to", "vllm")
    assert ran.out == "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0\n"
    assert ran.err.splitlines()[0] == "kvmix: stored: 10 bits an element there, 10.4 of the plan here"
    assert "kvmix: caution: 8 bits are fp8" in ran.err
    assert "rounded" not in ran.err


def test_what_was_rounded_is_said(kvmix, save):
    ran = kvmix("export", save("0:k8v8,1-3:k3v2"), "--to", "vllm", "--format", "int4_per_token_head")
    assert ran.out == "--kv-cache-dtype int4_per_token_head --kv-cache-dtype-skip-layers 0\n"
    assert "kvmix: rounded: k8v8 as k16v16 (auto) in layers 0\n" in ran.err
    assert "kvmix: rounded: k3v2 as k4v4 (int4_per_token_head) in layers 1-3\n" in ran.err


def test_a_plan_by_name_and_the_newest(kvmix, save):
    save("0-3:k4v4", "named")
    for arguments in (("named",), ()):
        assert kvmix("export", *arguments, "--to", "llama.cpp", "-q").out.startswith("--cache-type-k q4_0")


def test_to_a_file(kvmix, save, tmp_path):
    ran = kvmix("export", save("0-3:k8v4"), "--to", "kvtuner", "--out", "made/preset.yaml")
    assert ran.out == ""
    assert (tmp_path / "made" / "preset.yaml").read_text().startswith("0: {nbits_key: 8, nbits_value: 4}\n1:")


def test_as_json(kvmix, save):
    path = save("0-3:k8v8")
    result = kvmix("export", path, "--to", "vllm", "--json").json
    assert (result["command"], result["model"], result["plan"], result["to"]) == (
        "export",
        "org/model",
        str(path),
        "vllm",
    )
    assert result["text"] == "--kv-cache-dtype fp8\n"
    assert "fp8" in result["caution"]
    assert (result["stored_bits"], result["rounded"], result["measured"]) == (8, [], None)
    assert result["layers"][3] == {"index": 3, "k": "fp8", "v": "fp8"}
    assert kvmix("export", path, "--to", "kvtuner", "--json").json["layers"] is None


@pytest.mark.parametrize(
    ("to", "said"), [("vllm", "k2v16 in layers 0-3"), ("llama.cpp", "k8v8 in layers"), ("vlm", "did you mean 'vllm'")]
)
def test_what_cannot_be_exported_leaves_nothing(kvmix, save, tmp_path, to, said):
    short = "0-3:k2v16" if to == "vllm" else "0-2:k8v8,3:k16v16"
    ran = kvmix("export", save(short), "--to", to, "--out", "file.txt")
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.error
    assert not (tmp_path / "file.txt").exists()


def test_the_engine_must_be_named(kvmix, save):
    assert kvmix("export", save("0-3:k8v8")).code == 2


@pytest.mark.parametrize("option", [("--text", "builtin"), ("--length", 64), ("--limit", 2), ("--output-dir", "x")])
def test_options_of_a_measurement_need_it(kvmix, save, option):
    ran = kvmix("export", save("0-3:k8v8"), "--to", "vllm", *option)
    assert (ran.code, "needs --measure" in ran.err) == (2, True)


@pytest.mark.slow
def test_the_divergence_here_and_there(kvmix, loaded_once):
    """Of 8-bit floats, of blocks of 4 bits, and of what KVTuner stores as kvmix does."""
    plan = save_plan("eight", uniform(8))
    measure = ("--measure", "--length", 320, "--limit", 1, "--json")
    eight = kvmix("export", plan, "--to", "vllm", *measure).json["measured"]
    assert (eight["text"], eight["tokens"]) == ("builtin", 239)
    assert set(eight["kl"]) == {"value", "low", "high"}
    four = kvmix("export", plan, "--to", "llama.cpp", "--format", "q4_0", *measure).json["measured"]
    assert 0 < eight["plan_kl"]["value"] < eight["kl"]["value"] < four["kl"]["value"] < 1
    assert four["plan_kl"] == eight["plan_kl"], "read from results/, not measured again"
    same = kvmix("export", plan, "--to", "kvtuner", *measure).json["measured"]
    assert same["kl"] == pytest.approx(same["plan_kl"]), "a plan without a sink, and without an encoder"
    shown = kvmix("export", plan, "--to", "vllm", *measure[:-1])
    assert "kvmix: divergence: " in shown.err
    assert len(list(Path("results").iterdir())) == 5


@pytest.mark.slow
def test_the_text_is_the_profiles(kvmix, loaded_once, tmp_path):
    (tmp_path / "own.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    profile = make_profile([1.0] * 8, info=tiny().info)
    score = profile.scores["grad-norm"]
    own = score.model_copy(update={"calibration": score.calibration.model_copy(update={"source": "own.txt"})})
    profile.model_copy(update={"scores": {"grad-norm": own}}).save("profiles/builtin--tiny/profile.yaml")
    plan = save_plan("eight", uniform(8))
    ran = kvmix("export", plan, "--to", "vllm", "--measure", "--length", 64, "--limit", 1, "--json")
    assert ran.json["measured"]["text"] == "own.txt"


def test_a_plan_is_not_replaced_by_an_export(kvmix, save):
    path, other = save("0-3:k8v8"), save("0-3:k8v4", "other")
    before = path.read_text(), other.read_text()
    for out in (path, other):
        ran = kvmix("export", path, "--to", "vllm", "--out", out)
        assert ran.code == 1
        assert f"{out} is a plan or profile of kvmix, which the export would replace" in ran.error
    assert (path.read_text(), other.read_text()) == before


def test_a_dash_is_the_standard_output(kvmix, save):
    assert kvmix("export", save("0-3:k8v8"), "--to", "vllm", "--out", "-", "-q").out == "--kv-cache-dtype fp8\n"
