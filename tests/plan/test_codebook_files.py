"""Codebooks in plan files, and the files that they name: read back as written, refused with every fault."""

import hashlib

import numpy as np
import pytest
from learned_books import codecs_with, made_up_codebooks
from made_up import make_info

from kvmix_cli.errors import DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, HeadGeometry, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.page_codecs import PageCodecs
from kvmix_cli.plan.presets import find_preset
from kvmix_cli.plan.tensor_files import check_files
from kvmix_cli.plan.tensors.codebooks import Codebooks, CodebooksFile
from kvmix_cli.plan.transforms import Rotate, Transforms

INFO = make_info(2, head_dim=16)
SHA = hashlib.sha256(b"").hexdigest()
NAMED = PageCodecs(k="vectors", v="vectors", codebooks="books.safetensors", sha256=SHA)


def test_a_file_is_read_as_it_was_written(tmp_path):
    books = made_up_codebooks(INFO, rope=np.ones(8))
    path = tmp_path / "books.safetensors"
    sha256 = books.save(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == books.save(path)
    again = Codebooks.load(path, sha256)
    assert (again.model, again.layers.keys()) == (books.model, books.layers.keys())
    for index, kinds in books.layers.items():
        for kind, widths in kinds.items():
            for bits, array in widths.items():
                np.testing.assert_array_equal(again.layers[index][kind][bits], array)
        np.testing.assert_array_equal(again.rope[index].frequencies, books.rope[index].frequencies)


def test_a_plan_finds_its_codebooks_from_any_folder_and_counts_codes_alone(tmp_path, monkeypatch):
    codecs_with(tmp_path / "books.safetensors", made_up_codebooks(INFO))
    codecs = NAMED.model_copy(update={"sha256": made_up_codebooks(INFO).sha256})
    plan = Plan.uniform(INFO, 3, 2, CacheSettings(codecs=codecs))
    assert (plan.bits.nominal, plan.bits.stored) == (2.5, 2.5)
    monkeypatch.chdir(tmp_path.parent)
    again = Plan.load(plan.save(tmp_path / "plan.yaml"))
    check_files(again)
    assert (again, again.sha256) == (plan, plan.sha256)


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"codecs": {"k": "vectors", "codebooks": "a"}}, "codebooks and their sha256 go together"),
        ({"codecs": {"k": "vectors", "codebooks": "a", "sha256": "b"}}, "sha256"),
        (
            {"codecs": NAMED, "transforms": Transforms(k=(Rotate(),))},
            "codebooks were learned of keys and values as they are; take the transforms out",
        ),
    ],
)
def test_settings_that_do_not_go_together(cache, said):
    with pytest.raises(ValueError, match=said):
        CacheSettings.model_validate(cache)


def test_what_codebooks_cannot_be_of():
    with pytest.raises(PlanError, match="learned codebooks have widths of 1, 2, 3, 4, not 8"):
        Plan.uniform(INFO, 8, 2, CacheSettings(codecs=NAMED))
    other = NAMED.model_copy(update={"v": "symmetric"})
    with pytest.raises(PlanError, match="the codec EvenLevels has no codebook that a plan could give it; use vectors"):
        Plan.uniform(INFO, 2, 2, CacheSettings(codecs=other))
    two = TensorPlan(bits=2)
    layers = {index: LayerPlan(k=two, v=two, head_groups=(HeadGroup(heads=(1,), k=two),)) for index in range(2)}
    with pytest.raises(PlanError, match="codebooks are of all KV heads of a layer, which has no groups of heads then"):
        Plan.build(INFO, layers, CacheSettings(codecs=NAMED))


def test_a_file_outside_of_the_plans_folder_is_refused(tmp_path):
    outside = NAMED.model_copy(update={"codebooks": "../books.safetensors"})
    path = Plan.uniform(INFO, 2, 2, CacheSettings(codecs=outside)).save(tmp_path / "plan.yaml")
    with pytest.raises(DocumentError, match="leads out of"):
        Plan.load(path)


def test_a_record_names_a_file_beside_its_profile():
    with pytest.raises(ValueError, match="must be the name of a file in the folder of the profile"):
        CodebooksFile(file="../c.safetensors", sha256="", tokens=1)


def test_a_file_that_is_missing_cut_short_or_another(tmp_path):
    path = tmp_path / "books.safetensors"
    with pytest.raises(PlanError, match=r"books\.safetensors: there is no such file; use the file that was written"):
        Codebooks.load(path, SHA)
    sha256 = made_up_codebooks(INFO).save(path)
    with pytest.raises(PlanError, match=r"its checksum is .*, and the plan was made with"):
        Codebooks.load(path, SHA)
    for damaged in (path.read_bytes()[:-100], b"", b"x" * 40):
        path.write_bytes(damaged)
        with pytest.raises(PlanError, match="it holds no codebooks") as error:
            Codebooks.load(path, hashlib.sha256(damaged).hexdigest())
        assert "\n" not in str(error.value)
    assert sha256 != SHA


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 4, 256, 4), np.float32), "layers.0.k.2 is float32"),
        (np.zeros((2, 4, 128, 4), np.float16), r"\[2, 4, 128, 4\], no codebooks of 2 bits"),
        (np.full((2, 4, 256, 4), np.nan, np.float16), "layers.0.k.2 has NaN or Inf"),
    ],
)
def test_numbers_that_cannot_be_used(array, said, tmp_path):
    books = Codebooks(INFO.id, {0: {"k": {2: array}}})
    sha256 = books.save(tmp_path / "books.safetensors")
    with pytest.raises(PlanError, match=said):
        Codebooks.load(tmp_path / "books.safetensors", sha256)


def test_codebooks_of_other_heads_layers_or_widths(tmp_path):
    books, path = made_up_codebooks(INFO, widths=(2,)), tmp_path / "books.safetensors"
    with pytest.raises(PlanError, match="no codebooks of 3 bits for layer 0 k"):
        books.tensor(path, 0, "k", 3, INFO.heads(0))
    with pytest.raises(PlanError, match="no codebooks of 2 bits for layer 7 v"):
        books.tensor(path, 7, "v", 2, INFO.heads(0))
    heads = HeadGeometry(kv_heads=2, key_dim=64, value_dim=64)
    with pytest.raises(PlanError, match="with codebooks of 2 x 16 for layer 0 k, which is 2 x 64"):
        books.tensor(path, 0, "k", 2, heads)


def test_a_preset_of_codebooks_needs_a_profile():
    with pytest.raises(PlanError, match="preset 'cq' has codebooks of a profile"):
        find_preset("cq").plan(INFO, "cq")
