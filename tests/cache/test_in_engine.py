"""Plans as a serving engine holds them: which it can hold, what differs, and a cache that reads what it would read."""

from pathlib import Path

import pytest
import torch
from architectures import build
from coding import CodedReferenceLayer, coded_plan
from evaluating import tiny
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.quantize import naive
from made_up import make_info
from teaching import ids

from kvmix_cli.cache.blocks import block_layer, bytes_per_token
from kvmix_cli.cache.in_engine import EngineBaseline, TokenwiseCache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, PlanError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.engine_blocks import check_blocks, losses_in_blocks
from kvmix_cli.plan.tensors.basis import BasisFile
from kvmix_cli.plan.transforms import Balance, Transforms
from kvmix_cli.plan.windows import NoWindow
from kvmix_cli.studies.baselines import baseline_subjects, check_baselines

ROPE = 1 / 10_000 ** (torch.arange(8) / 8)
TOKENS = 80  # more than a frame


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    model.set_attn_implementation("kvmix")
    return model


def states(info, seed=0):
    """Keys and values `[2, H_kv, TOKENS, D]` of a layer."""
    heads = info.heads(0)
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, heads.kv_heads, TOKENS, heads.key_dim, generator=draw)


def test_affine_tokens_are_those_of_pages_of_values(llama):
    info = model_info(llama.config, "test")
    plan = Plan.from_short("0-3:k3v2", info, CacheSettings(group_size=16))
    cache = TokenwiseCache.from_plan(plan)
    given = states(info)
    for kind, bits, back in zip(("keys", "values"), (3, 2), cache.update(*given, 0), strict=True):
        layout = PageLayout("value", bits, info.head_dim, TOKENS, 16)
        pages = given[0 if kind == "keys" else 1].unflatten(2, (1, TOKENS))
        expected = naive.dequantize(*naive.quantize(pages, layout), layout).flatten(2, 3)
        torch.testing.assert_close(back, expected, rtol=0, atol=1e-6)


def test_transform_codes_are_those_of_the_reference(llama, tmp_path):
    """Tokens of both frames; scalar arithmetic in float64 says what each is."""
    plan = coded_plan(llama, tmp_path, rope=ROPE)
    given = states(plan.model)
    cache = TokenwiseCache.from_plan(plan)
    first = cache.update(*given[..., :50, :], 0)
    back = cache.update(*given[..., 50:, :], 0)
    assert torch.equal(first[0], back[0][:, :, :50]), "tokens are stored once"
    basis = BasisFile.load(Path(plan.cache.transform.basis))
    reference = CodedReferenceLayer(plan.layers[0], plan.cache, basis, 0)
    for kind, got, tokens in zip("kv", back, given, strict=True):
        for at in (0, 49, 50, 63, 64, 79):
            expected = reference._coded(kind, tokens[:1, :, at].double(), at)
            torch.testing.assert_close(got[:1, :, at].double(), expected, rtol=0, atol=2e-3)  # float16 scales


@pytest.mark.parametrize("parts", [(40, 40), (1,) * 12 + (68,)])
def test_it_makes_no_difference_how_a_prompt_is_split(llama, parts):
    """Quantized at once and read back by itself, a prompt attends to the same tokens in any parts."""
    plan = Plan.from_short("0-3:k4v4", model_info(llama.config, "test"), CacheSettings(group_size=16))
    prompt = ids(80)
    with torch.no_grad():
        whole = llama(prompt, past_key_values=TokenwiseCache.from_plan(plan)).logits[:, -1]
        cache = TokenwiseCache.from_plan(plan)
        for part in prompt.split(parts, dim=1):
            last = llama(part, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-9)  # float64
    assert cache.attended.share == 1


def test_ranks_share_the_heads_of_a_layer(llama, tmp_path):
    """What two ranks store are the heads of one; both take the bytes of the larger."""
    plan = coded_plan(llama, tmp_path, v=4, rope=ROPE)
    info = plan.model
    keys = torch.randn(TOKENS, info.kv_heads, info.head_dim, dtype=torch.float64)
    positions = torch.arange(TOKENS)
    whole = block_layer(plan, 0, 16, torch.float64)
    halves = [block_layer(plan, 0, 16, torch.float64, (rank, 2)) for rank in range(2)]
    for name in ("keys", "values"):
        one = getattr(whole, name).round_trip(keys, positions)
        two = [
            getattr(half, name).round_trip(part, positions) for half, part in zip(halves, keys.chunk(2, 1), strict=True)
        ]
        torch.testing.assert_close(torch.cat(two, 1), one, rtol=0, atol=1e-9)
    assert bytes_per_token(plan, 0, 16, torch.float64, 2) == max(half.bytes_per_token for half in halves)
    assert sum(half.keys.nbytes + half.values.nbytes for half in halves) == whole.nbytes


def test_bytes_of_a_block_are_the_bits_of_the_plan():
    info = make_info(2, head_dim=128)
    plan = Plan.from_short("0:k4v2,1:k16v3", info, CacheSettings(group_size=64))
    assert bytes_per_token(plan, 0, 128, torch.bfloat16) == 128 * (4 + 2) / 8 + 4 * 4
    assert bytes_per_token(plan, 1, 128, torch.bfloat16) == 128 * (16 + 3) / 8 + 2 * 4
    row = EngineBaseline("in-engine", plan)
    assert row.nominal_bits == plan.bits.nominal
    assert row.stored_bits == pytest.approx((16 + 4 + 2 + 3 + 4 * 0.5 - 0.5) / 4, abs=0.01)


def test_what_an_engine_holds_otherwise_is_said():
    plan = Plan.from_short("0-3:k4v4,4-7:k16v4", make_info())
    assert losses_in_blocks(plan) == [
        "keys of 4 layers in groups along channels, not tokens",
        "no sink of 4",
        "no window (recent:128)",
    ]
    bare = CacheSettings(sink=0, window=NoWindow())
    affine = Plan.from_short("0-7:k4v4", make_info(), CacheSettings(sink=1, window=NoWindow()))
    assert losses_in_blocks(affine)[1:] == ["no sink of 1"]
    assert losses_in_blocks(Plan.from_short("0-7:k16v4", make_info(), bare)) == []


def test_exact_tokens_are_said_to_be_missing(llama, tmp_path):
    assert losses_in_blocks(coded_plan(llama, tmp_path, exact=2))[-1] == "no exact tokens (2 a page)"


def refused(match, plan, block=128, ranks=1):
    with pytest.raises(PlanError, match=match) as error:
        check_blocks(plan, block, ranks)
    assert "\n" not in str(error.value)


def test_plans_that_no_engine_can_hold_are_refused_with_all_reasons(llama, tmp_path):
    info = make_info(stock={1: "sliding_attention"}, head_dim=80)
    plan = Plan.from_short("0-7:k4v4", info, CacheSettings(transforms=Transforms(k=(Balance(),))))
    refused("has transforms, .* layers 1 keep .* blocks of 24 tokens", plan, block=24)
    refused("has 2 KV heads, which 4 ranks do not divide", Plan.from_short("0-7:k4v4", make_info()), ranks=4)
    plan = coded_plan(llama, tmp_path, rope=ROPE)
    refused("frames of 64 positions are no whole blocks of 128 tokens", plan)
    with pytest.raises(PlanError, match=r"layer 0 cannot be held .* multiples of 16 channels, got 24"):
        block_layer(Plan.from_short("0-7:k4v4", make_info(), CacheSettings(group_size=24)), 0, 128, torch.float32)


def test_the_baseline_is_the_first_plan_in_an_engine():
    loaded = tiny()
    plan = Plan.uniform(loaded.info, 4, 4)
    check_baselines(["in-engine"])
    (subject,) = baseline_subjects(["in-engine"], loaded, {"mine": plan}, 0)
    assert isinstance(subject, Subject)
    assert subject.bits == (4, pytest.approx(4.5))
    assert isinstance(subject.cache(loaded.config, 10), TokenwiseCache)
    with pytest.raises(EvaluationError, match="in-engine needs a plan to be made of: give one with --plan"):
        baseline_subjects(["in-engine"], loaded, {}, 0)
