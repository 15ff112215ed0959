"""Loss and divergence through the real cache against decoding token by token, and when tokens are packed."""

import pytest
import torch
from architectures import VOCABULARY, build
from hypothesis import given
from hypothesis import strategies as st
from made_up import patient
from profiling_models import wrap
from reference import reference_cache

from kvmix_cli.cache.mixed import unquantized_cache
from kvmix_cli.cache.packing.pages import PagePacking
from kvmix_cli.cache.store import Store
from kvmix_cli.errors import ModelError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.windows import NoWindow, Recent
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import read_back, shared_pass
from kvmix_cli.profiling.probes.fisher import Fisher
from kvmix_cli.profiling.probes.kl import Kl
from kvmix_cli.profiling.probes.loss import Loss

CACHE = CacheSettings(page=16, sink=2, window=Recent(tokens=8))
GRID = Grid(bits=(2,), group_sizes=(16,), cache=CACHE)
TOKENS = 44
FULL, LOW = TensorPlan(bits=16), TensorPlan(bits=2, group_size=16)


def decoded(loaded, ids, cache):
    """Log probabilities `[T - 1, vocabulary]`, one token at a time."""
    with torch.inference_mode():
        steps = [loaded.model(input_ids=ids[:, i : i + 1], past_key_values=cache) for i in range(TOKENS - 1)]
    return torch.cat([step.logits[0] for step in steps]).double().log_softmax(-1)


@pytest.fixture(params=["llama", "gemma2"])
def loaded(request):
    return wrap(build(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("probe", [Loss(), Kl()])
def test_equals_decoding_token_by_token(loaded, probe):
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    measured = read_back(loaded, probe, ids, GRID)
    first = GRID.shortest - 2
    full = decoded(loaded, ids, unquantized_cache(loaded.model.config))[first:]
    assert measured.layers.keys() == set(loaded.info.quantizable)
    for layer, pair in measured.layers.items():
        for numbers, low in zip(pair, (LayerPlan(k=LOW, v=FULL), LayerPlan(k=FULL, v=LOW)), strict=True):
            layers = {index: LayerPlan(k=FULL, v=FULL) for index in loaded.info.quantizable} | {layer: low}
            plan = Plan.build(loaded.info, layers, CACHE)
            change = full - decoded(loaded, ids, reference_cache(plan, loaded.model.config))[first:]
            if isinstance(probe, Kl):
                expected = (full.exp() * change).sum(-1).mean().item()
            else:
                expected = change.gather(1, ids[0, first + 1 :, None]).mean().item()
            assert list(numbers.curve.values()) == [numbers.value]
            assert numbers.value == pytest.approx(expected, rel=1e-3, abs=1e-5)


windows = st.builds(Recent, tokens=st.integers(0, 60)) | st.just(NoWindow())
caches = st.builds(
    CacheSettings, page=st.sampled_from([16, 32]), sink=st.integers(0, 5), group_size=st.just(16), window=windows
)


@patient
@given(caches, st.integers(1, 200))
def test_spans_are_what_the_cache_has_packed(cache, tokens):
    grid = Grid(bits=(2,), group_sizes=(16,), cache=cache)
    store = Store(PagePacking("keys", grid.layouts("key", 16)["2g16"]), cache, bits=2)
    packed = []
    for _ in range(tokens):
        store.settle()
        packed.append(store.add(torch.zeros(1, 1, 1, 16)).packed_tokens)
    spans = grid.spans(tokens)
    assert [(at, span.packed) for span in spans for at in range(span.start, span.stop)] == [
        (at, count) for at, count in enumerate(packed) if count
    ]
    assert bool(grid.spans(tokens - 1)) == (tokens >= grid.shortest)


@pytest.mark.parametrize("probe", [Loss(), Kl()])
def test_damaged_weights_are_an_error(probe):
    loaded = wrap(build("llama", torch.float32))
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="losses of small are not finite in float32, first in layer 0: its weights"):
        read_back(loaded, probe, torch.ones(1, TOKENS, dtype=torch.long), GRID)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_an_error(error):
    loaded = wrap(build("llama", torch.float32))

    def full(*_):
        raise error

    loaded.model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(ModelError, match="no memory to read 44 tokens back through small: use a smaller --seq-len"):
        read_back(loaded, Loss(), torch.ones(1, TOKENS, dtype=torch.long), GRID)


@pytest.mark.slow
def test_fisher_predicts_the_divergence():
    """Of 300 tokens with one drawn label each."""
    loaded, grid = wrap(build("llama", torch.float32)), Grid(bits=(4,), group_sizes=(16,), cache=CACHE)
    ids = torch.randint(3, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(1))
    predicted = shared_pass(loaded, [Fisher()], ids, grid)["fisher"].layers
    measured = read_back(loaded, Kl(), ids, grid).layers
    pairs = [(one.value, other.value) for i in measured for one, other in zip(predicted[i], measured[i], strict=True)]
    assert max(kl for _, kl in pairs) > 100 * min(kl for _, kl in pairs)
    assert all(fisher == pytest.approx(kl, rel=0.3) for fisher, kl in pairs)
