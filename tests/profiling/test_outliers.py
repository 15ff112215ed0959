"""Channels and tokens that stand out are measured by `profile`, kept in its file, said, and shown by `inspect`."""

import architectures
import pytest
import torch
from commandline import kvmix, kvmix_json
from profiling_models import load, token_ids, wrap

from kvmix_cli.errors import ModelError
from kvmix_cli.profile import LayerOutliers, Profile
from kvmix_cli.profiling.outliers import measure_outliers
from kvmix_cli.reporting.tables.outliers import outlier_notices, outlier_table

IDS = token_ids(60)[0].tolist()


def test_a_plain_model_has_none():
    found = measure_outliers(load("llama"), IDS)
    assert list(found) == [0, 1, 2]
    assert all(1 <= ratio < 8 for each in found.values() for ratio in each.model_dump().values())


def test_key_biases_stand_out_where_they_are():
    """Qwen2's first and last layers (transformers#35185)."""
    loaded = wrap(architectures.build("qwen2", torch.float32))
    found = measure_outliers(loaded, IDS)
    assert min(found[0].key_channel, found[3].key_channel) > 50
    assert max(found[1].key_channel, found[2].key_channel) < 10


@pytest.mark.parametrize("place", [0, 30])
def test_a_massive_token_stands_out_unless_it_is_in_the_sink(place):
    loaded = load("llama")
    for layer in loaded.model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, inputs, output: massive(output, place))
    ratio = measure_outliers(loaded, IDS)[1].value_token
    assert (ratio > 20) == (place == 30)


def massive(states, place):
    states = states.clone()
    states[:, place] *= 50
    return states


def test_numbers_that_are_not_finite_are_an_error():
    loaded = load("llama")
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"keys of layer 1 of small are not finite .*: its weights may be damaged"):
        measure_outliers(loaded, IDS)


def test_a_channel_without_any_size_is_a_ratio(monkeypatch):
    loaded = load("llama")
    with torch.no_grad():
        loaded.model.model.layers[0].self_attn.k_proj.weight[[0, 1, 2, 4, 5, 6]] = (
            0  # in pairs, as positions rotate them
        )
        loaded.model.model.layers[1].self_attn.k_proj.weight[:] = 0
    found = measure_outliers(loaded, IDS)
    assert found[0].key_channel == pytest.approx(1e6)
    assert found[1].key_channel == 1


@pytest.fixture
def profile(profile_of):
    return profile_of({0: (40.0, 1.2, 1.0), 1: (3.0, 1.2, 6.0), 2: (20.0, 1.2, 7.0)})


@pytest.fixture
def profile_of():
    """A profile of three layers with such outliers."""
    from made_up import falling

    def make(outliers):
        names = LayerOutliers.model_fields
        layers = {index: LayerOutliers(**dict(zip(names, each, strict=True))) for index, each in outliers.items()}
        return falling(3).model_copy(update={"outliers": layers})

    return make


def test_what_stands_out_is_said(profile, profile_of):
    assert list(outlier_notices(profile)) == [
        "layers 0, 2: keys have outlier channels up to 40x the rest: 4 bits or a transform",
        "layers 1-2: values have massive tokens up to 7x the rest: 4 bits or a larger sink",
    ]
    one = profile_of({0: (40.0, 1.2, 1.0), 1: (3.0, 1.2, 1.0)})
    assert list(outlier_notices(one)) == ["layer 0 keys have outlier channels 40x the rest: 4 bits or a transform"]


def test_the_file_keeps_it_and_earlier_files_have_none(profile, tmp_path):
    path = profile.save(tmp_path / "profile.yaml")
    assert Profile.load(path) == profile
    earlier = profile.model_copy(update={"outliers": None})
    assert "outliers" not in earlier.to_yaml()
    assert outlier_table(Profile.load(earlier.save(path))) is None


@pytest.mark.slow
def test_commands_say_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = kvmix_json("profile", "builtin:tiny", "--samples", 1, "--seq-len", 64)
    assert [layer["index"] for layer in found["outliers"]] == list(range(8))
    path = tmp_path / "profiles" / "builtin--tiny" / "profile.yaml"
    shown = kvmix_json("inspect", path)["outliers"]
    assert shown[3]["key_channel"] == pytest.approx(found["outliers"][3]["key_channel"], rel=0.01), "three digits"
    profile = Profile.load(path)
    layer = profile.outliers[0].model_copy(update={"key_channel": 40.0})
    profile.model_copy(update={"outliers": {**profile.outliers, 0: layer}}).save(path)
    assert "layer 0 keys have outlier channels 40x the rest: 4 bits or a transform" in kvmix("inspect", path).stdout
