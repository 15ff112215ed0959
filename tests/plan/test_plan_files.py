"""Plan files: what is written is read back, and every fault is reported with its line, all of them at once."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import make_info, patient, plans

from kvmix_cli.errors import DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan
from kvmix_cli.plan.forms import ANY_HEAD, storage_forms
from kvmix_cli.plan.windows import Rpc

GOOD = """\
# kvmix allocate --avg-bits 3
format: kvmix-plan/1
model: {id: org/model, layers: 4, kv_heads: 2, head_dim: 64}
provenance: {method: rank}
bits: {nominal: 2.875, stored: 3.375}
cache: {page: 128, sink: 4, group_size: 64, scale_dtype: float16, window: {kind: recent, tokens: 128}}
layers:
  0: {k: {bits: 3}, v: {bits: 4}}
  1: {k: {bits: 2}, v: {bits: 4}}
  2: {k: {bits: 2}, v: {bits: 2}}
  3: {k: {bits: 2}, v: {bits: 4}}
"""


@pytest.fixture
def load(tmp_path):
    """Load a plan from text; faults without the path, which the error begins with."""

    def load(text, encoding="utf-8"):
        path = tmp_path / "plan.yaml"
        path.write_bytes(text.encode(encoding))
        return Plan.load(path)

    return load


def faults(load, text):
    with pytest.raises(DocumentError) as error:
        load(text)
    assert "\n" not in str(error.value)
    return list(error.value.faults)


def changed(old, new, text=GOOD):
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.slow
@patient
@given(plans(12))
def test_what_is_written_is_read_back(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    plan.save(path, "kvmix allocate\n--odd \x1b\u2028 line")
    assert Plan.load(path) == plan
    assert Plan.load(path).sha256 == plan.sha256
    assert plan.to_yaml("x") == Plan.load(path).to_yaml("x")


@pytest.mark.slow
@patient
@given(plans(12), st.randoms(use_true_random=False))
def test_equal_plans_have_equal_checksums_in_whatever_order_they_were_written(tmp_path_factory, plan, draw):
    def shuffled(items):
        return dict(draw.sample(list(items), len(items)))

    window = plan.cache.window
    if isinstance(window, Rpc):
        window = Rpc(ratio=shuffled(window.ratio.items()))
    model = ModelInfo(**{**dict(plan.model), "stock": shuffled(plan.model.stock.items())})
    cache = CacheSettings(**{**dict(plan.cache), "window": window})
    other = Plan.build(model, shuffled(plan.layers.items()), cache)
    assert (other.sha256, other.short) == (plan.sha256, plan.short)
    assert Plan.load(other.save(tmp_path_factory.mktemp("plans") / "plan.yaml")).sha256 == plan.sha256


@pytest.mark.parametrize(
    "revision", ["\x85", "a\u2028b", "\u2029", "a\nb", "a\r\nb ", "\ufeff", "\x00\x1b", "été", "1:30", "no"]
)
def test_text_of_every_kind_survives_a_file(tmp_path, revision):
    plan = Plan.uniform(make_info(1).model_copy(update={"revision": revision}), 2, 2)
    assert Plan.load(plan.save(tmp_path / "plan.yaml")).sha256 == plan.sha256


def test_a_ratio_of_minus_zero_is_zero():
    """Equal numbers are written alike, so that equal plans have one checksum."""
    first, second = (Plan.uniform(make_info(1), 2, 2, CacheSettings(window=Rpc(ratio={2: z}))) for z in (0.0, -0.0))
    assert first == second
    assert first.sha256 == second.sha256


@pytest.mark.slow
@patient
@given(plans(20))
def test_short_form_says_the_same_widths(plan):
    again = Plan.from_short(plan.short, plan.model, plan.cache)
    assert {n: (layer.k.bits, layer.v.bits) for n, layer in again.layers.items()} == {
        n: (layer.k.bits, layer.v.bits) for n, layer in plan.layers.items()
    }


def test_the_example_loads(load):
    plan = load(GOOD)
    assert plan.short == "0:k3v4,1:k2v4,2:k2v2,3:k2v4"
    assert plan.bits.nominal == 2.875


def test_paper_window_and_stock_layers_survive_a_file(load):
    info = make_info(3, stock={1: "sliding_attention"})
    layer = LayerPlan(k=TensorPlan(bits=2), v=TensorPlan(bits=2, group_size="row"))
    plan = Plan.build(info, {0: layer, 2: layer}, CacheSettings(window=Rpc(ratio={2: 0.3})))
    assert load(plan.to_yaml()) == plan


def test_bits_may_be_rounded_in_a_file(load):
    assert load(changed("nominal: 2.875", "nominal: 2.88")).bits.nominal == 2.88


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kvmix-plan/1", "kvmix-plan/2", ["line 2: format must be 'kvmix-plan/1', got 'kvmix-plan/2'"]),
        ("format: kvmix-plan/1\n", "", ["line 2: 'format' is missing; it must be 'kvmix-plan/1'"]),
        ("page: 128", "paeg: 128", ["line 6: unknown key 'cache.paeg'"]),
        ("page: 128", "page: 100", ["line 6: cache.page: should be a multiple of 16, got 100"]),
        ("page: 128", "page: 0", ["line 6: cache.page: should be greater than or equal to 16, got 0"]),
        ("page: 128", "page: 65552", ["line 6: cache.page: should be less than or equal to 65536, got 65552"]),
        ("sink: 4", "sink: -1", ["line 6: cache.sink: should be greater than or equal to 0, got -1"]),
        (
            "sink: 4",
            "sink: 2147483648",
            ["line 6: cache.sink: should be less than or equal to 1048576, got 21474836"],
        ),
        ("sink: 4", "sink: 1:30", ["line 6: cache.sink: should be a valid integer, got '1:30'"]),
        (
            "size: 64",
            "size: 65537",
            ["line 6: cache.group_size: must be at most 65536, or 'row' for one group per"],
        ),
        ("tokens: 128", "tokens: 1048577", ["line 6: cache.window.tokens: should be less than or equal to 1048576"]),
        (
            "{kind: recent, tokens: 128}",
            "{kind: rpc, ratio: {5: 0.1}}",
            ["line 6: cache.window.ratio: ratios are"],
        ),
        (
            "kv_heads: 2",
            "kv_heads: 65537",
            ["line 3: model.kv_heads: should be less than or equal to 65536"],
        ),
        (
            "head_dim: 64",
            "head_dim: 65552",
            ["line 3: model.head_dim: should be less than or equal to 65536"],
        ),
        (
            "head_dim: 64}",
            "head_dim: 64, stock: {4: sliding_attention}}",
            ["line 3: layer 4 cannot keep a stock cache: the model has layers 0-3"],
        ),
        ("size: 64", "size: 4", ["line 6: cache.group_size: must be a number of at least 8 or 'row', got 4"]),
        ("size: 64", "size: col", ["line 6: cache.group_size: must be a number of at least 8 or 'row', got 'col'"]),
        ("size: 64", "size: true", ["line 6: cache.group_size: must be a number of at least 8 or 'row', got True"]),
        ("float16", "float32", ["line 6: cache.scale_dtype: should be 'float16' or 'bfloat16', got 'float32'"]),
        ("tokens: 128", "tokens: -1", ["line 6: cache.window.tokens: should be greater than or equal to 0, got -1"]),
        ("tokens: 128", "ratio: {2: 1.5}", ["line 6: unknown key 'cache.window.ratio'"]),
        ("tokens: 128", "tokns: 128", ["line 6: unknown key 'cache.window.tokns' (did you mean 'tokens'?)"]),
        ("{kind: recent, tokens: 128}", "{kind: rpc, ratio: {2: 1.5}}", ["line 6: cache.window.ratio: ratios must be"]),
        ("{kind: recent, tokens: 128}", "{kind: rpc, ratio: {2: .nan}}", ["line 6: cache.window.ratio: ratios must"]),
        ("nominal: 2.875", "nominal: 2", ["line 5: bits.nominal is 2 but the layers amount to 2.8750"]),
        ("nominal: 2.875", "nominal: .nan", ["line 5: bits.nominal is nan but the layers amount to 2.8750"]),
        ("stored: 3.375", "stored: 9", ["line 5: bits.stored is 9 but the layers amount to 3.3750"]),
        ("head_dim: 64", "head_dim: 40", ["line 3: head_dim must be a positive multiple of 16, got 40: " + ANY_HEAD]),
        ("id: org/model", "id: ''", ["line 3: model.id: string should have at least 1 character"]),
        ("layers: 4", "layers: 0", ["line 3: model.layers: should be greater than or equal to 1, got 0"]),
        ("layers: 4", "layers: 100000", ["line 3: model.layers: should be less than or equal to 10000, got 100000"]),
        ("id: org/model, ", "", ["line 3: 'model.id' is missing"]),
        ("  3: {k", "  4: {k", ["line 7: no entry for layer 3", "line 11: layer 4 cannot be planned: the model has"]),
        ("  3: {k: {bits: 2}, v: {bits: 4}}\n", "", ["line 7: no entry for layer 3"]),
        ("  3: {k", "  -1: {k", ["line 7: no entry for layer 3", "line 11: layer -1 cannot be planned"]),
        ("  3: {k", "  three: {k", ["line 11: the key layers.three: should be a valid integer, got 'three'"]),
        ("  3: {k", "  2: {k", ["line 11: '2' is given twice"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: 5}", ["line 8: layers.0.k.bits: must be one of 1, 2, 3, 4, 8, 16, got 5"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: .nan}", ["line 8: layers.0.k.bits: should be a valid integer, got nan"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: '3'}", ["line 8: layers.0.k.bits: should be a valid integer, got '3'"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: true}", ["line 8: layers.0.k.bits: should be a valid integer, got True"]),
        ("0: {k: {bits: 3}, v", "0: {v", ["line 8: 'layers.0.k' is missing"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: 3, x: 1}", ["line 8: unknown key 'layers.0.k.x'"]),
        ("0: {k: {bits: 3}", "0: {k: {bits: [3]}", ["line 8: layers.0.k.bits: should be a valid integer, got a list"]),
    ],
)
def test_faults_are_named_with_their_line(load, old, new, expected):
    found = faults(load, changed(old, new))
    assert len(found) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True)), found


def test_all_faults_at_once(load):
    text = changed("page: 128", "paeg: 128")
    text = changed("0: {k: {bits: 3}", "0: {k: {bits: 7}", text)
    text = changed("1: {k: {bits: 2}, v", "1: {v", text)
    text = changed("  3: {k", "  9: {k", text)
    assert faults(load, text) == [
        "line 6: unknown key 'cache.paeg' (did you mean 'page'?)",
        "line 7: no entry for layer 3",
        "line 8: layers.0.k.bits: must be one of 1, 2, 3, 4, 8, 16, got 7",
        "line 9: 'layers.1.k' is missing",
        "line 11: layer 9 cannot be planned: the model has layers 0-3",
    ]


def test_a_stock_layer_cannot_be_planned(load):
    text = changed("head_dim: 64}", "head_dim: 64, stock: {1: sliding_attention}}")
    assert "line 9: layer 1 cannot be planned: it keeps its sliding_attention cache" in faults(load, text)


def test_a_long_value_is_not_quoted_in_full(load):
    (fault,) = faults(load, changed("0: {k: {bits: 3}", f"0: {{k: {{bits: {'x' * 5000}}}"))
    assert len(fault) < 200


def test_layers_in_the_short_form(load):
    head = GOOD[: GOOD.index("bits:")]
    plan = load(head + 'layers: "0:k3v4,1-3:k2v2"\n')
    assert plan.short == "0:k3v4,1-3:k2v2"
    assert plan.bits.nominal == 2.375
    stated = load(head + 'bits: {nominal: 2.375, stored: 2.875}\nlayers: "0:k3v4,1-3:k2v2"\n')
    assert stated == plan


@pytest.mark.parametrize(
    ("short", "fault"),
    [
        ("0-2:k2v2", "no entry for layer 3"),
        ("0-4:k2v2", "layer 4 cannot be planned"),
        ("0-3:k2v5", "must be one of 1, 2, 3, 4, 8, 16, got 5"),
        ("0-3:k2", "'0-3:k2' is not of the form FIRST-LAST:kBITSvBITS"),
        ("0-2:k2v2,2-3:k2v2", "layer 2 is given twice"),
        ("3-0:k2v2", "'3-0:k2v2' ends before it begins"),
        ("", "'' is not of the form"),
        ("0-99999999:k2v2", "is not of the form"),
    ],
)
def test_a_faulty_short_form(load, short, fault):
    head = GOOD[: GOOD.index("provenance:")]
    assert any(fault in each for each in faults(load, f'{head}layers: "{short}"\n'))
    with pytest.raises(PlanError, match=None) as error:
        Plan.from_short(short, make_info(4))
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_short_form_with_a_faulty_model(load):
    assert faults(load, 'format: kvmix-plan/1\nmodel: {id: x}\nlayers: "0-3:k2v2"\n') == [
        "line 2: 'model.head_dim' is missing",
        "line 2: 'model.kv_heads' is missing",
        "line 2: 'model.layers' is missing",
    ]


def test_short_form_may_cover_stock_layers():
    assert Plan.from_short("0-3:k4v4", make_info(4, stock={1: "sliding_attention"})).short == "0:k4v4,2-3:k4v4"


class TestKvTuner:
    """The presets of KVTuner (arXiv 2502.04420)."""

    TEXT = "0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n"

    @pytest.fixture
    def read(self, tmp_path):
        def read(text, **options):
            path = tmp_path / "preset.yaml"
            path.write_text(text)
            return Plan.from_kvtuner(path, make_info(2, **options))

        return read

    def test_loads(self, read):
        plan = read(self.TEXT)
        assert plan.short == "0:k8v4,1:k4v2"
        assert plan.provenance == {"method": "kvtuner"}

    def test_may_cover_stock_layers(self, read):
        assert read(self.TEXT, stock={0: "sliding_attention"}).short == "1:k4v2"

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("nbits_key: 4", "nbits_key: 5", "line 2: 1.nbits_key: must be one of 1, 2, 3, 4, 8, 16, got 5"),
            ("nbits_key: 4", "nbits_key: .nan", "line 2: 1.nbits_key: must be one of 1, 2, 3, 4, 8, 16, got nan"),
            ("nbits_key: 4", "nbits_key: {}", "line 2: 1.nbits_key: must be one of 1, 2, 3, 4, 8, 16, got {}"),
            ("1: {", "7: {", "line 2: layer 7 cannot be planned: the model has layers 0-1"),
            ("nbits_key: 4", "key: 4", "line 1: not a KVTuner preset"),
        ],
    )
    def test_faults(self, read, old, new, expected):
        with pytest.raises(DocumentError) as error:
            read(self.TEXT.replace(old, new))
        assert any(fault.startswith(expected) for fault in error.value.faults)


@pytest.mark.parametrize(
    "change", [{"layers": 5}, {"kv_heads": 4}, {"head_dim": 128}, {"stock": {0: "sliding_attention"}}]
)
def test_a_plan_for_another_model_says_what_differs(change):
    plan = Plan.uniform(make_info(4), 2, 2)
    other = make_info(4, model_id="org/other").model_copy(update=change)
    with pytest.raises(PlanError, match="made for org/model, not for org/other") as error:
        plan.check_model(other)
    assert next(iter(change)) in str(error.value)


def test_a_plan_fits_a_copy_of_its_model_under_another_name():
    Plan.uniform(make_info(4), 2, 2).check_model(make_info(4, model_id="./copy"))


def test_a_plan_for_the_same_shape_and_another_configuration():
    ours, theirs = (make_info(4).model_copy(update={"config_sha256": digest}) for digest in ("aa", "bb"))
    with pytest.raises(PlanError, match=r"same layers, but another configuration \(checksum \w+ against \w+\)"):
        Plan.uniform(ours, 2, 2).check_model(theirs)


ENCODED = """\
format: kvmix-plan/1
model: {id: org/model, layers: 2, kv_heads: 2, head_dim: 64}
cache: {encode: fitted}
bits: {nominal: 2, stored: 2.5}
layers:
  0: {k: {bits: 2}, v: {bits: 2}}
  1: {k: {bits: 2, encode: minmax}, v: {bits: 2, encode: refit}}
"""


def test_encoders_are_those_of_the_tensor_or_else_of_the_cache(load):
    plan = load(ENCODED)
    forms = {
        (index, kind): storage_forms(tensor, kind, plan.cache, 64)[0]
        for index, layer in plan.layers.items()
        for tensor, kind in layer.tensors
    }
    encoders = {place: form.encoder for place, form in forms.items()}
    assert encoders == {(0, "key"): "refit", (0, "value"): "search", (1, "key"): "minmax", (1, "value"): "refit"}
    assert load(plan.to_yaml()) == plan
    assert "encode: fitted" in plan.to_yaml()


def test_a_plan_without_encoders_is_as_it_was_before_there_were_any(load):
    plan = load(GOOD)
    assert plan.sha256 == "69273a60f1729b76bb254da624f591ac1254696f6ef39a7dfb4743df2a1274ee"
    assert "encode" not in plan.to_yaml()
    assert load(changed("float16,", "float16, encode: minmax,")).sha256 == plan.sha256
    others = [load(changed("float16,", f"float16, encode: {name},")).sha256 for name in ("refit", "search", "fitted")]
    others.append(load(changed("0: {k: {bits: 3}", "0: {k: {bits: 3, encode: refit}")).sha256)
    assert len({plan.sha256, *others}) == 5


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("float16,", "float16, encode: best,", r"line 6: .*encode: .*'minmax', 'refit', 'search' or 'fitted'"),
        ("0: {k: {bits: 3}", "0: {k: {bits: 3, encode: fitted}", r"line 8: .*encode: .*'minmax', 'refit' or 'search'"),
    ],
)
def test_unknown_encoders_are_refused_with_their_line(load, old, new, fault):
    (found,) = faults(load, changed(old, new))
    assert re.search(fault, found), found
