"""`kvmix profile`: on the built-in model with two short samples, and what happens when it cannot go on."""

import errno
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import falling

from kvmix_cli import profiling
from kvmix_cli.models import loading as models
from kvmix_cli.profile import LongerSamples, Profile

FOLDER = "profiles/builtin--tiny"
SHORT = ("--samples", 3, "--seq-len", 40)


@pytest.fixture
def faked(monkeypatch):
    """No model and no probing: only what the command itself does. Gives the arguments that were passed on."""
    passed = {}

    def load_model(model_id, **options):
        passed.update(options, model=model_id)
        return SimpleNamespace(info=passed.get("info"))

    def run_profile(loaded, scores, *, journal, on_step, **options):
        passed.update(options, scores=scores)
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text('{"model": "org/model"}\n')
        for done in range(options["samples"] + 1):
            on_step(done, options["samples"])
        return falling(4)

    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(profiling, "run_profile", run_profile)
    return passed


@pytest.mark.slow
def test_from_nothing_on_the_built_in_model(kvmix, tmp_path):
    ran = kvmix("profile", "builtin:tiny", *SHORT, "--plot", "scores.png", "--json")
    result = ran.json
    assert ran.code == 0
    assert (result["command"], result["model"], result["score"]) == ("profile", "builtin:tiny", "grad-norm")
    assert result["profile"] == f"{FOLDER}/profile.yaml"
    assert result["samples"] == 3
    assert result["seconds"] > 0
    assert [layer["index"] for layer in result["layers"]] == list(range(8))
    assert all(layer["k"] > 0 and layer["v"] > 0 for layer in result["layers"])
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    saved = tmp_path / FOLDER / "profile.yaml"
    assert saved.read_text().startswith(
        "# kvmix profile builtin:tiny --samples 3 --seq-len 40 --plot scores.png --json\n"
    )
    assert sorted(path.name for path in saved.parent.iterdir()) == ["profile.yaml"]
    assert kvmix("allocate", "--avg-bits", 2.3).code == 0


@pytest.mark.usefixtures("loaded_shallow")
@pytest.mark.slow
def test_interrupted_and_resumed_is_the_same_profile(kvmix, tmp_path, monkeypatch):
    real = profiling.run_profile

    def until_the_second(loaded, scores, *, on_step, **options):
        def step(done, total):
            on_step(done, total)
            if done == 2:
                raise KeyboardInterrupt

        return real(loaded, scores, on_step=step, **options)

    monkeypatch.setattr(profiling, "run_profile", until_the_second)
    ran = kvmix("profile", "builtin:tiny", *SHORT)
    assert ran.code == 130
    line = "kvmix profile builtin:tiny --samples 3 --seq-len 40 --resume"
    assert ran.err == f"kvmix: interrupted; continue with `{line}`\n"
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["profile.partial.jsonl"]

    blocked = kvmix("allocate", "--avg-bits", 2.3)
    assert blocked.code == 1
    assert "profiling was interrupted" in blocked.error
    hint = blocked.error.split("`")[1]
    assert hint.startswith("kvmix profile builtin:tiny ")

    monkeypatch.setattr(profiling, "run_profile", real)
    assert kvmix(*shlex.split(hint)[1:]).code == 0
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["profile.yaml"]
    assert kvmix("profile", "builtin:tiny", *SHORT, "--out", "whole.yaml").code == 0
    resumed, whole = (Profile.load(tmp_path / path) for path in (f"{FOLDER}/profile.yaml", "whole.yaml"))
    assert resumed.scores["grad-norm"].layers == whole.scores["grad-norm"].layers
    assert resumed.score("grad-norm").calibration == whole.score("grad-norm").calibration


CURVES = ("--samples", 1, "--seq-len", 300, "--bits", "2,4", "--group-size", 64)


@pytest.mark.usefixtures("loaded_shallow")
@pytest.mark.slow
def test_scores_are_added_to_the_profile_that_is_there(kvmix, tmp_path):
    saved = tmp_path / FOLDER / "profile.yaml"
    assert kvmix("profile", "builtin:tiny", *SHORT).code == 0
    first = Profile.load(saved)
    ran = kvmix("profile", "builtin:tiny", *CURVES, "--score", "fisher,error", "--granularity", "head")
    assert (ran.code, ran.err) == (0, f"kvmix: {FOLDER}/profile.yaml had grad-norm and keeps grad-norm\n")
    assert "fisher of builtin:tiny by bits, nats, mean over 1 sample of 300 tokens" in ran.out
    assert "K 2g64" in ran.out
    assert "grad-norm" not in ran.out
    both = Profile.load(saved)
    assert list(both.scores) == ["grad-norm", "fisher", "error"]
    assert both.scores["grad-norm"] == first.scores["grad-norm"]
    assert both.scores["fisher"].calibration.seq_len == 300
    commands = [line for line in saved.read_text().splitlines() if line.startswith("# ")]
    assert [command.split(" --")[1:2] for command in commands] == [["samples 3"], ["samples 1"]]

    ran = kvmix("profile", "builtin:tiny", *CURVES, "--score", "error")
    assert ran.code == 1
    assert "the profile has error by KV head, which would be replaced: add --replace" in ran.error
    result = kvmix("profile", "builtin:tiny", *CURVES, "--score", "error", "--replace", "--json").json
    assert list(result["scores"]) == ["error"]
    assert set(result["layers"][0]["k_curve"]) == {"2g64", "4g64"}
    assert "k_heads" not in result["layers"][0]
    replaced = Profile.load(saved)
    assert list(replaced.scores) == ["grad-norm", "fisher", "error"]
    assert replaced.scores["fisher"] == both.scores["fisher"]
    assert both.scores["error"].layers[0].k.heads is not None
    assert replaced.scores["error"].layers[0].k.heads is None
    assert kvmix("inspect", saved).code == 0
    assert kvmix("inspect", saved, "--plot", "scores.png").code == 0


@pytest.mark.usefixtures("loaded_shallow")
@pytest.mark.slow
def test_the_loss_metric_goes_beside_the_profile_and_stays_when_scores_are_added(kvmix, tmp_path):
    metric = ("profile", "builtin:tiny", "--score", "fisher-metric", "--samples", 1, "--seq-len", 300)
    ran = kvmix(*metric)
    assert (ran.code, ran.err) == (0, "")
    folder = tmp_path / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["profile.safetensors", "profile.yaml"]
    tensors = (folder / "profile.safetensors").read_bytes()
    assert kvmix("profile", "builtin:tiny", *SHORT).code == 0
    assert Profile.load(folder / "profile.yaml").scores.keys() == {"fisher-metric", "grad-norm"}
    assert (folder / "profile.safetensors").read_bytes() == tensors

    shown = kvmix("inspect", folder / "profile.yaml")
    assert (shown.code, shown.err) == (0, "")
    assert "directions of builtin:tiny that carry 99% of the loss, by fisher-metric" in shown.out
    assert "over 1 document, 128 packed tokens and 39 predictions" in shown.out
    found = kvmix("inspect", folder / "profile.yaml", "--json").json["scores"]["fisher-metric"]
    contexts = dict.fromkeys(each["context"] for each in found["moments"]["coded"])
    measured = [(context, exact) for context in contexts for exact in (1, 2, 4)]
    assert [(each["context"], each["exact"]) for each in found["moments"]["coded"]] == measured
    assert all(each["measured"] > 0 for each in found["moments"]["coded"])
    assert "with 1, 2, 4 exact tokens a page" in shown.out
    assert (found["moments"]["documents"], found["moments"]["predictions"], found["moments"]["tokens"]) == (1, 39, 128)
    for layer, score in zip(found["moments"]["spectrum"], found["layers"], strict=True):
        assert layer["rope"] == {"layout": "half", "start": 0, "channels": 64}
        for kind in "kv":
            # in some layers of this model nothing so old is attended to, or less than float32 holds
            assert (score[kind] > 1e-30) <= layer[kind]["carrying"] <= layer[kind]["directions"] == 128
            # the metric's smallest eigenvalues are raised to 1e-4 of its largest, which adds to the loss
            assert score[kind] * (1 - 1e-3) <= layer[kind]["loss"] + 1e-30

    (folder / "profile.safetensors").write_bytes(tensors[:5000])
    assert (
        "it is not the file that the profile was written with, or was cut short"
        in kvmix("inspect", FOLDER + "/profile.yaml").error
    )
    assert kvmix(*metric, "--replace").code == 0
    assert (folder / "profile.safetensors").read_bytes() == tensors


def test_twenty_documents_by_default_for_the_loss_metric_alone(kvmix, faked):
    for score, samples in (("fisher-metric", 20), ("fisher-metric,fisher", 30), ("grad-norm", 30)):
        assert kvmix("profile", "org/model", "--score", score, "--out", f"{score}.yaml").code == 0
        assert faked["samples"] == samples


@pytest.mark.parametrize(
    ("samples", "seq_len", "replaced"), [(2, 64, False), (3, 32, False), (3, 64, True), (4, 99, True)]
)
def test_a_score_is_not_replaced_by_one_over_less_text(kvmix, faked, profiled, tmp_path, samples, seq_len, replaced):
    """The score that is there has 3 samples of 64 tokens."""
    before = profiled.read_text()
    faked["info"] = Profile.load(profiled).model
    args = ("profile", "org/model", "--samples", samples, "--seq-len", seq_len)
    ran = kvmix(*args)
    assert (ran.code, profiled.read_text() == before) == ((0, False) if replaced else (1, True))
    if not replaced:
        wanted = f"which {samples} of {seq_len} of builtin (seed 0) would replace"
        assert f"has grad-norm over 3 samples of 64 tokens of builtin (seed 0), {wanted}" in ran.error
        assert kvmix(*args, "--replace").code == 0
        assert profiled.read_text() != before


@pytest.mark.parametrize(("longer", "replaced"), [(None, False), ("2x256", False), ("3x128", False), ("3x1K", True)])
def test_a_score_is_not_replaced_by_one_without_as_many_longer_samples(kvmix, faked, profiled, longer, replaced):
    had = Profile.load(profiled)
    score = had.score("grad-norm")
    text = score.calibration.model_copy(update={"longer": LongerSamples(samples=3, seq_len=256)})
    score = score.model_copy(update={"calibration": text})
    had.model_copy(update={"scores": {"fisher-metric": score}}).save(profiled)
    faked["info"] = had.model
    options = [] if longer is None else ["--longer", longer]
    ran = kvmix("profile", "org/model", "--score", "fisher-metric", "--samples", 3, "--seq-len", 64, *options)
    assert ran.code == (0 if replaced else 1)
    if replaced:
        assert faked["longer"] == LongerSamples(samples=3, seq_len=1024)
    else:
        assert "has fisher-metric over 3 samples of 64 tokens and 3 of 256 of builtin" in ran.error


def test_a_score_is_not_replaced_by_one_over_other_text(kvmix, faked, profiled):
    before = profiled.read_text()
    faked["info"] = Profile.load(profiled).model
    ran = kvmix("profile", "org/model", "--samples", 3, "--seq-len", 64, "--seed", 1)
    assert (ran.code, profiled.read_text()) == (1, before)
    assert "of builtin (seed 0), which 3 of 64 of builtin (seed 1) would replace" in ran.error


@pytest.mark.slow
def test_a_score_is_replaced_by_one_of_the_same_settings_only(kvmix, tmp_path):
    """Whatever changes the numbers counts: text behind a name, choices, encoder, dtype. More of the same may come."""
    Path("text.txt").write_text("one two three four five six seven " * 400)
    args = ("profile", "builtin:tiny", *CURVES, "--score", "error", "--calibration", "text.txt")
    saved = tmp_path / FOLDER / "profile.yaml"
    assert kvmix(*args).code == 0
    before = saved.read_text()
    for more, lost in [
        (("--bits", "2"), "error at 4g64"),
        (("--encode", "refit"), "error with encode minmax"),
        (("--dtype", "bf16"), "error of another dtype, revision or text"),
    ]:
        ran = kvmix(*args, *more)
        assert (ran.code, saved.read_text()) == (1, before)
        assert f"the profile has {lost}, which would be replaced: add --replace" in ran.error
    assert kvmix(*args, "--bits", "2,3,4").code == 0
    Path("text.txt").write_text("seven six five four three two one " * 400)
    ran = kvmix(*args, "--bits", "2,3,4")
    assert ran.code == 1
    assert "the profile has error over other text of text.txt (" in ran.error
    assert kvmix(*args, "--replace").code == 0


@pytest.mark.usefixtures("loaded_shallow")
@pytest.mark.slow
def test_a_score_of_an_earlier_version_is_compared_by_what_its_file_says(kvmix, tmp_path):
    """Files without `identity` are read, keep their checksum, and their choices are not lost either."""
    args = ("profile", "builtin:tiny", *CURVES, "--score", "error")
    saved = tmp_path / FOLDER / "profile.yaml"
    assert kvmix(*args).code == 0
    text = saved.read_text()
    older = "".join(line for line in text.splitlines(True) if "identity:" not in line)
    assert len(older) < len(text)
    saved.write_text(older)
    assert Profile.load(saved).to_yaml() == older.split("\n", 1)[1]
    assert "error at 4g64" in kvmix(*args, "--bits", "2").error
    assert kvmix(*args).code == 0


@pytest.mark.usefixtures("loaded_shallow")
@pytest.mark.slow
def test_fields_of_records_that_are_left_out_are_said_once_and_in_json(kvmix):
    record = {"question": "one two three four five " * 30, "answer": "six", "choices": ["six", "seven"]}
    Path("rows.jsonl").write_text((json.dumps(record) + "\n") * 3)
    args = ("profile", "builtin:tiny", *SHORT, "--calibration", "rows.jsonl", "--replace")
    ran = kvmix(*args)
    said = "rows.jsonl: fields read from its records: question, answer; left out: choices"
    assert ran.err.splitlines().count(f"kvmix: {said}") == 1
    assert kvmix(*args, "-q").err == ""
    assert kvmix(*args, "--json").json["texts"] == {
        "rows.jsonl": {"read": ["question", "answer"], "left_out": ["choices"]}
    }


@pytest.mark.parametrize("damage", ["", "format: kvmix-profile/1\n"])
def test_a_damaged_profile_is_not_written_over(kvmix, tmp_path, damage):
    (tmp_path / "profile.yaml").write_text(damage)
    ran = kvmix("profile", "builtin:tiny", *SHORT, "--out", "profile.yaml")
    assert ran.code == 1
    assert "no score can be added to it: remove it, or name another file with --out" in ran.error
    assert (tmp_path / "profile.yaml").read_text() == damage


def test_the_profile_of_another_model_is_not_written_over(kvmix, profiled):
    before = profiled.read_text()
    ran = kvmix("profile", "builtin:tiny", *SHORT, "--out", profiled)
    assert ran.code == 1
    assert "is the profile of another model (org/model, or another revision" in ran.error
    assert "--out" in ran.error
    assert profiled.read_text() == before


def test_options_reach_the_model_and_the_probe(kvmix, faked, tmp_path):
    (tmp_path / "text.txt").write_text("some calibration text")
    ran = kvmix(
        *("profile", "org/model", "--samples", 2, "--seq-len", 77, "--seed", 5, "--calibration", "text.txt"),
        *("--revision", "main", "--dtype", "float32", "--device", "cpu", "--trust-remote-code", "--no-checkpointing"),
    )
    assert ran.code == 0
    assert faked["model"] == "org/model"
    assert faked["texts"] == ["some calibration text"]
    expected = {"samples": 2, "seq_len": 77, "seed": 5, "source": "text.txt", "revision": "main", "dtype": "float32"}
    expected |= {"device": "cpu", "trust_remote_code": True, "resume": False, "scores": ("grad-norm",)}
    assert {name: faked[name] for name in expected} == expected
    assert faked["options"] == profiling.ProbeOptions(checkpointing=False)
    assert kvmix("profile", "org/model", "--score", "fisher-metric", "--frame", 256, "--out", "other.yaml").code == 0
    assert faked["options"] == profiling.ProbeOptions(frame=256)


@pytest.mark.slow
def test_one_sample_has_no_spread(kvmix):
    """Neither 0 in the table, nor bars of no length in the picture."""
    ran = kvmix("profile", "builtin:tiny", "--samples", 1, "--seq-len", 40, "--plot", "scores.svg")
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if re.match(r"\s*\d+ ", line)]
    assert len(rows) == 8
    assert all(row[2] == "-" for row in rows)
    said = Path("scores.svg").read_text()
    assert "LineCollection" not in said


@pytest.mark.usefixtures("faked")
def test_shows_every_layer_and_where_it_went(kvmix, tmp_path):
    ran = kvmix("profile", "org/model")
    rows = [line.split() for line in ran.out.splitlines()]
    assert next(row for row in rows if row[:1] == ["0"])[:4] == ["0", "4", "0.4", "█" * 12]
    assert "profile: profiles/org--model/profile.yaml" in ran.out
    assert ran.err == "kvmix: the text gave 3 samples, not 30\n"
    assert [path.name for path in (tmp_path / "profiles" / "org--model").iterdir()] == ["profile.yaml"]


@pytest.mark.parametrize(
    "option", [("--out", "file/profile.yaml"), ("--plot", "file/plot.png"), ("--plot", "plot.txt")]
)
def test_places_that_cannot_be_written_are_found_before_any_work(kvmix, faked, tmp_path, option):
    (tmp_path / "file").write_text("x")
    ran = kvmix("profile", "org/model", *option)
    assert ran.code == 1
    assert ran.error.startswith(("kvmix: error: cannot write file/", "kvmix: error: cannot draw plot.txt"))
    assert not faked
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_found_before_any_work(kvmix, faked, monkeypatch):
    def mkstemp(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", mkstemp)
    ran = kvmix("profile", "org/model")
    assert ran.code == 1
    assert "cannot write profiles/org--model/profile.yaml: Read-only file system" in ran.error
    assert not faked


@pytest.mark.usefixtures("faked")
def test_a_disk_that_fills_up_keeps_the_journal_to_resume_from(kvmix, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    ran = kvmix("profile", "org/model")
    assert ran.code == 1
    assert "No space left on device" in ran.error
    assert ran.out == ""
    assert [path.name for path in (tmp_path / "profiles" / "org--model").iterdir()] == ["profile.partial.jsonl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["/gone"], "no folder /gone"),
        (["empty"], "empty has no config.json"),
        (["builtin:tiyn"], "no built-in model 'tiyn' (did you mean 'tiny'?)"),
        (["org/unknown"], "cannot load org/unknown"),
        (["builtin:tiny", "--score", "grad-nrom"], "unknown score 'grad-nrom' (did you mean 'grad-norm'?)"),
        (["builtin:tiny", "--score", "grad-norm,tailor"], "unknown score 'tailor' (did you mean 'taylor'?)"),
        (["builtin:tiny", "--bits", "2"], "score grad-norm does not look at widths; leave out --bits"),
        (["builtin:tiny", "--score", "taylor", "--bits", "2,7"], "7 bits is no width of a cache"),
        (["builtin:tiny", "--score", "taylor", "--group-size", "2"], "must be a number of at least 8 or 'row', got 2"),
        (["builtin:tiny", "--score", "taylor", "--seq-len", "200"], "a --seq-len of 262 or more"),
        (["builtin:tiny", "--score", "loss", "--granularity", "head"], "score loss has no scores per head"),
        (["builtin:tiny", "--score", "error", "--no-checkpointing"], "score error has no backward pass"),
        (["builtin:tiny", "--longer", "3x4096"], "score grad-norm has no use for longer samples"),
        (["builtin:tiny", "--granularity", "heads"], "no granularity 'heads'; there is layer, head"),
        (["builtin:tiny", "--calibration", "gone.txt"], "gone.txt"),
        (["builtin:tiny", "--calibration", "blank.txt"], "blank.txt"),
        (["builtin:tiny", "--seq-len", "100000"], "4096"),
        (["builtin:tiny", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["builtin:tiny", "--device", "warp"], "no device 'warp'"),
    ],
)
def test_errors_leave_nothing_behind(kvmix, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    ran = kvmix("profile", *args)
    assert ran.code == 1
    assert message in ran.error
    assert ran.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.txt", "empty"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["a", "b"],
        ["m", "--samples", "0"],
        ["m", "--seq-len", "1"],
        ["m", "--samples", "x"],
        ["m", "--bits", "x"],
        ["m", "--longer", "4096"],
    ],
)
def test_wrong_usage(kvmix, args):
    ran = kvmix("profile", *args)
    assert ran.code == 2
    assert "Usage: kvmix profile" in ran.err
