"""`--config run.yaml`: the same command as with its settings as options, which win; faults, all at once."""

from pathlib import Path

import pytest
from commandline import kvmix, kvmix_json, refused

from kvmix_cli.plan import Plan


@pytest.fixture
def write(tmp_path):
    def to(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to


def without_names(answer):
    return {key: value for key, value in answer.items() if key != "options"}


def test_a_file_stands_for_the_options_in_it(write):
    file = write(
        "model: builtin:tiny\nuniform: [2, 4]\ncontext: 1K\nmemory: 64MiB\nweights_dtype: int4\npreset: mikv\n"
    )
    options = ["--uniform", 2, "--uniform", 4, "--context", "1K", "--memory", "64MiB", "--weights-dtype", "int4"]
    whole = kvmix_json("fit", "builtin:tiny", *options, "--preset", "mikv")
    assert without_names(kvmix_json("fit", "--config", file)) == without_names(whole)


def test_the_command_line_wins(write):
    file = write("model: no/such-model\nuniform: [8]\ncontext: 1K\nbatch: 3\n")
    answer = kvmix_json("fit", "builtin:tiny", f"--config={file}", "--uniform", 2, "--context", "2K")
    assert (answer["context"], answer["batch"], answer["rows"][1]["plan"]) == (2048, 3, "uniform-2")
    assert "uniform-8" not in [row["plan"] for row in answer["rows"]]


def test_files_that_are_written_begin_with_the_whole_command(write, profiled, tmp_path):
    file = write("avg-bits: 2.3\nk-bits: [2, 4]\nname: mine\nmethod: rank\n")
    assert kvmix("allocate", "--config", file, "--sink", 8).exit_code == 0
    path = tmp_path / "profiles" / "org--model" / "plans" / "mine.yaml"
    head = path.read_text().splitlines()[0]
    assert head == "# kvmix allocate --avg-bits 2.3 --k-bits 2,4 --name mine --method rank --sink 8"
    before = Plan.load(path)
    assert (before.cache.sink, {layer.k.bits for layer in before.layers.values()} <= {2, 4}) == (8, True)
    assert kvmix(*head.removeprefix("# kvmix ").split()).exit_code == 0
    assert Plan.load(path).sha256 == before.sha256


def test_flags_and_modes(write):
    file = write("json: true\nquiet: true\n")
    result = kvmix("list", "probes", "--config", file)
    assert (result.exit_code, result.stdout.startswith("{"), result.stderr) == (0, True, "")
    assert kvmix("list", "--config", write("kind: solvers\njson: false\n")).stdout.startswith("solvers")
    off = kvmix("profile", "--config", write("checkpointing: false\nmodel: builtin:tiny\nsamples: 0\n"))
    assert (off.exit_code, "--samples" in off.stderr) == (2, True)


def test_of_two_files_the_last_one_counts_and_that_is_said(write):
    first, last = Path("first.yaml"), write("kind: solvers\n")
    first.write_text("kind: probes\n")
    result = kvmix("list", "--config", str(first), f"--config={last}")
    assert result.stdout.startswith("solvers")
    assert "--config is given 2 times: the last one counts" in result.stderr
    assert not kvmix("list", "-q", "--config", str(first), "--config", last).stderr


FAULTS = {
    "limt: 3": "line 1: no option 'limt' of kvmix eval (did you mean 'limit'?)",
    "limit: {a: 1}": "limit: must be text, a number or a list of them, got {'a': 1}",
    "limit: [yes]": "put words like yes and on in quotes",
    "resume: 1": "resume: must be true or false, got 1",
    "group-size: 32\ngroup_size: 64": "line 2: 'group_size' and 'group-size' are one option",
    "config: other.yaml": "no option 'config'",
    "- 3": "expected a file of settings",
    "limit: !!python/object:os.system x": "tags are not allowed",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults(write, text):
    file = write(text + "\n")
    said = refused(kvmix("eval", "builtin:tiny", "--config", file))
    assert said.startswith(f"{file}: ")
    assert FAULTS[text] in said


def test_all_faults_at_once_and_as_json(write):
    file = write("limt: 3\ntask: perplexity\nresume: maybe\n")
    assert refused(kvmix("eval", "--config", file)).count("; line ") == 1
    error = kvmix_json("eval", "--config", file, code=1)
    assert (error["command"], error["error"]["type"]) == ("eval", "DocumentError")


def test_no_file(tmp_path):
    assert "cannot be read" in refused(kvmix("eval", "--config", tmp_path / "nowhere.yaml"))
    assert kvmix("eval", "--config").exit_code == 2


def test_values_are_refused_as_options_are(write):
    for text, code in (("length: many\n", 2), ("length: -3\n", 1)):
        assert kvmix("eval", "builtin:tiny", "--uniform", 2, "--config", write(text)).exit_code == code
