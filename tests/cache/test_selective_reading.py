"""Decoded tokens that read the best pages only: in real models, with padding, beams, crops, files and head groups."""

import pytest
import torch
from architectures import build
from coding import coded_plan
from kvmix_kernels.pages import Coded
from page_choices import summary_of
from teaching import ids, teacher_forced

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.reading import SelectiveReading
from kvmix_cli.plan.tokens import TokenPolicy
from kvmix_cli.plan.transforms import Rotate, Transforms
from kvmix_cli.plan.windows import Recent, Rpc

STEPS = [180, *[1] * 12]


@pytest.fixture(scope="module")
def llama():
    """Grouped queries, wide heads, under our attention."""
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


def plan_for(model, reading, layer=None, **settings):
    info = model_info(model.config, "test")
    cache = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=16), reading=reading, **settings)
    return Plan.build(info, dict.fromkeys(info.quantizable, layer or LayerPlan.of_bits(8, 8)), cache)


def logits_of(model, plan, mask=None, steps=STEPS):
    cache = MixedCache.from_plan(plan, model.config)
    return teacher_forced(model, cache, ids(sum(steps)), steps, mask), cache


def test_all_pages_is_the_ordinary_path_bit_for_bit(llama):
    plain, _ = logits_of(llama, plan_for(llama, None))
    for reading in (SelectiveReading(share=1.0), SelectiveReading(tokens=4096, summary="range", sharing="layer")):
        assert torch.equal(logits_of(llama, plan_for(llama, reading))[0], plain)


def test_skipped_layers_read_everything(llama):
    plain, _ = logits_of(llama, plan_for(llama, None))
    layers = llama.config.num_hidden_layers
    assert torch.equal(logits_of(llama, plan_for(llama, SelectiveReading(tokens=16, skip=layers)))[0], plain)


@pytest.mark.parametrize("kind", ["mean", "range", "codes"])
def test_more_pages_come_nearer_to_all(llama, kind):
    plain, _ = logits_of(llama, plan_for(llama, None))
    errors = []
    for tokens in (16, 64, 128):
        some, cache = logits_of(llama, plan_for(llama, SelectiveReading(tokens=tokens, summary=kind)))
        errors.append((some - plain)[:, 180:].norm().item())
        assert cache.attended.share < 1
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_plan_reads_the_pages_of_its_summaries_under_transforms(llama):
    turned = Transforms(k=(Rotate(),), v=(Rotate(),))
    plan = plan_for(llama, SelectiveReading(tokens=64), transforms=turned)
    plain, _ = logits_of(llama, plan_for(llama, None, transforms=turned))
    some, cache = logits_of(llama, plan)
    assert not torch.equal(some, plain)
    packed = cache.layers[0].stores[0].segments().packed
    means = summary_of(packed.held.select(0, packed.pages, torch.float32), "mean")
    assert (packed.summary - means).abs().max() < 0.05  # of 8-bit codes


def test_left_padding_changes_nothing(llama):
    """A sequence with a padded one beside it reads what it reads alone."""
    plan, tokens = plan_for(llama, SelectiveReading(tokens=48)), ids(192)
    mask = torch.ones(2, 192, dtype=torch.long)
    mask[1, :40] = 0
    both = teacher_forced(llama, MixedCache.from_plan(plan, llama.config), tokens, STEPS, mask)
    alone = teacher_forced(llama, MixedCache.from_plan(plan, llama.config), tokens[:1], STEPS)
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)
    assert both.isfinite().all()


def test_a_crop_and_beams_take_summaries_along(llama):
    plan, tokens = plan_for(llama, SelectiveReading(tokens=48)), ids(192)
    cache, fresh = (MixedCache.from_plan(plan, llama.config) for _ in range(2))
    teacher_forced(llama, cache, tokens[:, :180], [150, 30])
    cache.crop(-30)
    cache.reorder_cache(torch.tensor([1, 0]))
    teacher_forced(llama, fresh, tokens[[1, 0], :150], [150])
    got, expected = (teacher_forced(llama, each, tokens[[1, 0], 150:], [1] * 12) for each in (cache, fresh))
    torch.testing.assert_close(got, expected)
    cache.crop(-70)  # opens pages again
    teacher_forced(llama, cache, tokens[:, :70], [70])
    for layer in cache.layers:
        packed = layer.stores[0].segments().packed
        means = summary_of(packed.held.select(0, packed.pages, torch.float32), "mean")
        assert packed.summary.shape == means.shape
        assert (packed.summary - means).abs().max() < 0.05


def test_codes_are_of_the_nearest_entries_also_after_crops_and_beams(llama):
    """Of the codebooks of the prompt, whatever was taken back since; a sequence keeps its own."""
    plan, tokens = plan_for(llama, SelectiveReading(tokens=48, summary="codes")), ids(192)
    cache = MixedCache.from_plan(plan, llama.config)
    teacher_forced(llama, cache, tokens[:, :180], [120, *[1] * 60])
    before = cache.layers[0].stores[0].segments().packed
    cache.crop(-70)
    cache.reorder_cache(torch.tensor([1, 0]))
    teacher_forced(llama, cache, tokens[[1, 0], 110:190], [80])
    packed = cache.layers[0].stores[0].segments().packed
    assert torch.equal(packed.books, before.books[[1, 0]])
    keys = packed.held.select(0, packed.pages, torch.float32)
    parts = keys.unflatten(-1, (2, 16)).movedim(4, 2)
    distances = torch.cdist(parts.flatten(3, 4), packed.books)
    chosen = distances.gather(-1, packed.summary.movedim(4, 2).flatten(3).long()[..., None])[..., 0]
    assert (chosen - distances.amin(-1)).max() < 0.05  # of 8-bit codes


@pytest.mark.parametrize("kind", ["range", "codes"])
def test_a_file_has_the_summaries(llama, tmp_path, kind):
    plan, tokens = plan_for(llama, SelectiveReading(tokens=32, summary=kind)), ids(192)
    cache = MixedCache.from_plan(plan, llama.config)
    teacher_forced(llama, cache, tokens[:, :180], [180])
    path = cache.save(tmp_path / "cache.safetensors", tokens[:, :180], llama)
    again = MixedCache.load(path, plan, llama)
    assert torch.equal(
        teacher_forced(llama, again, tokens[:, 180:], [1] * 5), teacher_forced(llama, cache, tokens[:, 180:], [1] * 5)
    )


def test_predicted_bytes_are_measured_bytes(llama):
    more = {"mean": 0.5, "range": 1, "codes": 0.25}  # numbers of 16 bits a page of 16 keys; two bytes a key of 32
    for kind, stored in more.items():
        plan = plan_for(llama, SelectiveReading(tokens=32, summary=kind))
        _, cache = logits_of(llama, plan, steps=[300, 1])
        predicted = plan.cache_bytes(300, batch=2, element_bytes=4).total
        assert cache.nbytes == predicted + 2 * plan.unquantized_bytes(1, element_bytes=4)
        assert plan.bits.stored == plan_for(llama, None).bits.stored + stored


def test_transform_codes_with_exact_tokens(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=1)
    with_reading = {
        share: plan.model_copy(
            update={"cache": plan.cache.model_copy(update={"reading": SelectiveReading(share=share)})}
        )
        for share in (0.4, 1.0)
    }
    plain, _ = logits_of(llama, plan)
    assert torch.equal(logits_of(llama, with_reading[1.0])[0], plain)
    some, cache = logits_of(llama, with_reading[0.4])
    assert isinstance(cache.layers[0].stores[0].segments().packed.held, Coded)
    assert 0 < (some - plain)[:, 180:].norm() < plain[:, 180:].norm()


def test_head_groups_choose_by_themselves(llama):
    group = HeadGroup(heads=(1,), k=LayerPlan.of_bits(4, 4).k, v=LayerPlan.of_bits(4, 4).v)
    layer = LayerPlan.of_bits(8, 8).model_copy(update={"head_groups": (group,)})
    plain, _ = logits_of(llama, plan_for(llama, None, layer))
    assert torch.equal(logits_of(llama, plan_for(llama, SelectiveReading(share=1.0), layer))[0], plain)
    some, cache = logits_of(llama, plan_for(llama, SelectiveReading(tokens=32), layer))
    assert not torch.equal(some, plain)
    assert cache.attended.share < 1


def test_layers_of_16_bits_read_everything(llama):
    plan = plan_for(llama, SelectiveReading(tokens=16), LayerPlan.of_bits(8, 16))
    plain = plan_for(llama, None, LayerPlan.of_bits(8, 16))
    assert torch.equal(logits_of(llama, plan)[0], logits_of(llama, plain)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": TokenPolicy(evict=0.5, flush=32)}, "tokens are sorted, and pages are read"),
        ({"channels": ChannelPolicy(runs=(ChannelGroup(channels=16, bits=8),))}, "channels are sorted, and pages"),
        ({"window": Rpc()}, "keys and values must leave the window together"),
        ({"reading": SelectiveReading(tokens=16), "page": 32}, "tokens is 16, less than one page of 32"),
    ],
)
def test_what_cannot_be_combined_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CacheSettings(**{"page": 16, "reading": SelectiveReading(tokens=64), **settings})


@pytest.mark.parametrize("settings", [{}, {"tokens": 64, "share": 0.5}])
def test_a_reading_has_one_size(settings):
    with pytest.raises(ValueError, match="either tokens or a share"):
        SelectiveReading(**settings)


def test_a_preset_is_put_on_a_plan_and_not_twice(llama):
    plain, quest = plan_for(llama, None).cache, plan_for(llama, SelectiveReading(tokens=64)).cache
    assert plain.with_axes(quest).reading == quest.reading
    with pytest.raises(ValueError, match="both choose the pages"):
        quest.with_axes(quest)
