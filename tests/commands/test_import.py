"""`--import FILE.py`: scores, codecs, transforms and probes of a user's own, and files that cannot be used."""

from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from commandline import TINY, kvmix, kvmix_json, refused

from kvmix_cli.models.loading import load_info
from kvmix_cli.plan import CacheSettings, Plan, token_scores

SCORE = """
from kvmix_cli.cache.policies import TOKEN_SCORES, TokenScore

@TOKEN_SCORES.register("every-other")
class EveryOther(TokenScore):
    '''Tokens at even places. And nothing else.'''

    queries = "none"

    def importance(self, tokens):
        return (1 - tokens.places % 2).expand(tokens.keys.shape[:3])
"""
TRANSFORM = """
from kvmix_cli.cache.transforms import TRANSFORMS, Transform

@TRANSFORMS.register("negated")
class Negated(Transform):
    def fit(self, states, query): pass
    def store(self, states): return -states
    restore = query = output = store
"""
PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text()
MERGE = PAGE.split("```python\n# my_merge.py\n")[1].split("```")[0]
CODEC = PAGE.split("```python\n# my_codec.py\n")[1].split("```")[0]
PROBE = """
from kvmix_cli.profiling import PROBES
from kvmix_cli.profiling.probes.error import Error

@PROBES.register("own-error")
class OwnError(Error):
    name = "own-error"
"""
PROMPT = "def f(x):\n" + "    x = x + 1\n" * 60


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path, forgetful):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    Path(name).write_text(text)
    return name


def plan(cache):
    settings = CacheSettings.model_validate({"page": 32, "group_size": 32, **cache}, strict=False)
    Plan.uniform(load_info("builtin:tiny"), 4, 4, settings).save("own.yaml")
    return "own.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_a_score_of_ones_own_runs_and_is_listed():
    path = plan({"tokens": {"score": "every-other", "evict": 0.5, "flush": 64}})
    unknown = refused(kvmix("run", *TINY, "--plan", path, "--prompt", PROMPT, "--max-new-tokens", "2"))
    assert "unknown token score 'every-other'" in unknown
    given = ("--import", write("mine.py", SCORE))
    answer = kvmix_json("run", *TINY, "--plan", path, "--prompt", PROMPT, "--max-new-tokens", "2", *given)
    assert answer["quantized_share"] > 0
    items = {item["name"]: item["summary"] for item in kvmix_json("list", "policies", *given)["items"]}
    assert items["every-other"] == "tokens: Tokens at even places"
    assert token_scores.statistics_of("every-other") == token_scores.NOTHING


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_a_transform_of_ones_own():
    own = {"kind": "own", "name": "negated"}
    path = plan({"transforms": {"k": [own], "v": [own]}})
    assert yaml.safe_load(Path(path).read_text())["cache"]["transforms"]["k"] == [own]
    assert "unknown transform 'negated'" in refused(kvmix("run", *TINY, "--plan", path, "--prompt", PROMPT))
    given = ("--prompt", PROMPT, "--max-new-tokens", "4", "--import", write("turn.py", TRANSFORM))
    negated = kvmix_json("run", *TINY, "--plan", path, *given)
    plain = kvmix_json("run", *TINY, "--plan", plan({}), *given)
    assert negated["text"] == plain["text"]  # codes of -x are those of x, mirrored


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_the_merge_of_the_docs_runs_and_is_listed():
    path = plan({"tokens": {"score": "keydiff", "evict": 0.5, "merge": "nearest", "flush": 64}})
    asked = ("run", *TINY, "--plan", path, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert "unknown rule to merge tokens 'nearest'" in refused(kvmix(*asked))
    given = ("--import", write("mine.py", MERGE))
    assert kvmix_json(*asked, *given)["quantized_share"] > 0
    items = {item["name"]: item["summary"] for item in kvmix_json("list", "policies", *given)["items"]}
    assert items["nearest"].startswith("merge: Half of the most similar dropped token joins")
    assert "50 % evicted and merged by nearest" in kvmix("inspect", path, *given).stdout


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_the_codec_of_the_docs_runs_is_counted_and_listed():
    assert len(CODEC.strip().splitlines()) <= 20
    given = ("--import", write("signs.py", CODEC))
    Path("mine.yaml").write_text(
        "format: kvmix-preset/1\nbits: {k: 1, v: 1}\ncache: {page: 32, codecs: {k: signs, v: signs}}\n"
    )
    asked = ("run", *TINY, "--preset", "mine.yaml", "--prompt", PROMPT, "--max-new-tokens", "2")
    assert "unknown codec 'signs'" in refused(kvmix(*asked))
    answer = kvmix_json(*asked, *given)
    assert answer["quantized_share"] > 0
    stored = kvmix_json("inspect", "mine.yaml", "--model", "builtin:tiny", *given)["bits"]["stored"]
    assert stored == 1 + 16 / 64  # heads of 64
    items = {item["name"]: item["summary"] for item in kvmix_json("list", "codecs", *given)["items"]}
    assert items["signs"].startswith("Signs, times the mean magnitude of each token")


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_a_probe_of_ones_own():
    given = ("--score", "own-error", "--samples", "1", "--seq-len", "288")
    answer = kvmix_json("profile", "builtin:tiny", *given, "--import", write("probe.py", PROBE))
    assert answer["score"] == "own-error"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "mine.py, line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: SystemExit: 3"),
        (SCORE.replace("every-other", "keydiff"), "mine.py, line 4: ValueError: token score 'keydiff' is registered"),
    ],
)
def test_a_file_that_raises_is_one_line(text, message):
    assert message in refused(kvmix("list", "policies", "--import", write("mine.py", text)))


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("text", "result", "settings"),
    [
        (SCORE, "(1 - tokens", {"tokens": {"score": "every-other", "evict": 0.5, "flush": 64}}),
        (TRANSFORM, "-states", {"transforms": {"k": [{"kind": "own", "name": "negated"}]}}),
        (CODEC, '{"signs": pack', {"codecs": {"k": "signs", "v": "signs"}}),
    ],
)
def test_a_class_that_raises_later_is_one_line_as_well(text, result, settings):
    wrong = text.replace(f"return {result}", f"raise ValueError('no luck') or {result}", 1)
    line = 1 + next(number for number, each in enumerate(wrong.splitlines()) if "no luck" in each)
    preset = {"format": "kvmix-preset/1", "bits": {"k": 1, "v": 1}, "cache": {"page": 32, **settings}}
    given = ("--import", write("mine.py", wrong), "--preset", write("mine.yaml", yaml.safe_dump(preset)))
    error = refused(kvmix("run", *TINY, *given, "--prompt", PROMPT, "--max-new-tokens", "2"))
    assert f"--import mine.py, line {line}: ValueError: no luck" in error


def test_a_file_that_is_not_there():
    assert "--import none.py: cannot be read: No such file" in refused(kvmix("list", "--import", "none.py"))
    assert "its name must end in .py" in refused(kvmix("list", "--import", write("text.txt", "x = 1\n")))


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_numbers_depend_on_the_file(counting):
    path = plan({"tokens": {"score": "every-other", "evict": 0.5, "flush": 64}})
    kvmix_json("eval", *TINY, "--plan", path, "--import", write("mine.py", SCORE))
    configs = [yaml.safe_load(path.read_text()) for path in Path("results").glob("*/config.yaml")]
    assert [config["imported"] for config in configs] == [{"mine.py": sha256(SCORE.encode()).hexdigest()}] * 2
