"""Damaged and hostile input of every kind: a result or a KvmixError, never another exception."""

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from commandline import kvmix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kvmix_cli.errors import KvmixError
from kvmix_cli.evaluation.collect import collect
from kvmix_cli.journal import Journal, read_records
from kvmix_cli.plan import Plan
from kvmix_cli.plan.presets import Preset
from kvmix_cli.profile import Profile
from kvmix_cli.texts import load_texts

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "profiles" / "builtin--tiny"
CASES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "row", "recent", "0:k2v2", "\x1b[31m", "1:30", "NaN", "-1", "2147483648", "é" * 300]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)
CHARACTERS = st.characters(exclude_categories=["Cs"])


def places(data, at=()):
    """Yield the path of every value in plain data."""
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def replaced(data, place, value):
    """Return plain data with one value replaced."""
    if not place:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[place[0]] = replaced(data[place[0]], place[1:], value)
    return copy


@st.composite
def damaged(draw, text, load, dump):
    """A file with up to three values replaced, or its text cut and spliced."""
    if draw(st.integers(0, 4)) == 0:
        start, end = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        return text[:start] + draw(st.text(CHARACTERS, max_size=20)) + text[end:]
    data = load(text)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(data))))
        data = replaced(data, place, draw(VALUES))
    return dump(data)


def yaml_text(data):
    try:
        return yaml.safe_dump(data, sort_keys=False)
    except yaml.YAMLError:
        return repr(data)


def shorter(text):
    """Return a profile's text with its first score alone, so that hundreds of cases are quick."""
    data = yaml.safe_load(text)
    name = next(iter(data["scores"]))
    return yaml_text({**data, "scores": {name: data["scores"][name]}})


def check(act):
    """Run something that may fail in one way only: with a KvmixError that says something."""
    try:
        act()
    except KvmixError as error:
        assert str(error).strip()


@pytest.fixture
def folder():
    """One folder for all cases of a test; pytest's own would be one per test function, which hypothesis refuses."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


FILES = [
    pytest.param((SHIPPED / "plans" / "rank-2.3.yaml").read_text(), Plan.load, id="plan"),
    pytest.param(shorter((SHIPPED / "profile.yaml").read_text()), Profile.load, id="profile"),
    *(
        pytest.param((ROOT / "profiles" / "presets" / f"{name}.yaml").read_text(), Preset.load, id=f"preset-{name}")
        for name in ("mikv", "mixkvq")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "load"), FILES)
def test_plan_profile_and_preset_files(whole, load, folder):
    @CASES
    @given(damaged(whole, yaml.safe_load, yaml_text))
    def run(text):
        check(lambda: load(write(folder / "damaged.yaml", text)))

    run()


LINES = [
    {"text": "A document of some words."},
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]},
]


def json_lines(rows):
    return "".join(json.dumps(row, default=str) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)


def parse_lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_records_of_text(name, folder):
    @CASES
    @given(damaged(json_lines(LINES), parse_lines, json_lines))
    def run(text):
        check(lambda: load_texts(str(write(folder / name, text))))

    run()


@pytest.mark.slow
def test_journals(folder):
    settings_now = {"format": "example/1", "seed": 0}
    form = TypeAdapter(dict[str, float])
    with Journal(folder / "whole.jsonl", settings_now, form, resume=False) as journal:
        journal.append({"loss": 0.5})
        journal.append({"loss": 0.25})
    whole = (folder / "whole.jsonl").read_text()

    @CASES
    @given(damaged(whole, parse_lines, json_lines))
    def run(text):
        check(lambda: read_records(write(folder / "damaged.jsonl", text), settings_now, form))

    run()


@pytest.mark.slow
def test_options(folder, monkeypatch):
    """Commands that load no model, with any values for their options: exit code 0, 1 or 2, and never a traceback."""
    monkeypatch.chdir(folder)
    options = st.sampled_from(
        [
            "--avg-bits",
            "--stored-bits",
            "--memory",
            "--max-loss",
            "--k-bits",
            "--group-size",
            "--page",
            "--window",
            "--pin",
        ]
    )
    words = st.one_of(SCALARS.map(str), st.sampled_from(["2.3", "3", "8GiB", "1%", "2,4", "64", "recent:32"]))
    profile = str(SHIPPED / "profile.yaml")

    @settings(CASES, max_examples=50)
    @given(st.lists(st.tuples(options, words), max_size=3))
    def run(pairs):
        arguments = [word.replace("\0", "") for pair in pairs for word in pair]
        result = kvmix("allocate", "--profile", profile, "--out", str(folder / "plan.yaml"), *arguments)
        assert result.exit_code in (0, 1, 2), result.output

    run()


@pytest.mark.slow
def test_run_folders(folder):
    """Everything that `kvmix report` reads of a run, damaged file by file."""
    config = yaml.safe_dump(
        {
            "format": "kvmix-run/1",
            "kvmix": "0.1.0",
            "task": "perplexity",
            "model": {"id": "builtin:tiny", "layers": 2, "kv_heads": 2, "head_dim": 64},
            "dtype": "float32",
            "device": "cpu",
            "attention": "kvmix",
            "settings": {"length": 640},
            "samples": {"count": 1, "sha256": "ab"},
            "plan": {"short": "0-1:k2v2", "sha256": "cd"},
        },
        sort_keys=False,
    )
    metrics = json.dumps(
        {
            "task": "perplexity",
            "plan": "two",
            "nominal_bits": 2.0,
            "stored_bits": 2.5,
            "quantized_share": 0.5,
            "metrics": {"perplexity": {"value": 10.0, "low": 9.0, "high": 11.0}},
            "tokens": 10,
            "description": "one document",
            "metric_info": {"perplexity": {"name": "perplexity", "higher_is_better": False}},
        }
    )
    samples = json.dumps({"tokens": 10, "loss": 23.0, "attended": {"total": 4.0, "quantized": 2.0}, "seconds": 0.1})
    run_folder = folder / "perplexity__builtin--tiny__two"
    run_folder.mkdir()
    whole = {"config.yaml": config, "metrics.json": metrics, "samples.jsonl": samples + "\n"}
    forms = {
        "config.yaml": damaged(config, yaml.safe_load, yaml_text),
        "metrics.json": damaged(metrics, json.loads, lambda data: json.dumps(data, default=str)),
        "samples.jsonl": damaged(samples + "\n", parse_lines, json_lines),
    }

    @CASES
    @given(st.sampled_from(sorted(forms)).flatmap(lambda name: st.tuples(st.just(name), forms[name])))
    def run(case):
        for name, text in whole.items():
            write(run_folder / name, text)
        write(run_folder / case[0], case[1])
        check(lambda: collect([folder]))

    run()
