"""`torchrun -m kvmix_cli ...`: copies of a model that share samples, and parts of one; one leader that prints.

Ranks are forked with what torchrun sets in their environment; one test starts torchrun itself.
"""

import json
import os
from pathlib import Path

import forking
import pytest
from ranking import torchrun

from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROFILE = ("profile", "builtin:tiny", "--samples", 3, "--seq-len", 288, "--score", "grad-norm,fisher-metric")
EVAL = ("eval", "builtin:tiny", "--uniform", 2, "--length", 332, "--prefix", 300, "--limit", 3, "--json")
TENSOR_PARALLEL = "--tensor-parallel"
LESS_TEXT = f"from kvmix_cli.studies import coded; coded.DOCUMENTS = coded.REACH = 1; {forking.COMMAND}"
"""Transform codes are read on one document of one sample: they are the leader's alone."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A profile, a plan of transform codes, and rows of an evaluation, of one process."""
    folder = tmp_path_factory.mktemp("alone")
    forking.run(*PROFILE, "--out", "profile.yaml", code=LESS_TEXT, cwd=folder, check=True)
    plan = folder / "coded.yaml"
    forking.run("allocate", "--profile", "profile.yaml", "--avg-bits", 2, "--out", plan, cwd=folder, check=True)
    found = forking.run(*EVAL, "--plan", plan, cwd=folder, check=True)
    return Profile.load(folder / "profile.yaml"), plan, json.loads(found.stdout)["rows"]


def means(profile, score):
    """Means of a score, of keys and values layer by layer."""
    return [each.mean for layer in profile.score(score).layers.values() for each in (layer.k, layer.v)]


def assert_same_rows(found, expected, tolerance):
    for row, other in zip(found, expected, strict=True):
        assert (row["plan"], row["quantized_share"]) == (other["plan"], other["quantized_share"])
        for name in ("perplexity", "kl"):
            if name in other["metrics"]:
                assert row["metrics"][name]["value"] == pytest.approx(other["metrics"][name]["value"], rel=tolerance)


def one_line(ranks):
    """The one line that all ranks together have printed, all of them ending with 1."""
    assert [code for code, *_ in ranks] == [1] * len(ranks), ranks
    lines = [line for _, out, err in ranks for line in (out + err).splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert "Traceback" not in "".join(err for _, _, err in ranks)
    return lines[0]


def test_copies_share_the_samples_of_a_profile_and_of_an_evaluation(alone, tmp_path):
    profile, plan, rows = alone
    (code, said, _), (other_code, *silence) = torchrun(*PROFILE, "--out", "profile.yaml", code=LESS_TEXT, cwd=tmp_path)
    assert (code, other_code, silence) == (0, 0, ["", ""])
    assert "grad-norm of builtin:tiny" in said
    found = Profile.load(tmp_path / "profile.yaml")
    for score in ("grad-norm", "fisher-metric"):
        assert means(found, score) == pytest.approx(means(profile, score), rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.safetensors", "profile.yaml"]
    gate = ("--fail-if", "perplexity>+0.00001%")
    (code, said, _), (other_code, *silence) = torchrun(*EVAL, "--plan", plan, *gate, cwd=tmp_path)
    assert (code, other_code, silence) == (3, 0, ["", ""]), "the leader's exit code says how it went"
    assert_same_rows(json.loads(said)["rows"], rows, 1e-5)
    assert [len(path.read_text().splitlines()) for path in tmp_path.glob("results/*/samples.jsonl")] == [3, 3, 3]


def test_parts_of_a_model_give_the_numbers_of_the_whole(alone, tmp_path):
    """Sums of predictions are those of one process; those of gradients are taken in another order."""
    _, plan, rows = alone
    args = ("profile", "builtin:tiny", "--samples", 2, "--seq-len", 128)
    forking.run(*args, "--out", "whole.yaml", cwd=tmp_path, check=True)
    (code, *_), (other_code, *silence) = torchrun(*args, TENSOR_PARALLEL, "--out", "parts.yaml", cwd=tmp_path)
    assert (code, other_code, silence) == (0, 0, ["", ""])
    profile, found = (Profile.load(tmp_path / f"{name}.yaml") for name in ("whole", "parts"))
    assert means(found, "grad-norm") == pytest.approx(means(profile, "grad-norm"), rel=1e-5)
    for index, layer in profile.outliers.items():
        assert found.outliers[index].key_channel == pytest.approx(layer.key_channel, rel=1e-5)
    (code, said, _), _ = torchrun(*EVAL, "--plan", plan, TENSOR_PARALLEL, cwd=tmp_path)
    assert code == 0
    assert "t" in Plan.load(plan).short, "transform codes"
    assert_same_rows(json.loads(said)["rows"], rows, 1e-6)


@pytest.mark.parametrize(
    ("args", "world", "said"),
    [
        (("profile", "builtin:tiny", TENSOR_PARALLEL), 3, "3 ranks cannot share the 2 KV heads of builtin:tiny"),
        (("eval", "builtin:tiny", "--uniform", 2, "--length", 100000), 2, "more than the model's limit of 4096"),
        (("eval", "builtin:tiny", "--plan", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("run", "builtin:tiny", "--prompt", "x"), 2, "start `kvmix run` without it"),
        (("eval", "builtin:tiny", "--uniform", 2, "--join"), 2, "--join is for processes that were started apart"),
        (("profile", "builtin:tiny", "--device", "map"), 2, "--device map gives all GPUs to one process"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_all_ranks_end_with_one_line(tmp_path, args, world, said):
    assert said in one_line(torchrun(*args, world=world, cwd=tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_parts_need_ranks(kvmix):
    assert "start it with `torchrun" in kvmix("profile", "builtin:tiny", TENSOR_PARALLEL).error


def test_torchrun_itself(tmp_path):
    """Ranks are processes of Python anew, as torchrun starts them; torchrun alone is forked."""
    kvmix = ("-m", "kvmix_cli", "profile", "builtin:tiny", "--samples", 2, "--seq-len", 64, "--out", "profile.yaml")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    code = "from torch.distributed.run import main; main()"
    done = forking.run("--standalone", "--nproc-per-node", 2, *kvmix, code=code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grad-norm of builtin:tiny") == 1
    assert Profile.load(tmp_path / "profile.yaml").score("grad-norm").calibration.samples == 2
