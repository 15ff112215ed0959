"""Memory and speed on GPUs: bytes of one GPU against a cache of its heads, the formula by hand, and its limits."""

import math

import pytest
import torch
from architectures import build
from coding import coded_plan
from scale_page import PAGE, PUBLISHED, SHAPES, facts_of, published_table, written

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.errors import BudgetError
from kvmix_cli.models.activations import activation_sizes
from kvmix_cli.models.geometry import model_info
from kvmix_cli.models.stock import stock_cache
from kvmix_cli.models.weight_bytes import WeightBytes
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import Recent
from kvmix_cli.studies.fit.facts import ModelFacts
from kvmix_cli.studies.fit.formats import PlanFormat, StockFormat, VllmFormat, other_formats
from kvmix_cli.studies.fit.gpus import GPUS, Gpu
from kvmix_cli.studies.fit.roofline import NETWORK, USABLE, GpuGroup, Roofline

BATCH, PROMPT = 2, 75
SETTINGS = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=10))
SLOW = Gpu("a test", memory=10**9, bandwidth=1e9, flops=1e12, fp8_flops=2e12, link=1e7)


def group(count, key="h100"):
    return GpuGroup(key, GPUS[key], count)


def read(config):
    layers = stock_cache(config, "m")
    sizes = activation_sizes(config, layers)
    return ModelFacts(model_info(config, "m"), layers, WeightBytes({}, "nowhere"), sizes, None, "bfloat16")


@pytest.fixture(scope="module")
def small():
    """A llama with 4 KV heads, as its configuration has it."""
    config = build("llama", torch.bfloat16).config
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 32
    return config


def of_rank(config, count):
    """The configuration of what one of several GPUs holds."""
    half = type(config)(**config.to_dict())
    half.num_attention_heads = half.num_key_value_heads = 4 // count
    return half


@pytest.mark.parametrize("count", [1, 2, 4])
def test_bytes_of_a_gpu_are_those_of_a_cache_of_its_heads(small, count):
    """Keys and values of all heads are cut into parts, and every part goes into a cache as a rank would make it."""
    facts = read(small)
    widths = ",".join(f"{layer}:k{(3, 4)[layer % 2]}v{(8, 2)[layer % 2]}" for layer in range(facts.info.layers))
    plan = Plan.from_short(widths, facts.info, SETTINGS)
    form = PlanFormat("plan", facts, 2, None, plan=plan)
    roofline = Roofline(facts, group(count), 0)
    rank_config = of_rank(small, count)
    rank_plan = Plan.from_short(widths, model_info(rank_config, "m"), SETTINGS)
    states = torch.randn(2, BATCH, 4, PROMPT, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = BATCH * facts.info.layers * (4 // count) * 2 * 32 * 2  # the token after the prompt, which starts the packing
    for rank in range(count):
        cache = MixedCache.from_plan(rank_plan, rank_config)
        keys, values = states[:, :, rank * 4 // count : (rank + 1) * 4 // count]
        for layer in range(facts.info.layers):
            cache.update(keys, values, layer)
            cache.update(keys[:, :, :1], values[:, :, :1], layer)
        assert cache_nbytes(cache) - one == roofline.cache_bytes(form, PROMPT, BATCH)
    assert roofline.cache_bytes(form, PROMPT, BATCH) * count == form.cache_bytes(PROMPT, BATCH)


def test_more_gpus_than_heads_repeat_them(small):
    facts = read(small)
    form = StockFormat("own", facts, 2, None)
    assert [
        Roofline(facts, group(count), 0).cache_bytes(form, 64, 1) * min(count, 4) for count in (1, 2, 4, 8, 16)
    ] == [form.cache_bytes(64, 1)] * 5
    assert (group(8).copies(facts.info.heads(0)), group(4).copies(facts.info.heads(0))) == (2, 1)


def test_heads_that_cannot_be_shared_are_refused(small):
    facts = read(small)
    with pytest.raises(BudgetError, match=r"--tp 3 neither divides 4 KV heads .* use 1, 2, 4, 8$"):
        Roofline(facts, group(3), 0).row(StockFormat("own", facts, 2, None), 64, 1)


def test_a_gpu_that_has_wider_transform_codes_is_the_one_that_counts(tmp_path):
    model = build("llama", torch.float32)
    model.set_attn_implementation("kvmix")
    facts, plan = read(model.config), coded_plan(model, tmp_path, exact=1)
    heads = facts.info.heads(0).kv_heads
    form = PlanFormat("plan", facts, 4, None, plan=plan)
    roofline = Roofline(facts, group(heads), 0)
    of_ranks = list(roofline._of_ranks(form, 200, 1))
    assert len(of_ranks) == heads > 1
    assert sum(of_ranks) == form.cache_bytes(200, 1)
    assert roofline.cache_bytes(form, 200, 1) == max(of_ranks)
    assert Roofline(facts, group(2 * heads), 0).cache_bytes(form, 200, 1) == max(of_ranks)


def test_the_formula_by_hand():
    """Llama 3.1 8B in bf16 on one H100: 16.06 GB of weights and 1 GiB of cache at 8,192 tokens, at 3.35 TB/s."""
    facts = facts_of(SHAPES["8B"])
    assert facts.weights.parameters == 8_030_261_248
    form = VllmFormat("bf16", facts, 2, None, number_bytes=2)
    roofline = Roofline(facts, group(1), facts.weights.total)
    seconds, bound = roofline.step(form, 8192, 1)
    assert seconds == pytest.approx((2 * 8_030_261_248 + 2**30) / 3.35e12, rel=1e-9)
    assert bound == "memory"
    twice = Roofline(facts, group(1), facts.weights.total, is_fp8=True).prefill_seconds(8192) * 1979 / 989
    assert roofline.prefill_seconds(8192) == pytest.approx(twice)
    assert roofline.prefill_seconds(8192) == pytest.approx(
        (2 * 8_030_261_248 * 8192 + 2 * 4096 * 32 * 8192**2) / 989e12, rel=1e-9
    )


def test_what_a_step_waits_for():
    facts = facts_of(SHAPES["8B"])
    form = VllmFormat("bf16", facts, 2, None, number_bytes=2)
    slow = Roofline(facts, GpuGroup("slow", SLOW, 8), facts.weights.total)
    links = 4 * 32 * 7 / 8 * 64 * 4096 * 2 / SLOW.link
    reads = (facts.weights.total / 8 + 64 * 2**17 * 16 / 8) / SLOW.bandwidth
    assert slow.step(form, 16, 64) == (pytest.approx(reads + links), "links")
    many = Roofline(facts, group(1), facts.weights.total)
    assert many.step(form, 16, 4096)[1] == "products"
    far = Roofline(facts, group(16), facts.weights.total)
    assert far.group.link == NETWORK
    assert far.step(form, 16, 1)[0] > Roofline(facts, group(8), facts.weights.total).step(form, 16, 1)[0] / 2


@pytest.mark.parametrize("name", ["8B", "70B", "405B"])
@pytest.mark.parametrize("context", [2**13, 2**20])
def test_the_largest_batch_and_context_are_the_largest_that_fit(name, context):
    facts = facts_of(SHAPES[name])
    weights = facts.weights.at("float8")
    roofline = Roofline(facts, group(8, "h200"), weights)
    plan = PlanFormat("three", facts, 2, None, plan=Plan.uniform(facts.info, 3, 3))
    room = USABLE * 141e9
    for form in (VllmFormat("bf16", facts, 2, None, number_bytes=2), plan):
        row = roofline.row(form, context, 1)
        assert roofline.total_bytes(form, context, row.max_batch + 1) > room
        assert row.max_batch == 0 or roofline.total_bytes(form, context, row.max_batch) <= room
        assert roofline.total_bytes(form, row.max_context, 1) <= room
        assert row.fits is (row.total_bytes <= room)
        assert row.tokens_per_s == 1 / row.step_seconds
        assert row.max_tokens_per_s is None or row.max_tokens_per_s >= row.tokens_per_s * 0.99


def test_llama_cpp_does_not_split_heads():
    facts = facts_of(SHAPES["8B"])
    form = other_formats(facts, 2, None)[-1]
    assert Roofline(facts, group(2), 0).row(form, 64, 1) is None
    assert Roofline(facts, group(1), 0).row(form, 64, 1) is not None


def test_gpus_are_such_as_their_vendors_describe():
    for key in GPUS:
        gpu = GPUS[key]
        assert 24e9 <= gpu.memory <= 300e9
        assert 0.5e12 < gpu.bandwidth < 10e12
        assert 100e12 < gpu.flops <= gpu.fp8_flops <= 2.1 * gpu.flops < 5000e12
        assert math.isclose(gpu.memory / 1e9, round(gpu.memory / 1e9))
    with pytest.raises(BudgetError, match=r"unknown GPU 'h10' \(did you mean 'h100'\?\); known are a100, h100"):
        GPUS["h10"]


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_the_code_says():
    """`make scale` writes them."""
    page = PAGE.read_text()
    assert written(page) == page


def test_no_published_figure_is_beyond_its_bound():
    shares = [int(row[-1].rstrip("%")) for row in list(published_table())[1:]]
    assert len(shares) == len(PUBLISHED)
    assert all(30 <= share <= 100 for share in shares)
