"""Transform codes in plan files, and the basis files that they name: read back as written, refused with every fault."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from coding import falling_widths, made_up_basis
from made_up import make_info
from safetensors import safe_open
from safetensors.numpy import load_file, save

from kvmix_cli.errors import DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan, TransformSettings, TransformTensor
from kvmix_cli.plan.layers import parse_mean_widths, parse_short
from kvmix_cli.plan.sizes import layer_bytes, tensor_bits
from kvmix_cli.plan.tensors.basis import BasisFile
from kvmix_cli.plan.tensors.moments import Rope
from kvmix_cli.plan.transforms import Rotate, Transforms

SHA = hashlib.sha256(b"").hexdigest()
TRANSFORM = TransformSettings(basis="a folder/basis.safetensors", sha256=SHA, frame=1024)
VALUES = "['11110000', '00000000']"
GOOD = f"""\
format: kvmix-plan/1
model: {{id: org/model, layers: 2, kv_heads: 2, head_dim: 64}}
bits: {{nominal: 3.21875, stored: 3.500977}}
cache:
  transform: {{basis: basis.safetensors, sha256: {SHA}, frame: 1024}}
layers:
  0: {{k: {{codec: transform, widths: ['65432100', '22222222']}}, v: {{codec: transform, widths: {VALUES}}}}}
  1: {{k: {{codec: transform, widths: ['65432100', '22222222']}}, v: {{bits: 8}}}}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return Plan.load(path)

    return load


@pytest.mark.parametrize("transform", [TRANSFORM, TRANSFORM.model_copy(update={"frame": None, "exact": 0})])
def test_what_is_written_is_read_back(transform, tmp_path):
    coded = TransformTensor(widths=falling_widths(2, 64))
    layers = {0: LayerPlan(k=coded, v=coded), 1: LayerPlan(k=coded, v=TensorPlan(bits=4)), 2: LayerPlan.of_bits(16, 2)}
    plan = Plan.build(make_info(3), layers, CacheSettings(transform=transform))
    again = Plan.load(plan.save(tmp_path / "plan.yaml"))
    assert again == plan
    assert again.sha256 == plan.sha256
    assert again.to_yaml() == plan.to_yaml()


def test_the_example_loads_and_counts_every_bit(load, tmp_path):
    """Codes of 64 directions; a 16-bit scale a token of values; one exact token of 128 with place, error, attention."""
    plan = load(GOOD)
    keys, values = (21 / 8 + 2) / 2, 4 / 8 / 2
    assert plan.bits.nominal == pytest.approx((keys + values + keys + 8) / 4)
    exact, choice, scale = 16 / 128, (32 + 2 * 32) / 128 / 64, 16 / 64
    assert tensor_bits(plan.layers[0].k, "key", plan.cache, 64, "stored") == pytest.approx(keys + exact + choice)
    assert tensor_bits(plan.layers[0].v, "value", plan.cache, 64, "stored") == pytest.approx(values + exact + scale)
    assert plan.cache.transform.located(plan.cache.transform.basis) == str(tmp_path / "basis.safetensors")
    assert plan.short == "0:kt2.312vt0.25,1:kt2.312v8"


def test_bytes_of_a_layer(load):
    """4 sinks, 128 of the window and the rest of 700 tokens in 4 pages."""
    plan = load(GOOD)
    found = layer_bytes(plan.layers[0], plan.cache, plan.model.heads(0), 700)
    codes = 4 * (128 // 8 * 8 * (21 + 16) + 128 // 8 * 8 * 4)
    assert found.packed == codes + 4 * 2 * 128 * 2
    exact = 8  # as of eight pages
    assert found.full == 2 * 2 * 64 * 2 * (700 - 4 * 128 + exact)
    assert found.extra == 2 * exact * (4 + 4 + 4) + 2 * 2 * (700 - 4 - 4 * 128) * 4


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "'65432100', '22222222'",
            "'65432100', '22222223'",
            "line 7: layers.0.k.widths: KV head 1 has widths that",
        ),
        ("'65432100', '22222222'", "'65432100'", "line 7: layers.0.k: widths are of 1 KV heads; the layer has 2"),
        ("'22222222'", "'2222'", "line 7: layers.0.k: KV head 1 has 4 widths; its 64 channels take 8"),
        ("'22222222'", "'72222222'", "KV head 1 must have a digit from 0 to 6 for each run, got '72222222'"),
        ("'65432100'", "65432100", "line 7: layers.0.k.widths.0: should be a valid string, got 65432100"),
        ("codec: transform", "codec: klt", "line 7: layers.0.k.codec: should be 'transform', got 'klt'"),
        ("widths: ['65432100', '22222222']", "bits: 2", "unknown key 'layers.0.k.bits'"),
        ("frame: 1024", "frame: 1000", "line 5: cache.transform.frame: must be a multiple of the page of 128 tokens"),
        ("frame: 1024", "exact: 128", "line 5: cache.transform.exact: must be less than the page of 128 tokens"),
        ("basis: b", "basis: ../b", "leads out of"),
        (SHA, "abc", "line 5: cache.transform.sha256"),
        ("layers:\n", "  transforms: {k: [{kind: rotate}]}\nlayers:\n", "do not combine with transforms"),
    ],
)
def test_faults_have_their_lines(load, old, new, expected):
    assert old in GOOD
    with pytest.raises(DocumentError) as error:
        load(GOOD.replace(old, new, 1))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_codes_without_a_basis_are_refused(load):
    with pytest.raises(DocumentError, match=r"line 5: layers\.0\.k: a transform needs its basis in cache\.transform"):
        load("\n".join(line for line in GOOD.splitlines() if "transform: {basis" not in line and line != "cache:"))


def test_axes_are_not_put_on_transform_codes():
    with pytest.raises(ValueError, match="do not combine"):
        CacheSettings(transform=TRANSFORM).with_axes(CacheSettings(transforms=Transforms(k=(Rotate(),))))


def test_the_short_form_shows_mean_widths_and_is_no_plan():
    assert parse_mean_widths("0-1:kt2.25vt0.25,2:k4vt2") == {0: (2.25, 0.25), 1: (2.25, 0.25), 2: (4, 2)}
    with pytest.raises(ValueError, match="mean width of transform codes"):
        parse_short("0:kt2.25v2")


@pytest.fixture
def basis():
    return made_up_basis(make_info(2, head_dim=16), rope=np.ones(8))


def test_a_basis_is_written_as_safetensors_itself_writes_it(basis, tmp_path):
    """Byte for byte, so that plans made with other versions find the file that they name."""
    path = tmp_path / "basis.safetensors"
    basis.save(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert path.read_bytes() == save(load_file(path), metadata)


def test_a_basis_is_read_as_it_was_written(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    sha256 = basis.save(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == basis.save(path)
    again = BasisFile.load(path, sha256)
    assert (again.model, again.frame, again.layers.keys()) == (basis.model, basis.frame, basis.layers.keys())
    for index, kinds in basis.layers.items():
        for kind, directions in kinds.items():
            for name, array in vars(directions).items():
                np.testing.assert_array_equal(vars(again.layers[index][kind])[name], array)
        np.testing.assert_array_equal(again.rope[index].frequencies, basis.rope[index].frequencies)


def damaged(name, change):
    def damage(basis):
        """A basis with other numbers in one place."""
        keys = basis.layers[1]["k"]
        broken = replace(keys, **{name: change(getattr(keys, name))})
        return replace(basis, layers={**basis.layers, 1: {**basis.layers[1], "k": broken}})

    return damage


def with_nan(array):
    array = array.copy()
    array.flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged("encode", lambda array: array[:, :5]), "layer 1 k: encode is float32"),
        (damaged("mean", with_nan), "layer 1 k: mean has NaN or Inf"),
        (damaged("deviation", np.zeros_like), "layer 1 k: deviation has numbers that are not positive"),
        (damaged("decode", np.float64), "layer 1 k: decode is float64"),
    ],
)
def test_numbers_that_cannot_be_used(basis, damage, said, tmp_path):
    damage(basis).save(tmp_path / "basis.safetensors")
    with pytest.raises(PlanError, match=said) as error:
        BasisFile.load(tmp_path / "basis.safetensors")
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_cut_short_or_another(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    with pytest.raises(PlanError, match=r"basis\.safetensors: there is no such file; put the file back"):
        BasisFile.load(path, SHA)
    sha256 = basis.save(path)
    with pytest.raises(PlanError, match=r"its checksum is .* and the plan was made with"):
        BasisFile.load(path, SHA)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PlanError, match="cut short, or no basis"):
        BasisFile.load(path, sha256)


def test_a_basis_of_another_model_is_refused(basis, tmp_path):
    heads = make_info(2, head_dim=64).heads(0)
    with pytest.raises(PlanError, match=r"for org/model, with directions of 2 x 16 for layer 0 k, which is 2 x 64"):
        basis.tensor(tmp_path / "basis.safetensors", 0, "k", heads)
    with pytest.raises(PlanError, match="no directions for layer 7"):
        basis.tensor(tmp_path / "basis.safetensors", 7, "k", heads)


def test_a_turn_keeps_its_layout(tmp_path):
    info = make_info(1, head_dim=16)
    basis = BasisFile(info.id, made_up_basis(info).layers, 64, {0: Rope(np.ones(4), "interleaved", 8)})
    basis.save(tmp_path / "basis.safetensors")
    rope = BasisFile.load(tmp_path / "basis.safetensors").rope[0]
    assert (rope.start, rope.layout) == (8, "interleaved")
