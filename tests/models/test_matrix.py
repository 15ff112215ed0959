"""Every architecture of transformers, small, through the cache and the commands: docs/models.md, and a sample of it."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
import transformers
from matrix import FAULT, KINDS, PART, REFUSED, WORKS, Outcome, examine
from matrix_page import PAGE, page, read_stored
from matrix_pool import read_outcomes, run_matrix
from shrinking import model_types, small_config

LEAST = 215
"""Architectures that work wholly."""
SAMPLE = (
    "llama",
    "phi3",
    "falcon",
    "gemma3_text",
    "mixtral",
    "deepseek_v3",
    "longcat_flash",
    "mistral_large4",
    "falcon_h1",
    "mllama",
    "gemma4",
    "emu3",
    "qwen2_5_omni",
    "git",
    "hrm_text",
    "mamba",
    "whisper",
)
"""Of each kind a fast one: grouped heads, fused projections, attention of its own, sliding windows, experts, latents,
two attentions a layer, a latent alone, recurrent states, images beside text, heads by layer, a whole that cannot be
loaded in part, a part of a whole, a shared stack, and refused ones."""
STORED, VERSION = read_stored()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_comes_out_as_the_page_says(model_type):
    assert_as_stored(examine(model_type))


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", model_types())
def test_every_architecture_comes_out_as_the_page_says(model_type):
    assert_as_stored(examine(model_type))


def assert_as_stored(outcome):
    stored = STORED[outcome.type]
    assert (outcome.kind, outcome.reason) == (stored.kind, stored.reason)
    assert (outcome.layers, outcome.heads) == (stored.layers, stored.heads)


def test_the_page_is_made_of_what_is_stored():
    assert page(STORED.values(), VERSION) == PAGE.read_text()


def test_the_page_has_every_architecture_and_enough_of_them_work():
    if transformers.__version__ == VERSION:
        assert sorted(STORED) == model_types()
    counts = Counter(outcome.kind for outcome in STORED.values())
    assert counts[WORKS] >= LEAST
    assert counts[FAULT] == 0
    assert set(counts) <= set(KINDS)
    assert all(outcome.reason for outcome in STORED.values() if outcome.kind != WORKS)


@pytest.mark.parametrize("kind", [PART, REFUSED])
def test_reasons_are_one_line(kind):
    assert all("\n" not in outcome.reason for outcome in STORED.values() if outcome.kind == kind)


@pytest.mark.slow
def test_a_hang_is_an_outcome_and_what_is_known_is_kept(tmp_path):
    results = tmp_path / "results.jsonl"
    known = Outcome("whisper", kind=REFUSED, reason="as it was")
    results.write_text(json.dumps(asdict(known)) + "\n")
    found = run_matrix(results, ["whisper", "llama"], seconds=0)
    assert (found["llama"].kind, found["llama"].reason) == (FAULT, "takes longer than 0 s")
    assert found["whisper"] == known
    assert list(read_outcomes(results)) == ["whisper", "llama"]


def test_configurations_are_small_and_keep_a_layer_of_each_kind():
    text = small_config("gemma4").get_text_config()
    assert sorted(set(text.layer_types)) == ["full_attention", "sliding_attention"]
    full = text.per_layer_config[text.layer_types.index("full_attention")]
    sliding = text.per_layer_config[text.layer_types.index("sliding_attention")]
    assert full.head_dim == 2 * sliding.head_dim, "as it is in the checkpoint"


def test_outcomes_of_a_page_are_counted_and_reasons_are_cells():
    rows = [Outcome("b", kind=WORKS), Outcome("a", kind=REFUSED, reason="a | b <c>")]
    text = page(rows, "1.2")
    assert "| works | 1 |" in text and "| refused | 1 |" in text and "| fault | 0 |" in text
    assert "| a | a \\| b &lt;c> |" in text
    assert text.index("| a |  | refused") < text.index("| b |  | works")
