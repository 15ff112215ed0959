"""The cost of evicting a share of one layer's tokens: of that layer alone, refused by name where none is measured."""

import pytest
import torch
from architectures import VOCABULARY, build
from profiling_models import wrap

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import KvmixError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan
from kvmix_cli.plan.tokens import TokenPolicy, TokenShares
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profiling import ProbeOptions, find_probes
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import read_back
from kvmix_cli.profiling.probes.kl import Kl

GRID = Grid(bits=(2,), group_sizes=(16,), cache=CacheSettings(page=16, sink=2, window=Recent(tokens=8)))
TOKENS = 170


@pytest.mark.slow
def test_only_that_layer_evicts():
    """The divergence is that of a plan, written out, whose other layers keep everything."""
    loaded = wrap(build("llama", torch.float32, wide=True))
    loaded.model.set_attn_implementation("kvmix")
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    measured = read_back(loaded, Kl(), ids, GRID, (0.25, 0.75))
    assert measured.evict.keys() == measured.layers.keys()
    first = GRID.shortest - 2

    def read(cache):
        with torch.inference_mode():
            prefill(loaded, cache, ids[0, :first].tolist())
            steps = [logits for _, logits in feed(loaded, cache, ids[0, first:-1].tolist(), 16)]
            return torch.cat(steps).double().log_softmax(-1)

    full, kept = read(unquantized_cache(loaded.model.config)), LayerPlan.of_bits(16, 16)
    for layer, shares in measured.evict.items():
        assert 0 < shares[0.25] < shares[0.75]
        policy = TokenPolicy(evict=0.75, flush=128)
        cache = CacheSettings(page=16, sink=2, window=Recent(tokens=8), tokens=policy)
        layers = dict.fromkeys(loaded.info.quantizable, kept.model_copy(update={"tokens": TokenShares(evict=0.0)}))
        plan = Plan.build(loaded.info, layers | {layer: kept}, cache)
        change = full - read(MixedCache.from_plan(plan, loaded.model.config))
        assert shares[0.75] == pytest.approx((full.exp() * change).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("score", "shares", "message"),
    [
        ("fisher", (0.5,), "score fisher does not measure eviction; use --score kl, or leave out --evict"),
        ("kl", (0.3,), "cannot measure a share of 0.3 evicted; use eighths between 0 and 1"),
        ("kl", (0.0,), "cannot measure a share of 0 evicted"),
    ],
)
def test_shares_that_cannot_be_measured(score, shares, message):
    with pytest.raises(KvmixError, match=message):
        ProbeOptions(evict=shares).check(find_probes([score]))
