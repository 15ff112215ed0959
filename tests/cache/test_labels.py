"""Tokens of an image in an order of their own: before or after text, whatever the scores say."""

import pytest
import torch
from architectures import build
from composing import plan_for
from kvmix_kernels.sorted_tokens import EVICTED
from teaching import ids, teacher_forced

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.errors import CacheError
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares

FLUSH, SINK, DROPPED = 80, 4, 32
TOKENS = ids(200)
IMAGE = torch.zeros(2, 200, dtype=torch.bool)
IMAGE[0, 2:24] = True
IMAGE[1, 10:70] = True


@pytest.fixture(scope="module")
def model():
    built = build("llama", wide=True)
    built.set_attn_implementation("kvmix")
    return built


def cache_of(model, images="last", told=IMAGE, **more):
    policy = TokenPolicy(**{"evict": DROPPED / FLUSH, "flush": FLUSH, "images": images, **more})
    cache = MixedCache.from_plan(plan_for(model, {"tokens": policy}), model.config)
    if told is not None:
        cache.label(told)
    return cache


def tiers(cache):
    return cache.layers[0].stores[0].packing.view.tier


@pytest.mark.parametrize("steps", [[160], [60, 60, 40, 1], [90] + [1] * 6])
@pytest.mark.parametrize("images", ["first", "last", None])
def test_images_are_put_before_or_after_text(model, steps, images):
    """And among themselves both are in the order of their scores; prompts in parts are labelled as a whole."""
    plain, sorted_ = cache_of(model, None), cache_of(model, images)
    for cache in (plain, sorted_):
        teacher_forced(model, cache, TOKENS, steps)
    gone, without = tiers(sorted_) == EVICTED, tiers(plain) == EVICTED
    is_image = IMAGE[:, SINK : SINK + FLUSH]
    counts = is_image.sum(1).tolist()
    assert counts == [20, 60]
    expected = {"last": [20, DROPPED], "first": [0, DROPPED - 20]}
    for row in range(2):
        for head in range(2):
            of_image = int(gone[row, head][is_image[row]].sum())
            assert int(gone[row, head].sum()) == DROPPED
            if images is None:
                assert torch.equal(gone, without)
            else:
                assert of_image == expected[images][row]
    if images == "last":
        text = ~is_image[0].expand(2, -1) & without[0]
        assert (gone[0] & ~is_image[0]).sum() == 2 * (DROPPED - 20)
        assert ((gone[0] & ~is_image[0]) <= text).all(), "those of the least score are still the first to go"


def test_an_image_may_have_other_bits_than_text(model):
    """Text takes the wide tier: 60 % of the tokens, of which there are fewer of an image."""
    cache = cache_of(model, evict=0.0, tiers=(Tier(share=0.2, k=8, v=8),))
    teacher_forced(model, cache, TOKENS, [160])
    is_image = IMAGE[:, None, SINK : SINK + FLUSH].expand(2, 2, -1)
    assert not (is_image & (tiers(cache) == 0)).any()


def test_chunks_are_as_most_of_their_tokens_are(model):
    cache = cache_of(model, granularity=16)
    teacher_forced(model, cache, TOKENS, [160])
    gone = (tiers(cache) == EVICTED)[0].unflatten(1, (5, 16))
    assert (gone.all(-1) | ~gone.any(-1)).all()
    assert gone[:, 0].all()  # 4 to 20, an image; 20 to 36 is text but for 4 tokens


def test_groups_of_heads_are_told_as_well(model):
    """Each KV head is stored as a layer of its own."""
    plan = plan_for(model, {"tokens": TokenPolicy(evict=DROPPED / FLUSH, flush=FLUSH, images="last")})
    group = HeadGroup(heads=(1,), tokens=TokenShares(evict=0.8))
    layers = {index: layer.model_copy(update={"head_groups": (group,)}) for index, layer in plan.layers.items()}
    cache = MixedCache.from_plan(Plan.build(plan.model, layers, plan.cache), model.config)
    cache.label(IMAGE)
    teacher_forced(model, cache, TOKENS, [160])
    gone = [part.stores[0].packing.view.tier == EVICTED for _, part in cache.layers[0].groups]
    assert [each.shape[1] for each in gone] == [1, 1]
    assert [int(each[0].sum()) for each in gone] == [DROPPED, 64]
    assert all(each[0, 0][IMAGE[0, SINK : SINK + FLUSH]].all() for each in gone)


def test_what_nothing_was_told_of_is_text(model):
    silent, none = cache_of(model, told=None), cache_of(model, None, told=None)
    for cache in (silent, none):
        teacher_forced(model, cache, TOKENS, [160])
    assert torch.equal(tiers(silent), tiers(none))


def test_batches_taking_back_and_files(model, tmp_path):
    """Labels are of the rows that are kept, and of the tokens that are."""
    cache, other = cache_of(model), cache_of(model, told=IMAGE.flip(0))
    teacher_forced(model, cache, TOKENS, [70])
    teacher_forced(model, other, TOKENS.flip(0), [70])
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        for each in (cache, other):
            model(TOKENS[:, 70:90], past_key_values=each)
        cache.crop(-20)
        model(TOKENS[:, 70:90], past_key_values=cache)
        loaded = MixedCache.load(cache.save(tmp_path / "cache.safetensors", TOKENS[:, :90], model), cache.plan, model)
        for each in (cache, other, loaded):
            model(TOKENS[:, 90:120], past_key_values=each)
            model(TOKENS[:, 120:121], past_key_values=each)
    assert (tiers(cache) == EVICTED).any()
    assert torch.equal(tiers(cache), tiers(other))
    assert torch.equal(tiers(cache), tiers(loaded))


@pytest.mark.parametrize("context", [60, 150])
def test_labels_are_in_the_bytes_that_are_predicted(model, context):
    cache = cache_of(model)
    with torch.no_grad():
        plain = cache_of(model, None)
        for each in (cache, plain):
            model(TOKENS[:, :context], past_key_values=each)
            model(TOKENS[:, :1], past_key_values=each)  # packs what the prompt has left to pack
    predicted, without = (each.plan.cache_bytes(context, batch=2, element_bytes=4).total for each in (cache, plain))
    labels_of_one = 2 * len(cache.layers)
    assert cache.nbytes - plain.nbytes == predicted - without + labels_of_one > labels_of_one


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        (torch.zeros(2, 5), r"labels of images are torch.float32 \[2, 5\]; expected a boolean for each token"),
        (torch.zeros(5, dtype=torch.bool), r"\[5\]; expected"),
        (torch.zeros(3, 200, dtype=torch.bool), "layer 0 was told which tokens of 3 sequences .*, and was given 2"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(model, told, fault):
    with pytest.raises(CacheError, match=fault):
        teacher_forced(model, cache_of(model, told=told), TOKENS, [200])


def test_a_number_of_tokens_has_no_order_for_images():
    with pytest.raises(ValueError, match="images come first or last in an order of shares; leave out keep"):
        CacheSettings.model_validate({"page": 64, "tokens": {"flush": 128, "images": "last", "keep": 512}})
