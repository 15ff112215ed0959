"""Transforms, tokens and channels in plan files: written as they are set, read back, refused with every fault."""

from pathlib import Path

import pytest
from hypothesis import given
from made_up import composed_plans, make_info, patient

from kvmix_cli.errors import DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Rotate, Transforms

TIERS = TokenPolicy(tiers=(Tier(share=0.2, k=8, v=8),), flush=160)
RUNS = ChannelPolicy(runs=(ChannelGroup(share=0.25, bits=4),), refresh=64)
GOOD = """\
format: kvmix-plan/1
model: {id: org/model, layers: 4, kv_heads: 2, head_dim: 64}
cache:
  page: 32
  group_size: 32
  transforms: {k: [{kind: balance}, {kind: rotate, seed: 3}], v: [{kind: center}]}
  tokens: {tiers: [{share: 0.2, k: 8, v: 8}], evict: 0.2, flush: 160}
  channels: {score: magnitude, runs: [{share: 0.25, bits: 4}], refresh: 64}
layers: "0-3:k2v2"
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return Plan.load(path)

    return load


@pytest.mark.slow
@patient
@given(composed_plans())
def test_what_is_written_is_read_back(tmp_path_factory, plan):
    path = plan.save(tmp_path_factory.mktemp("plans") / "plan.yaml")
    again = Plan.load(path)
    assert again == plan
    assert again.sha256 == plan.sha256
    assert again.to_yaml() == plan.to_yaml()


def test_only_what_is_set_is_written():
    cache = CacheSettings(page=32, tokens=TIERS, transforms=Transforms(k=(Balance(), Rotate())))
    text = Plan.uniform(make_info(2), 2, 2, cache).to_yaml()
    assert "transforms: {k: [{kind: balance}, {kind: rotate}]}" in text
    assert "tokens: {tiers: [{share: 0.2, k: 8, v: 8}], flush: 160}" in text
    assert "channels" not in text


def test_a_plan_without_axes_says_nothing_of_them():
    plan = Plan.uniform(make_info(2), 2, 2)
    assert not {"transforms", "tokens", "channels"} & set(plan.model_dump()["cache"])
    assert plan.cache.axes == {}


def test_plans_of_before_there_were_axes_keep_their_checksum():
    """So that evaluations of them can be resumed."""
    plan = Plan.load(Path(__file__).parents[2] / "profiles" / "builtin--tiny" / "plans" / "rank-2.3.yaml")
    assert plan.sha256 == "349a94ecd113e3ffe3411e82de70ceb35aef0f6ef8ed18ede315b45bc43546d1"


def test_every_axis_is_part_of_what_a_plan_decides():
    """Another seed, another flush: another plan."""
    caches = [
        CacheSettings(page=32),
        CacheSettings(page=32, transforms=Transforms(k=(Rotate(),))),
        CacheSettings(page=32, transforms=Transforms(k=(Rotate(seed=1),))),
        CacheSettings(page=32, tokens=TIERS),
        CacheSettings(page=32, tokens=TIERS.model_copy(update={"flush": 320})),
        CacheSettings(page=32, channels=RUNS),
    ]
    assert len({Plan.uniform(make_info(2), 2, 2, cache).sha256 for cache in caches}) == len(caches)


def test_the_example_loads(load):
    plan = load(GOOD)
    assert plan.cache.tokens.shares == pytest.approx((0.2, 0.6, 0.2))
    assert plan.cache.channels.widths(64) == (16, 48)
    keys, values = 0.2 * 8 + 0.6 * (16 * 4 + 48 * 2) / 64, 0.2 * 8 + 0.6 * 2
    assert plan.bits.nominal == pytest.approx((keys + values) / 2)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "flush: 160",
            "flush: 100",
            ["line 7: cache.tokens: flush must be a multiple of the page of 32 tokens, got 100"],
        ),
        (
            "flush: 160",
            "flush: 64",
            ["line 7: cache.tokens: shares of a flush of 64 tokens are not whole pages of 32; use a flush of 160"],
        ),
        (
            "evict: 0.2",
            "evict: 0.8",
            ["line 7: cache.tokens: shares 0.2 and 0.8 to evict leave nothing for the layer's"],
        ),
        ("evict: 0.2", "evict: 1.5", ["line 7: cache.tokens.evict: should be less than 1, got 1.5"]),
        ("share: 0.2, k: 8", "share: 0, k: 8", ["line 7: cache.tokens.tiers.0.share: should be greater than 0, got 0"]),
        ("share: 0.2, k: 8", "share: 0.2, k: 5", ["line 7: cache.tokens.tiers.0.k: must be one of 1, 2, 3, 4, 8, 16"]),
        ("share: 0.2, k: 8, v: 8", "share: 0.2, k: 8", ["line 7: 'cache.tokens.tiers.0.v' is missing"]),
        ("flush: 160", "flush: 1048608", ["line 7: cache.tokens.flush: should be less than or equal to 1048576"]),
        (
            "refresh: 64",
            "refresh: 1048608",
            ["line 8: cache.channels.refresh: should be less than or equal to 1"],
        ),
        (
            "share: 0.25, bits",
            "channels: 272, bits",
            ["line 8: cache.channels.runs.0.channels: should be less than"],
        ),
        (
            "seed: 3",
            "seed: 9223372036854775808",
            ["line 6: cache.transforms.k.1.seed: should be less than 9223372"],
        ),
        (
            "[{kind: center}]",
            f"[{', '.join(['{kind: center}'] * 17)}]",
            ["line 6: cache.transforms.v: value should have at most 16 items"],
        ),
        ("evict: 0.2", "evit: 0.2", ["line 7: unknown key 'cache.tokens.evit'"]),
        ("tiers: [{share: 0.2, k: 8, v: 8}], evict: 0.2, ", "", ["line 7: cache.tokens: a token policy needs tiers"]),
        ("refresh: 64", "refresh: 48", ["line 8: cache.channels: refresh must be a multiple of the page of 32 tokens"]),
        (
            "refresh: 64",
            "refresh: -1",
            ["line 8: cache.channels.refresh: should be greater than or equal to 0, got -1"],
        ),
        (
            "share: 0.25, bits",
            "channels: 64, bits",
            ["line 8: cache.channels: runs of 64 channels do not fit heads of 64: each run, and the channels that"],
        ),
        (
            "share: 0.25, bits",
            "channels: 20, bits",
            ["line 8: cache.channels: runs of 20 channels do not fit heads of 64"],
        ),
        ("share: 0.25, bits", "bits", ["line 8: cache.channels.runs.0: a run needs either channels or a share"]),
        ("bits: 4", "bits: 6", ["line 8: cache.channels.runs.0.bits: must be one of 1, 2, 3, 4, 8, 16, got 6"]),
        ("runs: [{share: 0.25, bits: 4}]", "runs: []", ["line 8: cache.channels.runs: a channel policy needs runs"]),
        ("kind: center", "kind: centre", ["line 6: cache.transforms.v.0: input tag 'centre' found using 'kind' does"]),
        ("seed: 3", "seed: -3", ["line 6: cache.transforms.k.1.seed: should be greater than or equal to 0, got -3"]),
        ("kind: balance", "kind: balance, by: q", ["line 6: unknown key 'cache.transforms.k.0.by'"]),
        (
            "head_dim: 64",
            "head_dim: 512",
            ["line 8: cache.channels: channels can be sorted in heads of up to 256, not"],
        ),
    ],
)
def test_faults_are_named_with_their_line(load, old, new, expected):
    assert old in GOOD
    with pytest.raises(DocumentError) as error:
        load(GOOD.replace(old, new, 1))
    found = list(error.value.faults)
    assert len(found) == len(expected), found
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True)), found


def test_all_faults_at_once(load):
    text = (
        GOOD.replace("flush: 160", "flush: 100")
        .replace("refresh: 64", "refresh: 48")
        .replace("share: 0.25", "channels: 64")
    )
    text = text.replace("layers: 4", "layers: 5")
    with pytest.raises(DocumentError) as error:
        load(text)
    assert [fault[:25] for fault in error.value.faults] == [
        "line 7: cache.tokens: flu",
        "line 8: cache.channels: r",
        "line 8: cache.channels: r",
        "line 9: no entry for laye",
    ]


@pytest.mark.parametrize(
    ("cache", "head_dim", "message"),
    [
        ({"channels": RUNS}, 16, "do not fit heads of 16"),
        ({"channels": RUNS}, 512, "up to 256"),
    ],
)
def test_a_plan_that_is_built_is_checked_too(cache, head_dim, message):
    with pytest.raises(PlanError, match=message):
        Plan.uniform(make_info(2, head_dim=head_dim), 2, 2, CacheSettings(page=32, **cache))


OWN = """\
format: kvmix-plan/1
model: {id: org/model, layers: 3, kv_heads: 2, head_dim: 64}
cache: {page: 32, group_size: 32, sink: 4, window: {kind: recent, tokens: 60}, tokens: {evict: 0.5, flush: 128}}
bits: {nominal: 1.3333, stored: 2.0417}
layers:
  0: {k: {bits: 2}, v: {bits: 2}, tokens: {evict: 0.25}}
  1: {k: {bits: 2}, v: {bits: 2}, tokens: {evict: 0.75}}
  2: {k: {bits: 2}, v: {bits: 2}, tokens: {evict: 0.0}}
"""
"""A layer that keeps everything has no tier map: (0.75 + 0.25 + 1) / 3 of 3 bits, and two maps of 1/16."""
KEPT = (
    OWN.replace("tokens: {evict: 0.5, flush", "tokens: {keep: 512, flush")
    .replace("1.3333", "2.0")
    .replace("2.0417", "3.1667")
)
KEPT = KEPT.replace("evict: 0.25", "keep: 64").replace("evict: 0.75", "keep: 1024")


def test_shares_by_layer(load):
    plan = load(OWN)
    assert [layer.settings(plan.cache).tokens for layer in plan.layers.values()] == [
        TokenPolicy(evict=0.25, flush=128),
        TokenPolicy(evict=0.75, flush=128),
        None,
    ]
    assert load(plan.to_yaml()) == plan
    assert plan.short == "0-2:k2v2"
    assert len(plan.spans) == 3
    assert "2: {k: {bits: 2}, v: {bits: 2}, tokens: {evict: 0.0}}" in plan.to_yaml()


def test_numbers_to_keep_by_layer(load):
    """Bits are those of a kept token, with 32 bits of its position."""
    plan = load(KEPT)
    kept = [layer.settings(plan.cache).kept for layer in plan.layers.values()]
    assert kept == [0, 960, None]
    assert load(plan.to_yaml()).sha256 == plan.sha256


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        (
            OWN,
            "evict: 0.25",
            "evict: 0.3",
            "line 6: layers.0.tokens: shares of a flush of 128 tokens are not whole pages",
        ),
        (OWN, "evict: 0.25", "evict: 1.25", "line 6: layers.0.tokens.evict: should be less than 1, got 1.25"),
        (
            OWN,
            "evict: 0.25",
            "tiers: [0.25]",
            "line 6: layers.0.tokens: tiers must be 0 shares, as cache.tokens has tiers",
        ),
        (
            OWN,
            "evict: 0.25",
            "keep: 64",
            "line 6: layers.0.tokens: cache.tokens has shares, not a number of tokens to keep",
        ),
        (OWN, "{evict: 0.25}", "{}", "line 6: layers.0.tokens: a layer's tokens need shares of tiers"),
        (
            OWN,
            "{evict: 0.25}",
            "{evict: 0.25, keep: 9}",
            "line 6: layers.0.tokens: a number of tokens to keep goes with",
        ),
        (OWN, ", tokens: {evict: 0.5, flush: 128}}", "}", "line 6: layers.0.tokens: there is no token policy"),
        (
            OWN,
            "{evict: 0.5, flush",
            "{evict: 0.5, keep: 512, flush",
            "line 3: cache.tokens: a number of tokens to keep goes",
        ),
        (KEPT, "keep: 64", "keep: 63", "line 6: layers.0.tokens: keep is 63 tokens, and sinks and window alone are 64"),
        (KEPT, "keep: 64", "evict: 0.5", "line 6: layers.0.tokens: cache.tokens has a number of tokens to keep"),
        (KEPT, "keep: 512", "keep: 9", "line 3: cache.tokens: keep is 9 tokens, and sinks and window alone are 64"),
        (KEPT, "kind: recent, tokens: 60", "kind: rpc", "line 3: cache.tokens: keep needs a window of a fixed size"),
        (KEPT, "keep: 512", "keep: 512, when: never", "line 3: cache.tokens.when: should be 'always' or 'prompt'"),
        (
            KEPT,
            "tokens: {keep",
            "channels: {runs: [{channels: 16, bits: 4}], refresh: 32}, tokens: {keep",
            "line 3: cache.tokens: keep drops pages, so channels must be sorted once",
        ),
    ],
)
def test_faults_of_a_layers_own_tokens(load, text, old, new, expected):
    assert old in text
    with pytest.raises(DocumentError) as error:
        load(text.replace(old, new, 1))
    assert error.value.faults[0].startswith(expected), error.value.faults


def test_tiers_of_a_layer_that_claim_too_much(load):
    text = OWN.replace("evict: 0.5, flush", "tiers: [{share: 0.25, k: 8, v: 8}], evict: 0.5, flush")
    with pytest.raises(
        DocumentError, match=r"layers\.0\.tokens: shares 0\.75 and 0\.25 to evict leave nothing for the"
    ):
        load(text.replace("{evict: 0.25}", "{evict: 0.25, tiers: [0.75]}"))
