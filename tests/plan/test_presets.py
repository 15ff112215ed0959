"""Presets: each loads, names its source, and amounts to what its comment says; how they are put on a cache."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from made_up import make_info
from with_moments import model_moments, profile_with_moments

from kvmix_cli.allocation import allocate, make_bases, preset_start
from kvmix_cli.errors import DocumentError, PlanError, StateError
from kvmix_cli.plan import Plan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.presets.preset import (
    LayerShare,
    Preset,
    by_depth,
    find_preset,
    has_preset,
    plan_of,
    presets,
    put_on,
    split,
)
from kvmix_cli.plan.settings import CacheSettings
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms
from kvmix_cli.plan.windows import Recent

NAMES = (
    "adakv",
    "asymkv",
    "balancekv",
    "block-gtq",
    "bumblebee",
    "cam",
    "chunkkv",
    "cocktail",
    "cq",
    "d2o",
    "eigen",
    "expected-attention",
    "h2o",
    "h2o-512",
    "higgs",
    "keydiff",
    "kitty",
    "kivi-2",
    "kivi-4",
    "kvarn",
    "kvcrush",
    "kvmerger",
    "kvmix-paper",
    "kvquant",
    "kvzip",
    "kvzip-heads",
    "leverage",
    "look-m",
    "mikv",
    "minikv",
    "mixkvq",
    "morphkv",
    "morphkv-512",
    "nsnquant",
    "oscar-tokens",
    "pqcache",
    "pyramidkv",
    "qaq",
    "quarot",
    "quest",
    "rotate-2",
    "shadowkv",
    "snapkv",
    "spectra",
    "streaming-512",
    "subgen",
    "tada",
    "tokenselect",
    "tova",
    "transform-2",
    "turboquant",
    "vecinfer",
    "vl-cache",
    "xquant",
    "zipcache",
    "zipvl",
)
SOLVED = ("block-gtq", "eigen", "spectra", "transform-2")
"""Their widths are decided from a profile."""
STATED = tuple(name for name in NAMES if name not in (*SOLVED, "cq"))
"""All others but the one whose codebooks a profile has."""
WIDTHS_ONLY = ("asymkv", "kivi-2", "kivi-4", "kvmix-paper", "kvquant", "xquant")
ENCODED = ("higgs", "kvarn", "nsnquant", "oscar-tokens", "quarot", "turboquant", "vecinfer")
TIERS = TokenPolicy(tiers=(Tier(share=0.2, k=8, v=8),), flush=160)
RUNS = ChannelPolicy(runs=(ChannelGroup(share=0.25, bits=4),), refresh=128)
ROTATED = Transforms(k=(Rotate(),), v=(Rotate(),))


def test_these_are_there():
    assert tuple(presets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_head_comment_names_source_and_differences(name):
    comment, _, body = presets()[name].read_text().partition("format: ")
    assert all(line.startswith("#") for line in comment.splitlines())
    assert re.search(r"arXiv \d{4}\.\d{4,5}|openreview \w+", comment)
    assert "Differs from" in comment
    assert "#" not in body


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_every_preset_fits_the_usual_heads(name, head_dim):
    plan = plan_of(name, make_info(32, head_dim=head_dim, stock={3: "sliding_attention"}))
    assert len(plan.layers) == 31
    assert plan.provenance == {"method": "preset", "preset": name}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("kvmix-paper", "0-5:k3v4,6-31:k2v2"),
        ("asymkv", "0-15:k2v1,16-31:k1v1"),
        ("kivi-4", "0-31:k4v4"),
        ("mikv", "0-31:k2v2"),
        ("h2o", "0-31:k16v16"),
    ],
)
def test_widths_by_layer(name, short):
    assert plan_of(name, make_info(32)).short == short


def test_the_paper_without_a_profile_costs_what_it_does_with_one():
    """`kvmix allocate --preset paper` gives K 2.19 and V 2.38 bits to 32 layers."""
    assert plan_of("kvmix-paper", make_info(32)).bits.nominal == (2.1875 + 2.375) / 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mikw", r"\(did you mean 'mikv'\?\)"),
        ("papr", r"\(did you mean 'paper'\?\)"),
        ("xyz", "known are adakv, asymkv, .* and kvtuner:FILE"),
    ],
)
def test_an_unknown_preset(name, hint):
    with pytest.raises(StateError, match=hint):
        find_preset(name)


def test_the_papers_preset_has_two_names():
    assert has_preset("paper")
    assert find_preset("paper") == find_preset("kvmix-paper")
    assert "paper" not in presets(), "each preset is listed once"


def test_the_papers_preset_states_what_allocate_starts_from():
    assert find_preset("paper").layer_share == LayerShare(0.2, k_bits=(2, 3), v_bits=(2, 4))
    assert [name for name in presets() if find_preset(name).layer_share] == ["kvmix-paper", "xquant"]


GOOD = """\
format: kvmix-preset/1
bits: {k: {first: 0.5, bits: 4, rest: 2}, v: 2}
cache: {page: 32, tokens: {evict: 0.5, flush: 64}}
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kvmix-preset/1", "kvmix-plan/1", ["line 1: format must be 'kvmix-preset/1', got 'kvmix-plan/1'"]),
        ("v: 2", "v: 5", ["line 2: bits.v: must be one of 1, 2, 3, 4, 8, 16, got 5"]),
        ("v: 2", "v: two", ["line 2: bits.v: "]),
        ("rest: 2", "rest: 7", ["line 2: bits.k.rest: must be one of 1, 2, 3, 4, 8, 16, got 7"]),
        (", rest: 2", "", ["line 2: bits.k: first and rest go together"]),
        ("first: 0.5", "first: 1.5", ["line 2: bits.k.first: should be less than or equal to 1, got 1.5"]),
        (", v: 2", "", ["line 2: 'bits.v' is missing"]),
        (
            "flush: 64",
            "flush: 100",
            ["line 3: cache.tokens: flush must be a multiple of the page of 32 tokens, got 100"],
        ),
        ("page: 32", "paeg: 32", ["line 3: unknown key 'cache.paeg'"]),
        (
            "cache:",
            "tokens: {evict: {first: 0.5, last: 1.5}}\ncache:",
            ["line 3: tokens.evict.last: should be less than"],
        ),
        ("cache:", "tokens: {evict: {first: 0.5}}\ncache:", ["line 3: 'tokens.evict.last' is missing"]),
        ("cache:", "tokens: {}\ncache:", ["line 3: tokens: must have either evict or keep"]),
    ],
)
def test_faults_of_a_preset_file(tmp_path, old, new, expected):
    path = tmp_path / "preset.yaml"
    path.write_text(GOOD)
    assert Preset.load(path).bits.k.at(1, 4) == 4
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(DocumentError) as error:
        Preset.load(path)
    assert len(error.value.faults) == len(expected), error.value.faults
    assert all(fault.startswith(start) for fault, start in zip(error.value.faults, expected, strict=True))


def test_a_preset_has_widths_or_a_method_with_its_budget(tmp_path):
    path = tmp_path / "preset.yaml"
    for text, expected in (
        ("method: transform", "method and avg_bits go together"),
        ("avg_bits: 2", "method and avg_bits go together"),
        ("bits: {k: 2, v: 2}\nmethod: transform\navg_bits: 2", "must have either bits, or method and avg_bits"),
        ("sink: 4", "unknown key 'sink'"),
        ("method: ilp\navg_bits: 2", "method: "),
        ("method: transform\navg_bits: 99", "avg_bits: "),
        ("method: transform\navg_bits: 2\ncode_bits: [7]", "code_bits"),
        ("method: transform\navg_bits: 2\ndirections: wind", "directions: "),
        ("bits: {k: 2, v: 2}\ndirections: variance", "directions and code_bits need a method"),
    ):
        path.write_text(f"format: kvmix-preset/1\n{text}\ncache: {{page: 32}}\n")
        with pytest.raises(DocumentError, match=expected):
            Preset.load(path)
    path.write_text("format: kvmix-preset/1\ncache: {page: 32}\n")
    with pytest.raises(DocumentError, match="must have either bits, or method and avg_bits"):
        Preset.load(path)


def test_a_preset_without_widths_says_what_makes_a_plan_of_it():
    with pytest.raises(PlanError, match="make a plan of it with --preset transform-2 of kvmix allocate"):
        plan_of("transform-2", make_info(4))


def test_kvtuners_presets(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n")
    assert plan_of(f"kvtuner:{path}", make_info(2)).short == "0:k8v4,1:k4v2"
    with pytest.raises(DocumentError, match="cannot be read"):
        plan_of("kvtuner:none.yaml", make_info(2))


@pytest.mark.parametrize(("name", "ends", "mean"), [("minikv", (0.3, 0.7), 0.5), ("pyramidkv", (976, 64), 516)])
def test_a_pyramid_falls_evenly_and_keeps_its_mean(name, ends, mean):
    layers = plan_of(name, make_info(32)).layers
    of = "evict" if name == "minikv" else "keep"
    found = [getattr(layer.tokens, of) for layer in layers.values()]
    assert (found[0], found[-1]) == pytest.approx(ends, abs=16 if of == "keep" else 0.05)
    assert sum(found) / 32 == pytest.approx(mean, abs=16 / 32)
    steps = [abs(one - other) for one, other in pairwise(found)]
    assert max(steps) <= (48 if of == "keep" else 0.051)


def test_a_pyramid_goes_with_the_layers_of_another_plan():
    plan = plan_of("kivi-4", make_info(4))
    both = by_depth(Plan.build(plan.model, plan.layers, put_on(plan.cache, "minikv", "it")), ["minikv"])
    assert [layer.tokens.evict for layer in both.layers.values()] == pytest.approx([0.3, 0.4, 0.55, 0.75], abs=0.051)
    assert both.short == "0-3:k4v4"
    assert both.bits.nominal == pytest.approx(2, abs=0.01)


def test_layers_at_both_ends_may_keep_all_tokens():
    shares = [layer.tokens.evict for layer in plan_of("d2o", make_info(6)).layers.values()]
    assert shares == [0.0, 0.0, 0.6, 0.6, 0.6, 0.0]
    with pytest.raises(ValueError, match=r"no layer is left between the first 2 and the last 1, .*: there are 3"):
        plan_of("d2o", make_info(3))


def test_a_budget_that_does_not_hold_the_window_cannot_be_put_on():
    cache = CacheSettings(window=Recent(tokens=2000))
    with pytest.raises(PlanError, match="keep is 512 tokens, and sinks and window alone are 2004; keep at least as"):
        put_on(cache, "h2o-512", "it")


class TestPuttingOn:
    """`with_axes`, and so every `A+B`."""

    def test_ones_own_settings_stay(self):
        mine = CacheSettings(page=32, sink=9, group_size=16)
        both = mine.with_axes(
            CacheSettings(page=64, sink=0, tokens=TIERS.model_copy(update={"flush": 320}), channels=RUNS)
        )
        assert both.plain == mine
        assert list(both.axes) == ["tokens", "channels"]

    def test_the_page_is_ones_own_if_it_fits(self):
        assert CacheSettings(page=128).with_axes(CacheSettings(page=32, channels=RUNS)).page == 128
        assert CacheSettings(page=128).with_axes(CacheSettings(page=32, tokens=TIERS)).page == 32
        assert CacheSettings(page=128).with_axes(CacheSettings(page=32, transforms=ROTATED)).page == 128

    def test_transforms_follow_ones_own(self):
        mine = CacheSettings(transforms=Transforms(k=(Balance(),), v=(Center(),)))
        both = mine.with_axes(CacheSettings(transforms=ROTATED)).transforms
        assert both == Transforms(k=(Balance(), Rotate()), v=(Center(), Rotate()))

    @pytest.mark.parametrize(
        ("mine", "other", "message"),
        [
            ({"tokens": TIERS}, {"tokens": TIERS}, "both sort tokens"),
            ({"channels": RUNS}, {"channels": RUNS}, "both sort channels"),
            ({"transforms": ROTATED}, {"transforms": ROTATED}, "both rotate keys"),
            ({"transforms": Transforms(v=(Rotate(seed=3),))}, {"transforms": ROTATED}, "both rotate values"),
            ({"tokens": TIERS}, {}, "has no transforms, tokens or channels"),
            (
                {"page": 96, "channels": RUNS.model_copy(update={"refresh": 96})},
                {"page": 64, "tokens": TokenPolicy(evict=0.5, flush=128)},
                "tokens: flush must be a multiple of the page of 96 tokens, got 128",
            ),
        ],
    )
    def test_what_does_not_go_together(self, mine, other, message):
        mine, other = CacheSettings(**{"page": 32, **mine}), CacheSettings(**{"page": 32, **other})
        with pytest.raises(ValueError, match=message):
            mine.with_axes(other)

    def test_the_error_says_what_was_put_on_what(self):
        cache = find_preset("mikv").cache
        with pytest.raises(PlanError, match="preset 'h2o' cannot be put on 'mikv': both sort tokens"):
            put_on(cache, "h2o", "'mikv'")

    @pytest.mark.parametrize("name", ENCODED)
    def test_page_codecs_are_put_on_nothing(self, name):
        with pytest.raises(PlanError, match="cannot be put on it: page codecs change what every width takes"):
            put_on(CacheSettings(), name, "it")

    @pytest.mark.parametrize("name", [name for name in STATED if name not in (*WIDTHS_ONLY, *ENCODED)])
    def test_every_method_goes_with_the_default_cache(self, name):
        on = find_preset(name).cache
        assert put_on(CacheSettings(), name, "it").axes == on.axes

    @pytest.mark.parametrize("name", (*WIDTHS_ONLY, *SOLVED))
    def test_widths_cannot_be_put_on_others(self, name):
        with pytest.raises(PlanError, match="only widths, which the plan has already"):
            put_on(CacheSettings(), name, "it")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ("a", ())),
        ("a+mikv", ("a", ("mikv",))),
        ("a+mikv+rotate-2", ("a", ("mikv", "rotate-2"))),
        ("a+b", ("a+b", ())),
        ("a+b+mikv", ("a+b", ("mikv",))),
    ],
)
def test_a_plan_whose_name_has_a_plus(given, expected):
    assert split(given, lambda name: name == "a+b") == expected


def test_what_is_put_on_must_be_a_preset():
    with pytest.raises(StateError, match="unknown preset 'mikw' \\(did you mean 'mikv'"):
        split("a+mikw", lambda name: False)


def shown_plan(name, info):
    """The plan of a preset; one that is solved has made-up directions, on which no bits depend."""
    if name in STATED:
        return plan_of(name, info)
    if name == "cq":
        return with_named_codebooks(find_preset(name)).plan(info, name)
    start, profile = preset_start(name), profile_with_moments(info)
    basis = make_bases(profile, model_moments(info), start.directions)
    return allocate(
        profile, start.budget, method=start.method, cache=start.cache, basis=basis, code_bits=start.code_bits
    )


def with_named_codebooks(preset):
    """A preset whose codecs name a file, of which bits depend on no number."""
    codecs = preset.cache.codecs.model_copy(update={"codebooks": "books.safetensors", "sha256": 64 * "0"})
    cache = preset.cache.model_copy(update={"codecs": codecs})
    return preset.model_copy(update={"cache": cache, "codebooks": None})


def test_low_rank_leaves_directions_out_and_codes_the_others_alike():
    plan = shown_plan("eigen", make_info(4, head_dim=64))
    tensors = [tensor for layer in plan.layers.values() for tensor, _ in layer.tensors]
    digits = {digit for tensor in tensors for digit in "".join(tensor.widths)}
    assert digits == {"0", "4"}
    assert plan.provenance["code_bits"] == [4]


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_code_computes():
    page = Path(__file__).parents[2] / "docs" / "presets.md"
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    table = {row[0]: row for row in rows if row and (row[0] in NAMES or row[0].startswith("kvtuner"))}
    assert set(table) == {*NAMES, "kvtuner:FILE"}
    for name in NAMES:
        shown = [shown_plan(name, make_info(32, head_dim=head_dim)).bits for head_dim in (64, 128)]
        assert table[name][3:] == [f"{bits.nominal:.2f} / {bits.stored:.2f}" for bits in shown], name
        source = re.search(r"\d{4}\.\d{4,5}|(?<=id=)\w+", table[name][2])
        assert source[0] in presets()[name].read_text()
