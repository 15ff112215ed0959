"""Losses of transform codes measured on calibration text, and the predictions that they correct."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fetch_smollm2 import model_folder

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import QuantizationError
from kvmix_cli.evaluation.alongside import divergence
from kvmix_cli.models.loading import load_model
from kvmix_cli.profile import Profile
from kvmix_cli.studies import coded
from kvmix_cli.studies.directions import read_basis, with_basis
from kvmix_cli.texts import load_texts
from kvmix_cli.texts.tokens import cut_samples

FOLDER = Path(__file__).parents[2] / "profiles" / "builtin--tiny"
PROFILE = Profile.load(FOLDER / "profile.yaml")
HELD_OUT = 700
"""Tokens of a document that nothing was calibrated on."""
CHARACTERS = 8_000
"""Of each text of which samples are cut: enough for one, and soon read."""
LONG = 1400
"""Tokens of a longer one, in the middle between the contexts that a profile has measured."""


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny")


def loss_of(loaded, plan, ids):
    """The divergence of a plan, by reading the document through one cache after the other."""
    with torch.inference_mode():
        logits = []
        for subject in (Subject(), Subject(plan=plan)):
            cache = subject.cache(loaded.config, reserve=len(ids))
            prefill(loaded, cache, ids[:260])
            logits.append(torch.cat([part for _, part in feed(loaded, cache, ids[260:-1], 32)]))
        return divergence(*logits).mean().item()


def check_predictions(loaded, profile, folder, place, widths, length=HELD_OUT):
    """Predictions are within a factor of three of what a held-out document loses."""
    basis = read_basis(profile, folder)
    (ids,) = cut_samples(loaded.tokenizer, load_texts(held_out=True), 1, length, 0)
    for bits in widths:
        plan = allocate(profile, Budget(avg_bits=bits, context=length), method="transform", basis=basis)
        predicted = plan.provenance["predicted_loss"]
        assert predicted / 3 < loss_of(loaded, with_basis(plan, basis, place), ids) < 3 * predicted


@pytest.mark.slow
def test_predictions_are_what_is_lost_within_a_factor_of_three(tiny, tmp_path):
    check_predictions(tiny, PROFILE, FOLDER, tmp_path, (2, 3))


@pytest.mark.slow
def test_predictions_for_longer_contexts_are_as_good(tiny, tmp_path):
    check_predictions(tiny, PROFILE, FOLDER, tmp_path, (2,), LONG)


@pytest.mark.network
def test_predictions_for_smollm2_are_as_good(tmp_path):
    folder = FOLDER.parent / "smollm2-135m"
    loaded = load_model(str(model_folder()), dtype="float32")
    check_predictions(loaded, Profile.load(folder / "profile.yaml"), folder, tmp_path, (2,))


@pytest.mark.slow
def test_what_is_measured_is_the_divergence_of_each_plan_in_contexts_of_two_lengths(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(coded, "EXACT", (1, 2))
    text = PROFILE.score("fisher-metric").calibration
    score = PROFILE.score("fisher-metric").model_copy(update={"calibration": text.model_copy(update={"seq_len": 388})})
    profile = PROFILE.model_copy(update={"scores": {**PROFILE.scores, "fisher-metric": score}})
    ids = cut_samples(tiny.tokenizer, load_texts(), 1, 420, 0)[0]
    found = coded.measure_coded(profile, tiny, [ids, [*ids, 1, 2]], FOLDER)
    assert [(each.context, each.exact) for each in found] == [(388, 1), (388, 2), (420, 1), (420, 2)]
    basis = read_basis(PROFILE, FOLDER)
    plan = allocate(PROFILE, Budget(avg_bits=coded.BITS), method="transform", basis=basis, exact=2)
    # of batches of the same size, so that products are the same
    for length, each in ((388, found[1]), (420, found[3])):
        assert each.measured == pytest.approx(loss_of(tiny, with_basis(plan, basis, tmp_path), ids[:length]), rel=1e-4)
    promised = PROFILE.score("fisher-metric").coded[1].predicted
    assert found[1].predicted == found[3].predicted == pytest.approx(promised, rel=1e-5), "by moments, uncorrected"


def test_documents_that_are_read_are_of_samples_that_the_moments_are_not_of(tiny):
    text = PROFILE.score("fisher-metric").calibration
    texts, long = [each[:CHARACTERS] for each in load_texts()], text.seq_len
    samples = text.samples + coded.DOCUMENTS * coded.REACH
    cut = cut_samples(tiny.tokenizer, texts, samples, long, text.seed)
    found = coded._documents(PROFILE, tiny, texts)
    assert len(found) == coded.DOCUMENTS
    parts = [ids[start : start + long] for ids in found for start in range(0, len(ids), long)]
    assert parts == cut[text.samples :]


def test_where_the_text_or_the_model_has_not_enough_documents_are_shorter(tiny):
    text = PROFILE.score("fisher-metric").calibration
    short = load_texts()[0][:CHARACTERS]
    found = coded._documents(PROFILE, tiny, [short])
    assert 0 < len(found) <= coded.DOCUMENTS, "too little text is read again"
    assert found[0] in cut_samples(tiny.tokenizer, [short], 9, text.seq_len, text.seed)
    limited = SimpleNamespace(tokenizer=tiny.tokenizer, max_length=text.seq_len + 1)
    found = coded._documents(PROFILE, limited, [each[:CHARACTERS] for each in load_texts()])
    assert [len(ids) for ids in found] == [text.seq_len] * coded.DOCUMENTS


def test_a_profile_whose_plans_cannot_be_measured_is_kept(monkeypatch):
    def fails(*arguments):
        raise QuantizationError("layer 3 keys: NaN or Inf")

    monkeypatch.setattr(coded, "measure_coded", fails)
    monkeypatch.setattr(coded, "_documents", lambda *arguments: [])
    said = []
    plain = PROFILE.model_copy(update={"scores": {"fisher-metric": PROFILE.scores["fisher-metric"]}})
    from kvmix_cli.evaluation.runner import no_progress

    assert coded.with_coded_losses(plain, None, [], FOLDER, say=said.append, progress=no_progress) == plain
    assert len(said) == 1 and "layer 3 keys" in said[0]
