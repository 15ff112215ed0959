"""Prompts that are scored as a whole: read again against themselves (KVzip), or by a press of kvpress."""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from architectures import build
from composing import plan_for
from kvmix_kernels.sorted_tokens import EVICTED
from profiling_models import wrap
from teaching import ids

from kvmix_cli.cache.composed import ComposedLayer
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.policies import presses
from kvmix_cli.decoding.feed import fill, prefill
from kvmix_cli.decoding.prompt_scores import OVERLAP, REPEAT, REPEAT_FROM
from kvmix_cli.errors import PlanError, PolicyError
from kvmix_cli.plan import Plan, TensorPlan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.tokens import TokenPolicy
from kvmix_cli.plan.transforms import Rotate, Transforms
from kvmix_cli.texts.tokens import encode

SINK = 4


def zipped(model, share=0.5, flush=64, score="kvzip", **axes):
    tokens = TokenPolicy(score=score, evict=share, flush=flush)
    return plan_for(model, {"tokens": tokens, **axes}, 16, 16, sink=SINK)


def loaded_model(family="llama", dtype=torch.float64):
    model = build(family, dtype, wide=True)
    model.set_attn_implementation("kvmix")
    return wrap(model)


@pytest.fixture(scope="module")
def loaded():
    return loaded_model()


def reference(loaded, tokens, chunk):
    """Return the scores `[B, H_kv, T]` of every layer, from the weights that an eager model gives."""
    model, cache = loaded.model, unquantized_cache(loaded.config)
    found = [torch.zeros(*tokens.shape, 2).transpose(1, 2) for _ in model.model.layers]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            for start in range(0, tokens.shape[1], chunk):
                request = encode(loaded.tokenizer, REPEAT if start == 0 else REPEAT_FROM)
                request = torch.tensor(request).expand(tokens.shape[0], -1)
                before, part = tokens[:, max(0, start - OVERLAP) : start], tokens[:, start : start + chunk]
                again = torch.cat([request, before, part], dim=1)
                weights = model(again, past_key_values=cache, output_attentions=True).attentions
                cache.crop(-again.shape[1])
                columns = [*range(SINK), *range(start, start + part.shape[1])]
                columns += range(tokens.shape[1], tokens.shape[1] + again.shape[1])
                for scores, layer in zip(found, weights, strict=True):
                    layer = layer.unflatten(1, (2, -1))
                    allowed = torch.zeros(layer.shape[-1]).index_fill_(0, torch.tensor(columns), 1.0)
                    of_these = layer / (layer * allowed).sum(-1, keepdim=True)
                    best = of_these[..., start : start + part.shape[1]].amax((2, 3))
                    scores[..., start : start + part.shape[1]] = best.float()
    finally:
        model.set_attn_implementation("kvmix")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("transforms", [None, Transforms(k=(Rotate(),))])
def test_scores_are_the_largest_weights_of_the_second_reading(loaded, monkeypatch, transforms):
    monkeypatch.setattr("kvmix_cli.decoding.prompt_scores.CHUNK", 100)
    found, release = [], ComposedLayer.release
    monkeypatch.setattr(ComposedLayer, "release", lambda layer: (found.append(layer.held.scores), release(layer)))
    tokens = ids(230)
    plan = zipped(loaded.model, **({"transforms": transforms} if transforms else {}))
    cache = MixedCache.from_plan(plan, loaded.config)
    with torch.no_grad():
        fill(loaded, cache, tokens)
    assert not cache.held
    assert cache.get_seq_length() == 230
    for layer, given, expected in zip(cache.layers, found, reference(loaded, tokens, 100), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)  # the eager model's softmax is in float32
        tiers = layer._tokens.sorted.view
        packed = given[:, :, SINK : SINK + tiers.shape[2]]
        assert tiers.shape[2] == 128
        for scores, kept in zip(packed.flatten(0, 1), (tiers != EVICTED).flatten(0, 1), strict=True):
            assert kept.sum() == 64
            assert scores[kept].min() >= scores[~kept].max()


def test_groups_of_heads_are_scored_as_all_heads_together(loaded, monkeypatch):
    found, release = [], ComposedLayer.release
    monkeypatch.setattr(ComposedLayer, "release", lambda layer: (found.append(layer.held.scores), release(layer)))
    plan = zipped(loaded.model)
    group = HeadGroup(heads=(1,), k=TensorPlan(bits=8))
    layers = {index: layer.model_copy(update={"head_groups": (group,)}) for index, layer in plan.layers.items()}
    with torch.no_grad():
        for each in (plan, Plan.build(plan.model, layers, plan.cache)):
            fill(loaded, MixedCache.from_plan(each, loaded.config), ids(150))
    assert [scores.shape[1] for scores in found] == [2] * 4 + [1] * 8
    for together, *apart in zip(found[:4], found[4::2], found[5::2], strict=True):
        torch.testing.assert_close(
            torch.cat(sorted(apart, key=lambda s: not s[0, 0].equal(together[0, 0])), 1), together
        )


def test_what_a_second_reading_drops_is_merged_and_images_go_first(loaded):
    """A prompt that is held is told apart from its padding and its images as any other is."""
    tokens, is_image = ids(150), torch.zeros(2, 150, dtype=torch.bool)
    is_image[:, 20:40] = True
    policy = TokenPolicy(score="kvzip", evict=0.5, flush=64, merge="look-m", images="last")
    cache = MixedCache.from_plan(plan_for(loaded.model, {"tokens": policy}, sink=SINK), loaded.config)
    plain = unquantized_cache(loaded.config)
    cache.label(is_image)
    with torch.no_grad():
        for each in (cache, plain):
            fill(loaded, each, tokens)
    packed, states = cache.layers[0].stores[1].packing.view, plain.layers[0].values[:, :, SINK : SINK + 64]
    gone = packed.tier == EVICTED
    assert gone[:, :, 20 - SINK : 40 - SINK].all()
    kept = states[~gone].view(2, 2, 32, -1)
    is_changed = (packed.held[0] - kept).abs().amax(-1) > 1e-6
    assert 0 < is_changed.sum() < is_changed.numel()


@pytest.mark.slow
def test_nothing_of_the_second_reading_stays():
    """A model with sliding layers, whose stock caches are put back, decodes as without eviction or a second reading."""
    loaded = loaded_model("gemma3")
    plan = plan_for(
        loaded.model, {"tokens": TokenPolicy(score="kvzip", tiers=({"share": 0.5, "k": 16, "v": 16},), flush=64)}
    )
    cache, plain = MixedCache.from_plan(plan, loaded.config), unquantized_cache(loaded.config)
    with torch.no_grad():
        logits = [fill(loaded, each, ids(200)) for each in (cache, plain)]
        torch.testing.assert_close(*logits)
        for seed in range(3):
            logits = [loaded.model(ids(40, seed=seed), past_key_values=each).logits for each in (cache, plain)]
            torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


def test_later_tokens_are_scored_by_their_attention(loaded):
    cache = MixedCache.from_plan(zipped(loaded.model), loaded.config)
    with torch.no_grad():
        prefill(loaded, cache, ids(150))
        assert cache.attended.total == 0
        before = cache.layers[0]._tokens.sorted.length
        for seed in range(4):
            loaded.model(ids(40, seed=seed), past_key_values=cache)
    assert cache.layers[0]._tokens.sorted.length > before
    assert cache.get_seq_length() == 310


def test_batch_operations_while_a_prompt_is_held(loaded):
    one, other = (MixedCache.from_plan(zipped(loaded.model), loaded.config) for _ in range(2))
    tokens = ids(150)
    with torch.no_grad():
        loaded.model(tokens, past_key_values=one)
        assert [each.index for each in one.held] == [0, 1, 2, 3]
        one.reorder_cache(torch.tensor([1, 0]))
        for layer in [each.layer for each in one.held]:
            layer.held.scores[0] = 1.0  # of what was the second sequence
            layer.release()
        loaded.model(tokens.flip(0), past_key_values=other)
        for layer in [each.layer for each in other.held]:
            layer.held.scores[0] = 1.0
            layer.release()
        logits = [loaded.model(ids(2), past_key_values=each).logits for each in (one, other)]
    torch.testing.assert_close(*logits)


def test_where_no_second_reading_is_possible_it_is_said(loaded):
    cache = MixedCache.from_plan(zipped(loaded.model), loaded.config)
    with torch.no_grad(), pytest.raises(PolicyError, match=r"waits for the whole prompt.*leave out --prefill-chunk"):
        fill(replace(loaded, prefill_chunk=50), cache, ids(150))
    cache = MixedCache.from_plan(zipped(loaded.model), loaded.config)
    with torch.no_grad():
        loaded.model(ids(150), past_key_values=cache)
        with pytest.raises(PolicyError, match="waits for the whole prompt"):
            loaded.model(ids(1), past_key_values=cache)
        with pytest.raises(PolicyError, match="waits for the whole prompt"):
            cache.crop(-1)
    cache = MixedCache.from_plan(zipped(loaded.model), loaded.config)
    with torch.no_grad(), pytest.raises(PolicyError, match=r"one of 150 tokens leaves room for .* of the model's 200"):
        fill(replace(loaded, max_length=200), cache, ids(150))


def test_a_state_that_cannot_be_put_back_is_refused():
    loaded = loaded_model("linear and full", torch.float32)
    cache = MixedCache.from_plan(zipped(loaded.model), loaded.config)
    with torch.no_grad(), pytest.raises(PolicyError, match=r"layer 0 \(\w+\) keeps a state"):
        fill(loaded, cache, ids(150))


@dataclass
class ScorerPress:
    """kvpress's own, in what matters here."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def compress(self):
        raise AssertionError("no press of ours may compress")


@dataclass
class HiddenPress(ScorerPress):
    """A press that looks at what modules are called with."""

    sign: float = 1.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        cos, _ = kwargs["position_embeddings"]
        assert attentions is None
        assert module.rotary_emb is not None
        assert module.q_proj(hidden_states).shape[1] == keys.shape[2] == cos.shape[1]
        return self.sign * hidden_states[..., 0][:, None].expand(keys.shape[:3])


class WrongPress(ScorerPress):
    def score(self, *_):
        return torch.ones(1)


class FailingPress(ScorerPress):
    def score(self, *_):
        raise ValueError("only for a batch of one")


class AdaPress:
    """A press that wraps another and masks single heads."""


class MergingPress(ScorerPress):
    def compress(self):
        """Change keys and values."""


@pytest.fixture
def kvpress(monkeypatch):
    found = (ScorerPress, HiddenPress, WrongPress, FailingPress, AdaPress, MergingPress)
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**{each.__name__: each for each in found}))
    presses._press.cache_clear()
    yield
    presses._press.cache_clear()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.usefixtures("kvpress")
def test_a_press_scores_a_prompt(loaded, sign):
    cache = MixedCache.from_plan(zipped(loaded.model, score=f"press:HiddenPress(sign={sign})"), loaded.config)
    hidden = {}
    hook = loaded.model.model.layers[1].input_layernorm.register_forward_hook(lambda _, __, out: hidden.update(x=out))
    with torch.no_grad():
        fill(loaded, cache, ids(150))
    hook.remove()
    assert not hasattr(loaded.model.model.layers[1].self_attn, "rotary_emb")
    tiers = cache.layers[1]._tokens.sorted.view
    scores = sign * hidden["x"][..., 0][:, SINK : SINK + tiers.shape[2]]
    best = scores.argsort(dim=-1, descending=True)[:, : tiers.shape[2] // 2].sort().values
    for row in range(2):
        assert (tiers[row, 0] != 255).nonzero()[:, 0].tolist() == best[row].tolist()
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.usefixtures("kvpress")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("press:Hiden", PlanError, r"kvpress has no press 'Hiden'"),
        ("press:AdaPress", PlanError, "AdaPress does more than to score tokens"),
        ("press:MergingPress()", PlanError, "MergingPress does more than to score tokens"),
        ("press:AdaPress(HiddenPress())", PlanError, "a press inside a press works on single heads"),
        ("press:HiddenPress(sign=", PlanError, "cannot read the score"),
        ("press:HiddenPress(size=3)", PlanError, "HiddenPress cannot be made: TypeError"),
        ("press:WrongPress", PolicyError, r"layer 0: the press WrongPress gave \[1\]; expected \[2, 2, 150\]"),
        ("press:FailingPress", PolicyError, "layer 0: the press FailingPress failed: ValueError: only for a batch of"),
    ],
)
def test_presses_that_cannot_be_driven_are_named(loaded, name, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        fill(loaded, MixedCache.from_plan(zipped(loaded.model, score=name), loaded.config), ids(150))
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_without_kvpress_it_is_said_how_to_install_it(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(PlanError, match=r"needs kvpress: .*pip install --no-deps kvpress"):
        MixedCache.from_plan(zipped(loaded.model, score="press:SnapKVPress(window_size=32)"), loaded.config)
