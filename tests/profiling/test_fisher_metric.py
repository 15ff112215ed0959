"""Moments against per-token gradients by plain autograd in float64, and their files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from decoding import leaves_of
from made_up import make_info
from profiling_models import wrap
from safetensors.numpy import load, save
from torch.nn.functional import cross_entropy
from with_moments import model_moments, profile_with_moments

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.cache.rotary import measure_rotations
from kvmix_cli.errors import DocumentError, KvmixError, ModelError, TextError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.tensors.moments import MomentsFile, Rope, read_moments, write_moments
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profile import Profile
from kvmix_cli.profiling import gradients, moments, remove_journal, run_profile
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import ProbeOptions, shared_pass
from kvmix_cli.profiling.moments import MomentSums
from kvmix_cli.profiling.probes.fisher import Fisher
from kvmix_cli.profiling.probes.fisher_metric import FisherMetric
from kvmix_cli.profiling.probes.taylor import Taylor
from kvmix_cli.studies.directions import read_basis

CACHE = CacheSettings(page=16, sink=2, window=Recent(tokens=8))
GRID = Grid(bits=(2,), group_sizes=(16,), cache=CACHE)
TOKENS, FRAME = 90, 32
READERS = TOKENS - 1 - (CACHE.sink + CACHE.window.tokens + CACHE.page)
PACKED = 64
LEFT_OUT = 3  # of the packed tokens in each head
POWER = 0.6
FAMILIES = ["llama", "qwen2", "phi3", "gemma2", "gpt_oss", "latent"]


def sample(tokens=TOKENS, seed=0):
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def loaded(request):
    return wrap(build(request.param))


def turned_to_frame(states, rope):
    """Turn keys `[H, T, D]`, token by token and pair by pair as complex numbers, to the start of their frame."""
    states, n = states.clone(), len(rope.frequencies)
    for token in range(CACHE.sink, states.shape[1]):
        start = FRAME * ((token - CACHE.sink) // FRAME)
        for pair in range(n):
            a, b = (pair, pair + n) if rope.layout == "half" else (2 * pair, 2 * pair + 1)
            turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(-start * rope.frequencies[pair]))
            number = torch.complex(states[:, token, a], states[:, token, b]) * turn
            states[:, token, a], states[:, token, b] = number.real, number.imag
    return states


def reference(loaded, ids, layer, labels, rope):
    """Return metric, covariance and mean of keys and values, from the gradients of packed tokens, each on its own."""
    leaves = leaves_of(loaded.model, ids, labels, CACHE, layer)
    found = {}
    for kind, leaf in leaves.items():
        gradients, states = leaf.grad[0], leaf.detach()[0]
        if kind == "key" and rope is not None:
            gradients, states = turned_to_frame(gradients, rope), turned_to_frame(states, rope)
        found[kind] = gradients[:, CACHE.sink :][:, :PACKED].numpy(), states[:, CACHE.sink :].numpy()
    costs = {kind: costs_of(*part) for kind, part in found.items()}
    left_out = np.argsort(-sum(costs.values()), axis=1)[:, :LEFT_OUT]
    return tuple(moments_without(left_out, costs[kind], *found[kind]) for kind in ("key", "value"))


def costs_of(slopes, states):
    """Return the mean of `(g . e)^2` over the differences `e` between states and their mean, for each packed token."""
    products = np.einsum("htd,hjd->htj", slopes, states - states.mean(1, keepdims=True))
    return (products**2).mean(-1)


def moments_without(left_out, costs, slopes, states):
    """Return metric, covariance and mean of all heads, without some tokens `[H, n]`, counted after the sinks."""
    heads = []
    for tokens, prices, own, others in zip(left_out, costs, slopes, states, strict=True):
        prices, own, others = (np.delete(each, tokens, axis=0) for each in (prices, own, others))
        held_down = prices**POWER / prices * (prices.sum() / (prices**POWER).sum())
        heads.append(((own * held_down[:, None]).T @ own / READERS, np.cov(others.T, bias=True), others.mean(0)))
    return tuple(map(np.stack, zip(*heads, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_moments_are_of_the_gradients_of_packed_tokens_but_for_the_dearest(loaded, monkeypatch, checkpointing):
    ids, labels = sample(), sample(TOKENS - 1, seed=7)[0]
    monkeypatch.setattr(FisherMetric, "grid", GRID)
    monkeypatch.setattr(moments, "LEFT_OUT", LEFT_OUT / PACKED)
    monkeypatch.setattr(moments, "POWER", POWER)
    monkeypatch.setattr(gradients, "drawn_loss", lambda logits, seed: cross_entropy(logits, labels))
    ropes = measure_rotations(loaded.model, loaded.info.quantizable, loaded.max_length)
    assert (None in ropes.values()) == ("DeepseekV3" in type(loaded.model).__name__), "a latent has no position"
    sums = MomentSums(ropes, FRAME)
    measured = shared_pass(loaded, [FisherMetric()], ids, GRID, sums=sums, checkpointing=checkpointing, per_head=True)
    assert sums.counts == (READERS, PACKED)
    for index, layer in sums.layers().items():
        for found, expected in zip(layer[:2], reference(loaded, ids, index, labels, ropes[index]), strict=True):
            for array, wanted in zip(found, expected, strict=True):
                # the model computes its loss, and some its norms and softmax, in float32
                np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        for result, each in zip(measured["fisher-metric"].layers[index], layer[:2], strict=True):
            whole = 0.5 * np.trace(each.metric @ each.covariance, axis1=1, axis2=2)
            assert result.value == pytest.approx(whole.sum())
            assert result.heads == pytest.approx(whole)


def test_together_with_others_is_the_same_as_alone():
    loaded = wrap(build("llama"))
    measured = []
    for probes in ([FisherMetric()], [Taylor(), Fisher(), FisherMetric()]):
        sums = MomentSums(measure_rotations(loaded.model, loaded.info.quantizable, loaded.max_length))
        shared_pass(loaded, probes, sample(), GRID, sums=sums)
        measured.append(sums.layers())
    for alone, together in zip(*(each.values() for each in measured), strict=True):
        for one, other in zip(alone[:2], together[:2], strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)


def test_large_means_do_not_drown_the_covariance():
    """Keys of Qwen2 have biases of several hundred; in float32 their squares would hide a variance of one."""
    loaded = wrap(build("qwen2", torch.float32))
    sums = MomentSums(dict.fromkeys(loaded.info.quantizable))
    shared_pass(loaded, [FisherMetric()], sample(), GRID, sums=sums)
    exact = MomentSums(dict.fromkeys(loaded.info.quantizable))
    shared_pass(wrap(build("qwen2")), [FisherMetric()], sample(), GRID, sums=exact)
    for index, layer in sums.layers().items():
        variances = [np.diagonal(each.k.covariance, axis1=1, axis2=2) for each in (layer, exact.layer(index))]
        np.testing.assert_allclose(*variances, rtol=1e-2)


# Through `run_profile`

TEXTS = [f"document {number}: " + "".join(chr(97 + number * i % 26) for i in range(3000)) for number in range(1, 5)]
RUN = {"texts": TEXTS, "source": "test", "samples": 3, "seq_len": 280, "seed": 3}


@pytest.fixture
def model():
    return wrap(build("llama", torch.float32))


def profiled(model, folder, **options):
    return run_profile(model, ["fisher-metric"], **{**RUN, **options}, moments=folder / "profile.safetensors")


def test_a_profile_names_its_tensors_and_reads_them_back(model, tmp_path):
    profile = Profile.load(profiled(model, tmp_path).save(tmp_path / "profile.yaml"))
    score = profile.score("fisher-metric")
    assert score.moments is not None
    assert score.setup == {"page": 128, "sink": 4, "window": "recent:128", "scale_dtype": "float16"}
    assert score.moments.documents == 3
    assert score.moments.predictions == 3 * (279 - 260)
    assert score.moments.tokens == 3 * 128
    assert score.moments.frame == 1024
    assert not score.predicts_loss and score.choices == ([], [])
    assert score.moments.sha256 == hashlib.sha256((tmp_path / "profile.safetensors").read_bytes()).hexdigest()
    layers = read_moments(tmp_path, score.moments)
    assert list(layers) == model.info.quantizable
    for layer in layers.values():
        for each in (layer.k, layer.v):
            assert [array.shape for array in each] == [(2, 16, 16), (2, 16, 16), (2, 16)]
            assert {array.dtype for array in each} == {np.dtype("float32")}
        assert isinstance(layer.rope, Rope)
        np.testing.assert_allclose(layer.rope.frequencies, 10000.0 ** -(np.arange(8) / 8), rtol=1e-6)


@pytest.mark.slow
def test_shorter_frames_are_those_of_the_plan(model, tmp_path):
    """Of 280 tokens some are beyond the first frame of 256: moments of keys are others, those of values the same."""
    usual, short = (tmp_path / name for name in ("usual", "short"))
    scores = [
        profiled(model, usual).score("fisher-metric"),
        (found := profiled(model, short, options=ProbeOptions(frame=256))).score("fisher-metric"),
    ]
    assert [score.moments.frame for score in scores] == [1024, 256]
    assert scores[1].setup["frame"] == 256 and scores[0].identity != scores[1].identity
    assert Profile.load(found.save(short / "profile.yaml")).score("fisher-metric").setup == scores[1].setup
    (first, *_), (other, *_) = (
        read_moments(folder, score.moments).values() for folder, score in zip((usual, short), scores, strict=True)
    )
    np.testing.assert_array_equal(first.v.covariance, other.v.covariance)
    assert not np.allclose(first.k.covariance, other.k.covariance)
    plan = allocate(found, Budget(avg_bits=2), basis=read_basis(found, short))
    assert plan.cache.transform.frame == 256


def test_symmetric_matrices_are_kept_once_and_whole_ones_are_read(tmp_path):
    info = make_info(2, head_dim=24)
    path, found = tmp_path / "profile.safetensors", model_moments(info)
    record = profile_with_moments(info, write_moments(path, found)).score("fisher-metric").moments
    tensors = load(path.read_bytes())
    assert tensors["layers.0.k.metric"].shape == (2, 24 * 25 // 2)
    whole = {
        f"layers.{index}.{kind}.{name}": np.ascontiguousarray(array, np.float32)
        for index, layer in found.items()
        for kind in "kv"
        for name, array in getattr(layer, kind)._asdict().items()
    }
    data = save(whole, {"rope": "{}"})
    (tmp_path / "whole.safetensors").write_bytes(data)
    other = record.model_copy(update={"file": "whole.safetensors", "sha256": hashlib.sha256(data).hexdigest()})
    for of_file in (record, other):
        for index, layer in read_moments(tmp_path, of_file).items():
            for got, expected in zip((*layer.k, *layer.v), (*found[index].k, *found[index].v), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_the_same_text_gives_the_same_file(model, tmp_path):
    digests = {profiled(model, tmp_path).score("fisher-metric").moments.sha256 for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.slow
def test_twenty_documents_are_measured_by_default(model, tmp_path):
    score = profiled(model, tmp_path, samples=None).score("fisher-metric")
    assert (score.calibration.samples, score.moments.documents) == (20, 20)


class Killed(BaseException):
    """Stands for a kill."""


def killed_after(count):
    def step(done, total):
        if done == count:
            raise Killed

    return step


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_same_file(model, tmp_path):
    whole = profiled(model, tmp_path)
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after(2))
    parts = [tmp_path / f"profile.partial.{number}.safetensors" for number in range(2)]
    assert all(part.exists() for part in parts)
    assert len(journal.read_text()) < 10_000, "no tensors in the journal"
    parts[1].with_name("profile.partial.2.safetensors").write_bytes(b"of a document that was being finished")
    resumed = profiled(model, tmp_path, journal=journal, resume=True)
    assert resumed.score("fisher-metric").moments == whole.score("fisher-metric").moments
    remove_journal(journal)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda part: part.write_bytes(part.read_bytes()[:500])])
def test_a_part_that_is_missing_or_cut_short_is_one_line(model, tmp_path, damage):
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after(2))
    damage(tmp_path / "profile.partial.0.safetensors")
    with pytest.raises(
        DocumentError, match=r"profile.partial.0.safetensors: cannot resume.*leave out --resume"
    ) as error:
        profiled(model, tmp_path, journal=journal, resume=True)
    assert "\n" not in str(error.value)


def test_starting_over_removes_old_parts(model, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after(2))
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after(0))
    assert not list(tmp_path.glob("profile.partial.*.safetensors"))


def test_a_journal_of_other_frames_does_not_go_on(model, tmp_path, monkeypatch):
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(Killed):
        profiled(model, tmp_path, journal=journal, on_step=killed_after(1))
    head, *rest = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps({**json.loads(head), "frame": 512}), *rest]) + "\n")
    with pytest.raises(DocumentError, match="frame was 512 and is now 1024"):
        profiled(model, tmp_path, journal=journal, resume=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seq_len": 200}, TextError, "a --seq-len of 262 or more"),
        ({"options": ProbeOptions(bits=(2,))}, KvmixError, "score fisher-metric does not look at widths; leave out"),
        (
            {"options": ProbeOptions(frame=200)},
            KvmixError,
            "a frame is whole pages of 128 tokens, not 200; use --frame 256",
        ),
        ({"moments": None}, KvmixError, r"score fisher-metric measures tensors: name a file for them"),
    ],
)
def test_what_cannot_be_measured_is_an_error(model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run_profile(model, ["fisher-metric"], **{"moments": tmp_path / "m.safetensors", **RUN, **options})
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_not_numbers_are_one_line(model, tmp_path):
    with torch.no_grad():
        model.model.model.layers[3].self_attn.o_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite in float32: its weights may be damaged") as error:
        profiled(model, tmp_path, journal=tmp_path / "profile.partial.jsonl")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_with_attention_of_its_own_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"FalconForCausalLM computes attention on its own.*grad-norm"):
        profiled(wrap(build("falcon", torch.float32)), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "it cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "or was cut short"),
        (lambda path: path.write_bytes(b"other"), "it is not the file that the profile was written with"),
    ],
)
def test_tensors_that_are_not_those_of_the_profile_are_refused(model, tmp_path, damage, message):
    record = profiled(model, tmp_path).score("fisher-metric").moments
    damage(tmp_path / record.file)
    with pytest.raises(DocumentError, match=f"{message}.*measure it again") as error:
        read_moments(tmp_path, record)
    assert "\n" not in str(error.value)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    data = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
    (tmp_path / "other.safetensors").write_bytes(data)
    record = MomentsFile(
        file="other.safetensors", sha256=hashlib.sha256(data).hexdigest(), documents=1, predictions=1, tokens=1
    )
    with pytest.raises(DocumentError, match="it holds no moments of keys and values"):
        read_moments(tmp_path, record)


def test_a_file_outside_the_profiles_folder_is_refused():
    with pytest.raises(ValueError, match="must be the name of a file in the folder of the profile"):
        MomentsFile(file="../m.safetensors", sha256="", documents=1, predictions=1, tokens=1)
