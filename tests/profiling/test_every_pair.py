"""Moments for serving engines, in which every query finds all tokens but the first one packed: all pairs count."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from decoding import leaves_of
from profiling_models import wrap
from torch.nn.functional import cross_entropy

from kvmix_cli.errors import KvmixError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.windows import NoWindow, Recent
from kvmix_cli.profiling import gradients, run_profile
from kvmix_cli.profiling.grid import EveryPair
from kvmix_cli.profiling.measure import ProbeOptions, measure_sample
from kvmix_cli.profiling.moments import MomentSums
from kvmix_cli.profiling.probes.fisher_metric import FisherMetric
from kvmix_cli.profiling.probes.taylor import Taylor

TOKENS, SINK = 24, 1
ENGINE = ProbeOptions(bits=(2,), group_sizes=(16,), window=NoWindow())
AT_ONCE = SimpleNamespace(sink=SINK, page=1, window=SimpleNamespace(tokens=-1))
"""The cache in which the query of a position finds the token of the same position packed."""
TEXTS = [f"document {number}: " + "".join(chr(97 + number * i % 26) for i in range(900)) for number in range(1, 4)]
RUN = {"texts": TEXTS, "source": "test", "samples": 2, "seq_len": 64, "seed": 3}


def sample(tokens=TOKENS, seed=0):
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def reference(loaded, ids, layer, labels):
    """Metric, covariance and mean of keys and values, by autograd through the dense attention of one layer."""
    leaves = leaves_of(loaded.model, ids, labels, AT_ONCE, layer)
    for kind in ("key", "value"):
        gradients_, states = leaves[kind].grad[0, :, SINK:], leaves[kind].detach()[0, :, SINK:]
        metric = sum(g[:, :, None] * g[:, None] for g in gradients_.unbind(1)) / (ids.shape[1] - 1)
        covariance = np.stack([np.cov(head.T, bias=True) for head in states.numpy()])
        yield metric.numpy(), covariance, states.mean(1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "latent"])
def test_moments_are_of_all_queries_and_all_tokens_but_the_first(family, monkeypatch):
    loaded, ids, labels = wrap(build(family)), sample(), sample(TOKENS - 1, seed=7)[0]
    monkeypatch.setattr(gradients, "drawn_loss", lambda logits, seed: cross_entropy(logits, labels))
    sums = MomentSums(dict.fromkeys(loaded.info.quantizable))
    measure_sample(loaded, [FisherMetric()], ids[0].tolist(), ProbeOptions(window=NoWindow()), sums)
    assert sums.counts == (TOKENS - 1, TOKENS - 1 - SINK)
    for index in loaded.info.quantizable[:2]:
        layer = sums.layer(index)
        for found, expected in zip(layer[:2], reference(loaded, ids, index, labels), strict=True):
            for array, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_other_probes_beside_it_keep_their_window():
    loaded, ids = wrap(build("llama")), sample(300)[0].tolist()
    together, alone = MomentSums(dict.fromkeys(range(4))), MomentSums(dict.fromkeys(range(4)))
    both = measure_sample(loaded, [Taylor(), FisherMetric()], ids, ENGINE, together)
    measure_sample(loaded, [FisherMetric()], ids, ENGINE, alone)
    (one,) = measure_sample(loaded, [Taylor()], ids, ProbeOptions(bits=(2,), group_sizes=(16,))).values()
    assert both["taylor"].layers[0].k.value == pytest.approx(one.layers[0].k.value)
    np.testing.assert_allclose(together.layer(0).k.metric, alone.layer(0).k.metric, rtol=1e-6, atol=1e-12)


def test_the_one_span_has_every_query():
    grid = EveryPair(bits=(), group_sizes=())
    assert grid.spans(9) == [(0, 9, 8)] and grid.shortest == 3
    assert grid.cache == CacheSettings(sink=1, window=NoWindow())


@pytest.mark.slow
def test_a_profile_says_which_window_its_metric_leaves_out(tmp_path):
    """Texts need not be longer than a window; another window is another score, which does not replace the first."""
    loaded, file = wrap(build("llama", torch.float32)), tmp_path / "profile.safetensors"
    found = run_profile(loaded, ["fisher-metric"], **RUN, moments=file, options=ProbeOptions(window=NoWindow()))
    score = found.score("fisher-metric")
    assert score.is_for_engines
    assert (score.setup["sink"], score.setup["window"]) == (1, "none")
    assert (score.moments.predictions, score.moments.tokens) == (2 * 63, 2 * 62)
    near = {**RUN, "options": ProbeOptions(window=Recent(tokens=16)), "seq_len": 192, "moments": file}
    with pytest.raises(KvmixError, match=r"has fisher-metric .*with sink 1, window none, which would be replaced"):
        run_profile(loaded, ["fisher-metric"], **near, before=found.scores)
    other = run_profile(loaded, ["fisher-metric"], **near).score("fisher-metric")
    assert other.setup["window"] == "recent:16" and not other.is_for_engines
    assert other.moments.tokens == 2 * 128


def test_a_window_is_refused_by_scores_without_a_metric():
    with pytest.raises(KvmixError, match="score taylor has no metric of pairs; use --score fisher-metric, or leave"):
        ProbeOptions(window=NoWindow()).check([Taylor()])
