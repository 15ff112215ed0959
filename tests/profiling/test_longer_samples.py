"""Longer samples beside the others: which text they are of, their moments, going on, and what has no use for them."""

import json

import pytest
import torch
from architectures import build
from profiling_models import wrap

from kvmix_cli.cache.rotary import measure_rotations
from kvmix_cli.errors import DocumentError, KvmixError, TextError
from kvmix_cli.plan.tensors.moments import read_moments, write_moments
from kvmix_cli.profile import LongerSamples, Profile
from kvmix_cli.profiling import run_profile
from kvmix_cli.profiling.measure import ProbeOptions, measure_sample
from kvmix_cli.profiling.moments import MomentSums
from kvmix_cli.profiling.probes.fisher_metric import FisherMetric
from kvmix_cli.texts.tokens import cut_samples

TEXTS = [f"document {number}: " + "".join(chr(97 + number * i % 26) for i in range(900)) for number in range(1, 5)]
TEXTS += [text[:290] for text in TEXTS]
RUN = {"texts": TEXTS, "source": "test", "samples": 2, "seq_len": 280, "seed": 3}
LONGER = LongerSamples(samples=1, seq_len=400)


@pytest.fixture(scope="module")
def model():
    return wrap(build("llama", torch.float32))


def profiled(model, folder, longer=LONGER, **more):
    return run_profile(model, ["fisher-metric"], **RUN, longer=longer, moments=folder / "profile.safetensors", **more)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return profiled(model, folder), folder


def test_moments_are_sums_over_both_kinds_of_samples(model, whole, tmp_path):
    profile, folder = whole
    record = profile.score("fisher-metric").moments
    short, long = (cut_samples(model.tokenizer, TEXTS, *size, 3, shortest=262) for size in ((2, 280), (1, 400)))
    assert [len(ids) for ids in (*short, *long)] == [280, 280, 400]
    ropes = measure_rotations(model.model, model.info.quantizable, model.max_length)
    total = MomentSums(ropes)
    for ids in (*short, *long):
        one = MomentSums(ropes)
        measure_sample(model, [FisherMetric()], ids, ProbeOptions(), one)
        total.merge(one)
    assert write_moments(tmp_path / "expected.safetensors", total.layers()) == record.sha256
    assert record.documents == 3
    assert read_moments(folder, record).keys() == set(model.info.quantizable)


def test_the_profile_says_how_many_there_were_and_how_long(whole, tmp_path):
    profile, _ = whole
    text = profile.score("fisher-metric").calibration
    assert (text.samples, text.seq_len, text.longer, text.tokens) == (2, 280, LONGER, 960)
    assert text.amount == "2 samples of 280 tokens and 1 of 400"
    path = tmp_path / "profile.yaml"
    profile.save(path)
    assert "longer: {samples: 1, seq_len: 400}" in path.read_text()
    assert Profile.load(path).score("fisher-metric").calibration == text


def test_a_profile_without_longer_samples_says_nothing_of_them(whole):
    score = whole[0].score("fisher-metric")
    text = score.calibration.model_copy(update={"longer": None})
    assert text.amount == "2 samples of 280 tokens"
    plain = score.model_copy(update={"calibration": text})
    assert "longer" not in whole[0].model_copy(update={"scores": {"fisher-metric": plain}}).to_yaml()


class Killed(BaseException):
    """Stands for a kill."""


def killed_after_two(done, total):
    assert total == 3
    if done == 2:
        raise Killed


def test_interrupted_and_resumed_is_the_same_file(model, whole, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after_two)
    assert json.loads(journal.read_text().splitlines()[0])["longer"] == {"samples": 1, "seq_len": 400}
    with pytest.raises(DocumentError, match="longer was"):
        other = LongerSamples(samples=1, seq_len=300)
        profiled(model, tmp_path, longer=other, journal=journal, resume=True)
    steps = []
    resumed = profiled(model, tmp_path, journal=journal, resume=True, on_step=lambda done, _: steps.append(done))
    assert steps == [2, 3], "a finished sample was measured again"
    assert resumed.score("fisher-metric").moments == whole[0].score("fisher-metric").moments


def test_of_a_text_without_so_many_all_are_taken(model, tmp_path):
    text = {**RUN, "texts": TEXTS[:1], "samples": 1}
    asked = LongerSamples(samples=3, seq_len=600)
    found = run_profile(model, ["fisher-metric"], **text, longer=asked, moments=tmp_path / "profile.safetensors")
    assert found.score("fisher-metric").calibration.longer == LongerSamples(samples=2, seq_len=600)


def test_a_text_without_any_is_an_error(model, tmp_path):
    with pytest.raises(TextError, match=r"no document of test has more than 280 tokens: .* leave out --longer"):
        run_profile(
            model,
            ["fisher-metric"],
            **{**RUN, "texts": [text[:270] for text in TEXTS]},
            longer=LONGER,
            moments=tmp_path / "profile.safetensors",
        )


def test_longer_than_the_model_takes_is_an_error(model, tmp_path):
    with pytest.raises(TextError, match="the model takes at most 1024 tokens, not 2000: use --longer 3x1024"):
        profiled(model, tmp_path, longer=LongerSamples(samples=3, seq_len=2000))


@pytest.mark.parametrize(
    ("scores", "longer", "message"),
    [
        (
            ["fisher-metric"],
            (3, 280),
            "samples of 280 tokens are no longer than the others, of 280: .* --longer 3x1120",
        ),
        (
            ["fisher-metric", "fisher"],
            (3, 400),
            "score fisher has no use for longer samples; use --score",
        ),
    ],
)
def test_what_has_no_use_for_them(model, tmp_path, scores, longer, message):
    wanted = LongerSamples(samples=longer[0], seq_len=longer[1])
    with pytest.raises(KvmixError, match=message):
        run_profile(model, scores, **RUN, longer=wanted, moments=tmp_path / "profile.safetensors")
