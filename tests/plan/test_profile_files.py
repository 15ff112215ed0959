"""Profile files: read back as written, faults with their lines."""

import pytest
from hypothesis import given
from made_up import make_info, make_profile, patient, scored

from kvmix_cli.errors import DocumentError
from kvmix_cli.profile import CodedLoss, LayerScore, Profile, TensorScore

GOOD = """\
# kvmix profile org/model
format: kvmix-profile/1
model: {id: org/model, layers: 2, kv_heads: 2, head_dim: 64}
provenance: {kvmix: 0.1.0}
scores:
  grad-norm:
    seconds: 1.50
    unit: gradient norm
    calibration: {source: builtin, sha256: ab, samples: 3, seq_len: 64, seed: 0, tokens: 192}
    layers:
      0: {k: {mean: 1.0, std: 0.1}, v: {mean: 2.0, std: 0.2}}
      1: {k: {mean: 3.0, std: 0.3}, v: {mean: 4.0, std: 0.4}}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "profile.yaml"
        path.write_text(text, encoding="utf-8")
        return Profile.load(path)

    return load


@pytest.mark.slow
@patient
@given(scored(40))
def test_what_is_written_is_read_back(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("profiles") / "profile.yaml"
    profile.save(path, "kvmix profile org/model")
    assert Profile.load(path) == profile
    assert Profile.load(path).sha256 == profile.sha256


def test_scores_keep_seven_digits(load):
    profile = make_profile([1.23456789e-30, 0.0], [3.0e20, 5e-324])
    layers = load(profile.to_yaml()).scores["grad-norm"].layers
    assert layers[0].k.mean == 1.234568e-30
    assert (layers[0].v.mean, layers[1].k.mean) == (3.0e20, 0.0)
    assert layers[1].v.mean == 5e-324


LOSSES = "      - {bits: 2.0, exact: 1, predicted: 0.001, measured: 0.002}\n"
CODED = GOOD.replace("    layers:", f"    coded:\n{LOSSES}    layers:")


def test_measured_losses_of_transform_codes_are_read_and_written(load):
    profile = load(CODED)
    assert profile.score("grad-norm").coded == [CodedLoss(bits=2.0, exact=1, predicted=0.001, measured=0.002)]
    assert load(profile.to_yaml()) == profile
    assert profile.sha256 != load(GOOD).sha256, "plans name the profile that they were made from"
    assert list(profile.score("grad-norm").coded_contexts) == [64], "those of older files are of the calibration's"
    longer = load(CODED.replace(LOSSES, LOSSES + LOSSES.replace("exact: 1", "exact: 1, context: 900")))
    assert {context: len(each) for context, each in longer.score("grad-norm").coded_contexts.items()} == {64: 1, 900: 1}
    assert load(longer.to_yaml()) == longer and "context" not in profile.to_yaml()


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("exact: -1", "line 11: scores.grad-norm.coded.0.exact: should be greater than or equal to 0, got -1"),
        ("measured: 0.0", "line 11: scores.grad-norm.coded.0.measured: should be greater than 0, got 0.0"),
    ],
)
def test_losses_that_make_no_ratio_are_refused(load, new, expected):
    old = {"e": "exact: 1", "m": "measured: 0.002"}[new[0]]
    with pytest.raises(DocumentError) as caught:
        load(CODED.replace(old, new))
    assert expected in str(caught.value)


def test_a_number_of_exact_tokens_is_measured_once(load):
    with pytest.raises(DocumentError, match="must have different numbers of exact tokens in a context, ascending"):
        load(CODED.replace(LOSSES, 2 * LOSSES))


def test_the_example_loads(load):
    assert load(GOOD).score("grad-norm").layers[1] == LayerScore(
        k=TensorScore(mean=3.0, std=0.3), v=TensorScore(mean=4.0, std=0.4)
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kvmix-profile/1", "kvmix-plan/1", "line 2: format must be 'kvmix-profile/1', got 'kvmix-plan/1'"),
        (
            "      1: {k",
            "      2: {k",
            "line 12: score 'grad-norm': layer 2 cannot be planned: the model has layers 0-1",
        ),
        ("      1: {k", "      2: {k", "line 10: score 'grad-norm': no entry for layer 1"),
        ("mean: 1.0", "mean: .nan", "line 11: scores.grad-norm.layers.0.k.mean: should be a finite number, got nan"),
        ("mean: 1.0", "mean: -.inf", "line 11: scores.grad-norm.layers.0.k.mean: should be a finite number, got -inf"),
        ("std: 0.1", "std: -0.1", "line 11: scores.grad-norm.layers.0.k.std: should be greater than or equal to 0"),
        (
            "mean: 1.0",
            "mean: 1.0e+200",
            "line 11: scores.grad-norm.layers.0.k.mean: must be between -1e+100 and 1e",
        ),
        ("seconds: 1.50", "seconds: .inf", "line 7: scores.grad-norm.seconds: should be a finite number, got inf"),
        (
            "seq_len: 64",
            "seq_len: 281474976710656",
            "line 9: scores.grad-norm.calibration.seq_len: should be less",
        ),
        ("mean: 1.0", "men: 1.0", "line 11: 'scores.grad-norm.layers.0.k.mean' is missing"),
        ("mean: 1.0", "men: 1.0", "line 11: unknown key 'scores.grad-norm.layers.0.k.men'"),
        (
            "samples: 3",
            "samples: 0",
            "line 9: scores.grad-norm.calibration.samples: should be greater than or equal to 1",
        ),
        ("seconds: 1.50\n", "secs: 1\n", "line 7: unknown key 'scores.grad-norm.secs'"),
        (GOOD[GOOD.index("  grad-norm") :], "  {}\n", "line 5: scores: dictionary should have at least 1 item"),
    ],
)
def test_faults_are_named_with_their_line(load, old, new, expected):
    assert old in GOOD
    with pytest.raises(DocumentError) as error:
        load(GOOD.replace(old, new, 1))
    assert any(fault.startswith(expected) for fault in error.value.faults), error.value.faults


def test_a_score_that_is_not_there_names_those_that_are():
    with pytest.raises(DocumentError, match="org/model: it has no score 'loss', only grad-norm"):
        make_profile([1.0]).score("loss")


CURVED = """\
format: kvmix-profile/1
model: {id: org/model, layers: 2, kv_heads: 2, head_dim: 64}
provenance: {}
scores:
  fisher:
    seconds: 2.00
    unit: nats
    calibration: {source: builtin, sha256: ab, samples: 3, seq_len: 64, seed: 0, tokens: 192}
    setup: {page: 128, scale_dtype: float16}
    layers:
      0: {k: {mean: 0.5, std: 0.1, curve: {2g64: 0.5, 4g128: 0.1}, heads: [0.3, 0.2]}, v: {mean: 2.0, std: 0.0}}
      1: {k: {mean: 0.0, std: 0.0, curve: {2g64: 0.0, 4g128: -1.0e-09}}, v: {mean: 2.0, std: 0.0}}
"""


def test_curves_and_heads_are_written_as_they_are_read(load):
    profile = load(CURVED)
    score = profile.score("fisher")
    assert profile.to_yaml() == CURVED
    assert score.predicts_loss
    assert score.choices == (["2g64", "4g128"], [])
    assert score.layers[0].k.heads == [0.3, 0.2]
    assert score.layers[1].k.heads is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("4g128: 0.1", "5g64: 0.1", "line 11: scores.fisher.layers.0.k.curve: '5g64' must be a width and a group size"),
        ("page: 128", "page: x", "line 9: scores.fisher.setup.page: should be a valid integer, got 'x'"),
        ("page: 128", "page: 0", "line 9: scores.fisher.setup.page: should be greater than or equal to 1, got 0"),
        ("4g128: 0.1", "4: 0.1", "line 11: the key scores.fisher.layers.0.k.curve.4: should be a valid string"),
        ("4g128: 0.1", "4g64: 0.1", "line 5: score 'fisher': the curves of k must have the same choices in all layers"),
        ("4g128: 0.1", "4g128: .inf", "line 11: scores.fisher.layers.0.k.curve.4g128: should be a finite number"),
        ("heads: [0.3", "heads: [.nan", "line 11: scores.fisher.layers.0.k.heads.0: should be a finite number"),
    ],
)
def test_faults_of_curves_are_named_with_their_line(load, old, new, expected):
    with pytest.raises(DocumentError) as error:
        load(CURVED.replace(old, new, 1))
    assert any(expected in fault for fault in error.value.faults), error.value.faults


def test_stock_layers_have_no_score():
    profile = make_profile([1.0, 2.0], info=make_info(3, stock={1: "sliding_attention"}))
    assert list(profile.score("grad-norm").layers) == [0, 2]
