"""`kvmix export`: the text alone on stdout, the caution beside it, and nothing written that cannot be expressed."""

import pytest
from made_up import make_info

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
    assert ran.err.startswith("kvmix: caution: 8 bits are fp8")


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


@pytest.mark.parametrize(
    ("to", "said"), [("vllm", "k2v2 in layers 0-3"), ("modelopt", "k2v2 in layers 0-3"), ("vlm", "did you mean 'vllm'")]
)
def test_what_cannot_be_exported_leaves_nothing(kvmix, save, tmp_path, to, said):
    ran = kvmix("export", save("0-3:k2v2"), "--to", to, "--out", "file.txt")
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.error
    assert not (tmp_path / "file.txt").exists()


def test_the_engine_must_be_named(kvmix, save):
    assert kvmix("export", save("0-3:k8v8")).code == 2
