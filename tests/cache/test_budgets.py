"""Numbers of tokens to keep, and shares by layer: against H2O written plainly, in constant memory, as predicted."""

from types import SimpleNamespace

import pytest
import torch
from architectures import build
from composing import BUDGETS, plan_for
from teaching import changes_nothing, ids, swap_by_beams

from kvmix_cli.cache.attention import kvmix_attention
from kvmix_cli.cache.composed import ComposedLayer
from kvmix_cli.cache.layer import MixedLayer
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.store import ROLLBACK
from kvmix_cli.errors import PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares
from kvmix_cli.plan.transforms import Balance, Rotate, Transforms
from kvmix_cli.plan.windows import NoWindow, Recent

PAGE, SINK, WINDOW = 16, 4, 10


@pytest.fixture(scope="module")
def model():
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


def read(layer, keys, values, query):
    """Give a layer tokens, attend to all of it as a model would, and return the output `[B, S, H, D]`."""
    return kvmix_attention(SimpleNamespace(is_causal=True), query, *layer.update(keys, values), None)[0]


def single_layer(policy, bits=16, sink=0, window=None):
    settings = CacheSettings(page=PAGE, sink=sink, group_size=16, window=window or NoWindow(), tokens=policy)
    return ComposedLayer(0, LayerPlan.of_bits(bits, bits), settings)


class PlainHeavyHitters:
    """H2O for one KV head: of what is held, whole flushes leave the tail, and the smallest sums are dropped."""

    def __init__(self, kept, flush):
        self.kept, self.flush = kept, flush
        self.tail, self.held, self.sums, self.keys = [], [], {}, []

    def settle(self):
        while len(self.tail) >= self.flush:
            self.held += self.tail[: self.flush]
            del self.tail[: self.flush]
            self.held = sorted(self.held, key=self.sums.get, reverse=True)[: self.kept]

    def step(self, key, query):
        """Add a token, which attends to everything there is."""
        self.settle()
        self.tail.append(len(self.keys))
        self.keys.append(key)
        there = [*self.held, *self.tail]
        weights = (torch.stack([self.keys[token] for token in there]) @ query / query.shape[0] ** 0.5).softmax(0)
        for token, weight in zip(there, weights.tolist(), strict=True):
            self.sums[token] = self.sums.get(token, 0.0) + weight


def test_heavy_hitters_are_those_of_h2o():
    """A full-precision budget drops single tokens; sums go on while a token is kept."""
    torch.manual_seed(0)
    layer = single_layer(TokenPolicy(keep=32, flush=16))
    plain = [PlainHeavyHitters(32, 16) for _ in range(2)]
    keys, values, queries = (3 * torch.randn(1, 2, 100, 16, dtype=torch.float64) for _ in range(3))
    for at in range(100):
        now = slice(at, at + 1)
        read(layer, keys[:, :, now], values[:, :, now], queries[:, :, now])
        for head, each in enumerate(plain):
            each.step(keys[0, head, at], queries[0, head, at])
    kept = [set(row) for row in layer._tokens.sorted.view[0].tolist()]
    assert kept == [set(each.held) for each in plain]
    assert len(kept[0]) == 32
    assert kept[0] != kept[1], "each KV head keeps tokens of its own"


def test_the_last_queries_choose_again():
    """MorphKV: of what is held and what comes, the strongest attention from the last 32 queries decides."""
    torch.manual_seed(0)
    layer = single_layer(TokenPolicy(score="morphkv", keep=32, flush=32))
    keys, values, queries = (3 * torch.randn(1, 1, 129, 16, dtype=torch.float64) for _ in range(3))
    held, sums = [], []
    for at in range(129):
        now = slice(at, at + 1)
        if at and at % 32 == 0:  # a flush leaves the tail
            strongest = torch.stack(
                [torch.zeros(129, dtype=torch.float64).index_put((there,), row) for there, row in sums]
            )
            there = torch.tensor([*held, *range(at - 32, at)])
            held = there[strongest[-32:].amax(0)[there].topk(32).indices].tolist()
        read(layer, keys[:, :, now], values[:, :, now], queries[:, :, now])
        there = torch.tensor([*held, *range(at - at % 32, at + 1)])
        sums.append((there, (keys[0, 0, there] @ queries[0, 0, at] / 4).softmax(0)))
    assert sorted(layer._tokens.sorted.view[0, 0].tolist()) == sorted(held)
    assert max(held) >= 96
    assert min(held) < 96, "some tokens outlive a choice"


@pytest.mark.parametrize("score", ["morphkv", "snapkv", "tova"])
def test_what_the_last_queries_have_chosen_keeps_their_attention(score):
    """A choice right after another one, with no query between them, does not drop all that the first has kept."""
    torch.manual_seed(0)
    layer = single_layer(TokenPolicy(score=score, keep=32, flush=32))
    keys, values, queries = (torch.randn(1, 1, 128, 16, dtype=torch.float64) for _ in range(3))
    keys[:, :, 5] = 20 * torch.nn.functional.normalize(queries.mean(2) + 1, dim=-1)
    queries += 1
    read(layer, keys[:, :, :96], values[:, :, :96], queries[:, :, :96])
    for start in (96, 112):
        some = slice(start, start + 16)
        read(layer, keys[:, :, some], values[:, :, some], queries[:, :, some])
        assert 5 in layer._tokens.sorted.view[0, 0].tolist()
    assert layer._tokens.sorted_tokens == 96


@pytest.mark.parametrize("padding", [0, 25])
def test_nothing_changes_while_the_budget_holds_everything(model, padding):
    tokens, steps = ids(140), [90] + [1] * 6 + [44]
    plan = plan_for(model, {"tokens": TokenPolicy(keep=400, flush=32)})
    cache = MixedCache.from_plan(plan, model.config)
    changes_nothing(model, cache, tokens, steps, padding)


@pytest.mark.parametrize("bits", [16, 2])
def test_what_was_dropped_is_masked_where_it_was(bits):
    """The output is that of all tokens, the dropped ones masked at their places."""
    torch.manual_seed(1)
    layer = single_layer(TokenPolicy(keep=4 + 10 + 64, flush=32), bits, SINK, Recent(tokens=WINDOW))
    keys, values, queries = (torch.randn(2, 2, 300, 16, dtype=torch.float64) for _ in range(3))
    read(layer, keys[:, :, :299], values[:, :, :299], queries[:, :, :299])
    got = read(layer, keys[:, :, 299:], values[:, :, 299:], queries[:, :, 299:])[:, 0]
    tokens = layer._tokens
    there = torch.zeros(2, 2, tokens.sorted_tokens, dtype=torch.bool).scatter_(2, tokens.sorted.view.long(), True)
    assert (there.sum(2) == 64).all()
    there = torch.cat([there.new_ones(2, 2, SINK), there, there.new_ones(2, 2, 296 - tokens.sorted_tokens)], dim=2)
    scores = (keys @ queries[:, :, 299:].mT / 4).squeeze(-1).masked_fill(~there, -torch.inf)
    expected = (scores.softmax(-1)[..., None] * values).sum(2)
    error = (got - expected).abs().max()
    assert error < (1e-9 if bits == 16 else 1.5), "2-bit values of about 1 are off by less than a step"


def test_recency_is_a_longer_window():
    """StreamingLLM: with `recency` a budget keeps the sinks and the latest tokens, whole pages of them."""
    layer = single_layer(TokenPolicy(score="recency", keep=4 + 10 + 64, flush=32), 4, SINK, Recent(tokens=WINDOW))
    for count in (300, *[1] * 40):
        layer.update(*torch.randn(2, 1, 2, count, 16).unbind())
    packed = layer.stores[0].packed_tokens
    assert layer._tokens.sorted.view.sort(2).values.tolist() == [[list(range(packed - 64, packed))] * 2]


@pytest.mark.slow
def test_decoding_takes_constant_memory():
    """Bytes that are allocated, room to grow included, over a thousand tokens."""
    layer = single_layer(TokenPolicy(score="recency", keep=4 + 10 + 64, flush=32), 2, SINK, Recent(tokens=WINDOW))
    layer.update(*torch.randn(2, 1, 2, 200, 16).unbind())
    allocated = []
    for _ in range(1000):
        layer.update(*torch.randn(2, 1, 2, 1, 16).unbind())
        allocated.append(layer.allocated_bytes)
    assert max(allocated[100:200]) == max(allocated[200:]), "as soon as buffers have room for a flush"
    assert layer.get_seq_length() == 1200
    assert layer.stores[0].segments().kept_tokens <= 4 + 10 + 64 + 32


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 3])
def test_decoding_by_attention_takes_constant_memory(bits):
    layer = single_layer(TokenPolicy(keep=4 + 10 + 64, flush=32), bits, SINK, Recent(tokens=WINDOW))
    read(layer, *torch.randn(3, 1, 2, 200, 16).unbind())
    allocated = []
    for _ in range(1000):
        read(layer, *torch.randn(3, 1, 2, 1, 16).unbind())
        allocated.append(layer.allocated_bytes)
    assert max(allocated[100:200]) == max(allocated[200:])


def test_only_the_prompt_is_cut():
    """`when: prompt`: what is decoded stays, and taking back its first token leaves no trace."""
    policy = TokenPolicy(score="recency", keep=14 + 32, when="prompt", flush=32)
    cropped, straight = (single_layer(policy, 4, SINK, Recent(tokens=WINDOW)) for _ in range(2))
    prompt, later = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 70, 16)
    for layer in (cropped, straight):
        layer.update(prompt, prompt)
    cropped.update(later[:, :, :1], later[:, :, :1])
    cropped.crop(-1)
    for layer in (cropped, straight):
        for at in range(70):
            layer.update(*[later[:, :, at : at + 1]] * 2)
    key, other = (layer.stores[0].segments() for layer in (cropped, straight))
    assert key.kept_tokens == key.shape[2] - (160 - 32), "of 160 tokens of the prompt that had left the window"
    assert (key.packed.positions == other.packed.positions).all()
    assert cropped.nbytes == straight.nbytes


def test_shares_of_the_prompt_only():
    """Later tokens have the layer's own bits, and none of them is evicted."""
    tier = Tier(share=0.25, k=8, v=8)
    policy = TokenPolicy(score="recency", tiers=(tier,), evict=0.5, when="prompt", flush=64)
    layer = single_layer(policy, 2)
    for count in (128 + ROLLBACK, *[1] * 65):
        layer.update(*torch.randn(2, 1, 2, count, 16).unbind())
    tiers = layer._tokens.sorted.view[0, 0]
    assert [(tiers[:192] == tier).sum().item() for tier in (0, 1, 255)] == [48, 48, 96]
    assert tiers[192:].tolist() == [1] * 64


def test_beams_reorder_what_is_kept():
    policy = BUDGETS["budget"]["tokens"]
    one, other = (single_layer(policy, 4, SINK, Recent(tokens=WINDOW)) for _ in range(2))
    prompt, step = torch.randn(3, 2, 2, 200, 16).unbind(), torch.randn(3, 2, 2, 1, 16).unbind()
    read(one, *prompt)
    swap_by_beams(one)
    read(other, *(states.flip(0) for states in prompt))
    for _ in range(40):  # past a flush
        got, expected = read(one, *step), read(other, *step)
    torch.testing.assert_close(got, expected)
    with pytest.raises(PlanError, match=r"layer 0 keys: the cache cannot go back .* without `evict` and `keep`"):
        one.crop(-100)


def test_going_back_before_anything_was_dropped(model):
    """Positions of pages that are not full of neighbours are put in order."""
    plan = plan_for(model, {"tokens": TokenPolicy(keep=400, flush=32)})
    cache, fresh = MixedCache.from_plan(plan, model.config), unquantized_cache(model.config)
    tokens = ids(300)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.crop(-200)
        model(tokens[:, :100], past_key_values=fresh)
        logits = [model(ids(60, seed=3), past_key_values=each).logits for each in (cache, fresh)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
        logits = [model(ids(1, seed=4), past_key_values=each).logits for each in (cache, fresh)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


CHANNELS = ChannelPolicy(score="magnitude", runs=(ChannelGroup(channels=16, bits=4),))
TURNED = Transforms(k=(Rotate(), Balance()), v=(Rotate(),))


@pytest.mark.parametrize(
    ("k", "v", "axes"),
    [
        (16, 16, {}),
        (16, 2, {}),
        (2, 4, {"channels": CHANNELS, "transforms": TURNED}),
        (2, 3, {"score": "recency"}),
        (2, 3, {"keep": 14}),
        (2, 3, {"when": "prompt"}),
        (2, 3, {"score": "normalised"}),
        (2, 3, {"score": "morphkv"}),
        (16, 16, {"score": "tova"}),
        (2, 3, {"score": "key-norm"}),
    ],
)
def test_predicted_bytes_of_a_budget_are_measured_bytes(model, k, v, axes):
    axes = dict(axes)
    names = ("score", "keep", "when")
    policy = TokenPolicy(**{"keep": 14 + 64, **{name: axes.pop(name) for name in names if name in axes}}, flush=32)
    plan = plan_for(model, {"tokens": policy, **axes}, k, v)
    check_bytes(model, plan, 200, policy)


def test_predicted_bytes_of_shares_by_layer_are_measured_bytes(model):
    policy = TokenPolicy(tiers=(Tier(share=0.25, k=8, v=4),), evict=0.25, flush=64)
    plan = plan_for(model, {"tokens": policy}, 2, 4)
    own = [TokenShares(evict=0.0, tiers=(0.0,)), TokenShares(evict=0.5), TokenShares(tiers=(0.5,))]
    layers = {i: layer.model_copy(update={"tokens": own[i % 3]}) for i, layer in plan.layers.items()}
    plan = Plan.build(plan.model, layers, plan.cache)
    cache = check_bytes(model, plan, 300, policy)
    assert type(cache.layers[0]) is MixedLayer, "a layer that sorts nothing has no statistics"
    kept = [layer.stores[0].segments().kept_tokens for layer in cache.layers]
    assert kept[0] == 301
    assert kept[1] < kept[0]


def check_bytes(model, plan, context, policy):
    """Compare the bytes of a context and one decoded token with the prediction; return the cache."""
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(ids(context), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    predicted = plan.cache_bytes(context, 2, 4).total + 2 * plan.unquantized_bytes(1, element_bytes=4)
    of_one_token = 2 * 4 * policy.statistics.numbers(plan.model.kv_heads, context)
    assert predicted <= cache.nbytes <= predicted + 2 * of_one_token * len(plan.layers)
    return cache


def test_a_pyramid_keeps_by_layer(model):
    """`keep` by layer, and a layer that keeps everything."""
    plan = plan_for(model, {"tokens": TokenPolicy(keep=14 + 64, flush=32)}, 4, 4)
    own = {0: TokenShares(keep=14 + 32), 1: TokenShares(evict=0.0)}
    layers = {i: layer.model_copy(update={"tokens": own.get(i)}) for i, layer in plan.layers.items()}
    plan = Plan.build(plan.model, layers, plan.cache)
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(ids(300), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    kept = [layer.stores[0].segments().packed.kept for layer in cache.layers]
    assert kept[0] == 32
    assert kept[1] > 200


def test_widths_of_one_tensor_in_full_precision():
    """Pages of the packed tensor are dropped from the unpacked one too."""
    layer = single_layer(TokenPolicy(score="recency", keep=4 + 10 + 32, flush=32), 16, SINK, Recent(tokens=WINDOW))
    layer = ComposedLayer(0, LayerPlan(k=TensorPlan(bits=16), v=TensorPlan(bits=4)), layer.settings)
    keys = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 2, 300, 16)
    layer.update(keys, keys)
    layer.update(keys[:, :, :1], keys[:, :, :1])
    held = layer.stores[0].segments().packed
    assert (held.held[0][..., 0] == held.positions + SINK).all()
