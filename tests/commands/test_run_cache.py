"""`kvmix run` with the packed cache of a prompt in a file, and with prompts fed in chunks."""

from pathlib import Path

import pytest
from commandline import TINY, kvmix, kvmix_json, refused
from full_disk import fill_disk

PROMPT = "import os\n\ndef walk(folder):\n" * 50
UNIFORM = ("run", *TINY, "--uniform", 2, "--max-new-tokens", 8)

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def first():
    """What the first run said that saved a cache, and the file's bytes; empty before it."""
    return []


@pytest.fixture
def saved(first):
    """What a run said that saved the cache of `PROMPT` in `cache`, which is here."""
    if first:
        Path("cache").write_bytes(first[1])
    else:
        first += kvmix_json(*UNIFORM, "--prompt", PROMPT, "--save-cache", "cache"), Path("cache").read_bytes()
    return first[0]


@pytest.mark.slow
def test_a_loaded_cache_gives_the_same_answer(saved):
    loaded = kvmix_json(*UNIFORM, "--prompt", PROMPT, "--load-cache", "cache")
    assert (loaded["text"], loaded["prompt_tokens"]) == (saved["text"], saved["prompt_tokens"])
    tokens, size = saved["prompt_tokens"] - 1, Path("cache").stat().st_size
    facts = saved["saved_cache"]
    assert (facts["file"], facts["tokens"], facts["bytes"]) == ("cache", tokens, size)
    assert facts["bf16_bytes"] == 2 * 2 * 8 * 2 * 64 * tokens
    assert facts["compression"] == facts["bf16_bytes"] / size
    assert saved["loaded_cache"] is loaded["saved_cache"] is None
    facts = loaded["loaded_cache"]
    assert (facts["tokens"], facts["reused_tokens"], facts["bytes"]) == (tokens, tokens, size)
    assert loaded["quantized_share"] > saved["quantized_share"] > 0


@pytest.mark.slow
def test_a_longer_prompt_feeds_only_its_rest(saved):
    prompt = PROMPT + "\nprint(walk('.'))"
    loaded = kvmix_json(*UNIFORM, "--prompt", prompt, "--load-cache", "cache", "--save-cache", "longer")
    assert loaded["loaded_cache"]["reused_tokens"] >= saved["prompt_tokens"] - 2
    assert loaded["saved_cache"]["tokens"] == loaded["prompt_tokens"] - 1
    again = kvmix_json(*UNIFORM, "--prompt", prompt, "--load-cache", "longer")
    assert again["text"] == loaded["text"]


@pytest.mark.slow
def test_both_are_told_to_people(saved):
    shown = kvmix(*UNIFORM, "--prompt", PROMPT[:1000], "--load-cache", "cache", "--save-cache", "part").stdout
    facts = kvmix_json(*UNIFORM, "--prompt", PROMPT[:1000], "--load-cache", "cache")["loaded_cache"]
    assert 0 < facts["reused_tokens"] < facts["tokens"]
    words = " ".join(shown.split())
    assert f"{facts['reused_tokens']} tokens of the prompt were in cache, which holds {facts['tokens']} (" in words
    assert "tokens of the prompt are saved in part: " in words
    assert "x smaller than in bf16" in words


@pytest.mark.slow
def test_nothing_is_replaced_without_consent(saved):
    before = Path("cache").read_bytes()
    options = (*UNIFORM, "--prompt", PROMPT + "x", "--save-cache", "cache")
    assert refused(kvmix(*options)) == "--save-cache cache: the file is there; add --replace, or name another file"
    assert Path("cache").read_bytes() == before
    assert kvmix_json(*options, "--replace")["saved_cache"]["bytes"] == Path("cache").stat().st_size
    assert Path("cache").read_bytes() != before


def test_a_full_disk_leaves_the_file_that_was_there(saved, monkeypatch):
    before = Path("cache").read_bytes()
    fill_disk(monkeypatch, "cache")
    said = kvmix(*UNIFORM, "--prompt", PROMPT + "x", "--save-cache", "cache", "--replace")
    assert said.exit_code == 1
    assert "cannot write cache: No space left on device; no file was changed" in said.stderr
    assert Path("cache").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--uniform", "3", "--prompt", PROMPT), "cache file cache was packed by another plan"),
        (("--uniform", "2", "--prompt", "Something else"), "cache file cache holds another text"),
        (("--uniform", "2", "--prompt", PROMPT[:30]), "tokens begin the prompt"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, options, said):
    assert said in refused(kvmix("run", *TINY, *options, "--load-cache", "cache"))


def test_a_file_that_cannot_be_read_is_refused_before_a_model_is_loaded(saved, monkeypatch):
    monkeypatch.setattr("kvmix_cli.models.loading.load_model", None)
    Path("cut").write_bytes(Path("cache").read_bytes()[:-1])
    for name, said in (("cut", "cut short"), ("nowhere", "there is no cache file nowhere"), (".", "cannot read")):
        assert said in refused(kvmix(*UNIFORM, "--prompt", PROMPT, "--load-cache", name))
    assert "cannot write cut/x" in refused(kvmix(*UNIFORM, "--prompt", PROMPT, "--save-cache", "cut/x"))


@pytest.mark.parametrize(
    "options",
    [
        ("--baseline", "--save-cache", "x"),
        ("--baseline", "--load-cache", "x"),
        ("--uniform", "2", "--replace"),
        ("--uniform", "2", "--prefill-chunk", "0"),
        ("--uniform", "2", "--prefill-chunk", "8", "--image", "x.png"),
    ],
)
def test_what_goes_with_nothing_is_wrong_usage(options):
    result = kvmix("run", *TINY, "--prompt", "x", *options)
    assert result.exit_code == 2
    assert not Path("x").exists()


@pytest.mark.slow
def test_chunks_are_packed_as_they_come():
    """The tail is as long as after decoding, and more of what is read is quantized than if all is fed at once."""
    at_once = kvmix_json(*UNIFORM, "--prompt", PROMPT)
    in_chunks = kvmix_json(*UNIFORM, "--prompt", PROMPT, "--prefill-chunk", 100)
    assert in_chunks["quantized_share"] > at_once["quantized_share"] > 0
    assert in_chunks["prompt_tokens"] == at_once["prompt_tokens"]
    full = ("run", *TINY, "--uniform", 16, "--max-new-tokens", 8, "--prompt", PROMPT)
    assert kvmix_json(*full, "--prefill-chunk", 100)["text"] == kvmix_json(*full)["text"]


@pytest.mark.slow
def test_an_evaluation_in_chunks_has_a_folder_of_its_own():
    options = ("eval", *TINY, "--uniform", 2, "--length", 600, "--prefix", 500, "--step", 50, "--limit", 1)
    at_once, in_chunks = kvmix_json(*options), kvmix_json(*options, "--prefill-chunk", 128)
    assert len(list(Path("results").glob("perplexity__*uniform-2__*"))) == 2
    rows = [result["rows"] for result in (at_once, in_chunks)]
    assert rows[0] != rows[1]
    assert "--prefill-chunk must be at least 1" in refused(kvmix(*options, "--prefill-chunk", 0))
