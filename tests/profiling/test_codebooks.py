"""Codebooks that a profile learns: of the tokens and squared gradients of its samples, and beside its moments."""

import hashlib

import pytest
import torch
from architectures import VOCABULARY, build
from decoding import leaves_of
from profiling_models import wrap
from torch.nn.functional import cross_entropy

from kvmix_cli.cache.rotary import measure_rotations, turned
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.tensors.codebooks import Codebooks
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profile import Profile
from kvmix_cli.profiling import gradients, run_profile
from kvmix_cli.profiling.codebooks import learn_codebooks
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import shared_pass
from kvmix_cli.profiling.moments import TOKENS_KEPT, MomentSums
from kvmix_cli.profiling.probes.codebooks import CoupledChannels
from kvmix_cli.studies.codebooks import has_codebooks

CACHE = CacheSettings(page=16, sink=2, window=Recent(tokens=8))
TOKENS, PACKED = 90, 64
RUN = {"texts": ["the cache of keys and values " * 60] * 3, "source": "made up", "samples": 2, "seq_len": 280}


@pytest.fixture(scope="module")
def loaded():
    return wrap(build("llama"))


@pytest.mark.slow
def test_kept_tokens_are_keys_before_rope_and_values_with_squared_gradients(loaded, monkeypatch):
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, VOCABULARY, (TOKENS - 1,), generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(gradients, "drawn_loss", lambda logits, seed: cross_entropy(logits, labels))
    ropes = measure_rotations(loaded.model, loaded.info.quantizable, None)
    sums = MomentSums(ropes, keeps_tokens=True)
    shared_pass(loaded, [CoupledChannels()], ids, Grid(bits=(), group_sizes=(), cache=CACHE), sums=sums)
    leaves = leaves_of(loaded.model, ids, labels, CACHE, 1)
    places = torch.arange(CACHE.sink, CACHE.sink + PACKED)
    for kind, leaf in leaves.items():
        states, slopes = (each[0, :, CACHE.sink :][:, :PACKED].double() for each in (leaf.detach(), leaf.grad))
        if kind == "key":
            states, slopes = (turned(each, ropes[1], -places) for each in (states, slopes))
        kept = sums.kept(1, kind)
        torch.testing.assert_close(kept[0].double(), states, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(kept[1].double(), slopes.square(), rtol=2e-2, atol=1e-12)
    books, tokens = learn_codebooks(sums, loaded.info.id)
    assert tokens == PACKED
    assert {bits: array.shape for bits, array in books.layers[1]["k"].items()} == {
        1: (2, 2, 256, 8),
        2: (2, 4, 256, 4),
        3: (2, 8, 64, 2),
        4: (2, 8, 256, 2),
    }


@pytest.mark.slow
def test_a_profile_names_its_codebooks_beside_its_moments(tmp_path):
    model = wrap(build("llama", torch.float32))
    both = run_profile(model, ["fisher-metric", "codebooks"], **RUN, moments=tmp_path / "profile.safetensors")
    profile = Profile.load(both.save(tmp_path / "profile.yaml"))
    assert has_codebooks(profile)
    record, moments = profile.score("codebooks").codebooks, (tmp_path / "profile.safetensors").read_bytes()
    assert (record.file, record.tokens) == ("profile.codebooks.safetensors", 2 * 128)
    assert profile.score("codebooks").moments is None and profile.score("fisher-metric").codebooks is None
    books = Codebooks.load(tmp_path / record.file, record.sha256)
    assert sorted(books.layers) == sorted(books.rope) == model.info.quantizable
    (tmp_path / record.file).unlink()
    alone = run_profile(model, ["codebooks"], **RUN, moments=tmp_path / "profile.safetensors")
    assert alone.score("codebooks").codebooks == record
    assert hashlib.sha256((tmp_path / record.file).read_bytes()).hexdigest() == record.sha256
    assert (tmp_path / "profile.safetensors").read_bytes() == moments
    assert TOKENS_KEPT > 128
