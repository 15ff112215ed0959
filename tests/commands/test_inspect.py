"""`kvmix inspect`: shows, validates and compares; and is quiet about what is not asked."""

import json

import pytest
from coding import made_up_basis, settings_with
from curves import curved, make_score
from made_up import falling, make_info, make_profile

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformTensor
from kvmix_cli.plan.transforms import Center, Rotate, Transforms
from kvmix_cli.plan.windows import Rpc
from kvmix_cli.profile import Profile
from kvmix_cli.reporting.plots import plans as plots


@pytest.fixture
def plan(tmp_path):
    return Plan.from_short("0-1:k4v4,2-7:k2v2", make_info(8)).save(tmp_path / "plan.yaml")


@pytest.fixture
def profile(tmp_path):
    return falling(8).save(tmp_path / "profile.yaml")


def test_a_plan(kvmix, plan):
    ran = kvmix("inspect", plan, "--context", 4096)
    assert ran.code == 0
    assert ["2-7", "6", "2", "2"] in [line.split() for line in ran.out.splitlines()]
    assert "nominal 2.5 (K 2.5, V 2.5), stored 3" in ran.out
    assert "at 4096 tokens" in ran.out
    assert ran.err == ""


def test_a_plan_as_json(kvmix, plan):
    result = kvmix("inspect", plan, "--json").json
    assert (result["command"], result["kind"], result["model"]) == ("inspect", "plan", "org/model")
    assert result["bits"] == {"nominal": 2.5, "nominal_k": 2.5, "nominal_v": 2.5, "stored": 3.0}
    assert result["cache"]["window"] == {"kind": "recent", "tokens": 128}


def test_a_profile(kvmix, profile):
    ran = kvmix("inspect", profile)
    first = next(line for line in ran.out.splitlines() if line.split()[:1] == ["0"])
    assert first.split()[:3] == ["0", "8", "0.8"]
    assert "█" * 12 in first
    assert "3 samples of 64 tokens" in ran.out


def test_a_profile_as_json(kvmix, profile):
    result = kvmix("inspect", profile, "--json").json
    assert result["kind"] == "profile"
    assert result["scores"]["grad-norm"]["layers"][7] == {"index": 7, "k": 1.0, "v": 8.0, "k_std": 0.1, "v_std": 0.8}


def test_the_spread_of_one_sample_is_not_known(kvmix, tmp_path):
    """A dash in the table; the JSON keeps its number."""
    profile = falling(2)
    score = profile.scores["grad-norm"]
    one = score.model_copy(update={"calibration": score.calibration.model_copy(update={"samples": 1})})
    profile.model_copy(update={"scores": {"grad-norm": one}}).save(tmp_path / "one.yaml")
    ran = kvmix("inspect", "one.yaml")
    first = next(line for line in ran.out.splitlines() if line.split()[:1] == ["0"])
    assert first.split()[:3] == ["0", "2", "-"]
    assert kvmix("inspect", "one.yaml", "--json").json["scores"]["grad-norm"]["layers"][0]["k_std"] == 0.2


@pytest.mark.parametrize("name", ["paper", "kvmix-paper"])
def test_the_papers_preset_by_either_name(kvmix, name):
    assert kvmix("inspect", name, "--model", "builtin:tiny", "--json").json["bits"]["nominal_k"] == 2.125


@pytest.mark.parametrize("kind", ["plan", "profile"])
def test_a_picture(kvmix, request, tmp_path, kind):
    file = request.getfixturevalue(kind)
    assert kvmix("inspect", file, "--plot", "picture.png").code == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_an_unknown_kind(kvmix, plan, tmp_path):
    ran = kvmix("inspect", plan, "--plot", "picture.txt")
    assert ran.code == 1
    assert "its name must end in .png, .svg, .pdf" in ran.error
    assert not (tmp_path / "picture.txt").exists()


def test_two_plans(kvmix, plan, tmp_path):
    other = Plan.from_short("0:k4v4,1:k3v4,2-7:k2v2", make_info(8), CacheSettings(window=Rpc()))
    other.save(tmp_path / "other.yaml")
    ran = kvmix("inspect", plan, "other.yaml")
    assert ["1", "k4v4", "k3v4"] in [line.split() for line in ran.out.splitlines()]
    assert "cache.window: recent:128 -> rpc" in ran.out
    assert "1 of 8 layers differ" in ran.out
    result = kvmix("inspect", plan, "other.yaml", "--json").json
    assert result["layers"] == [{"index": 1, "widths": ["k4v4", "k3v4"]}]
    assert result["settings"] == {"cache.window": ["recent:128", "rpc"]}
    assert result["same"] is False


def test_a_context_may_be_in_thousands(kvmix, plan):
    assert kvmix("inspect", plan, "--context", "128K", "--json").json["bytes"]["context"] == 131072


def test_a_plan_and_itself(kvmix, plan):
    assert kvmix("inspect", plan, plan, "--json").json["same"] is True
    assert "0 of 8 layers differ" in kvmix("inspect", plan, plan).out


def test_two_profiles(kvmix, profile, tmp_path):
    make_profile([float(i) for i in range(8)], [float(i + 1) for i in range(8)]).save(tmp_path / "other.yaml")
    agreement = kvmix("inspect", profile, "other.yaml", "--json").json["scores"]["grad-norm"]
    assert agreement["rank_correlation"] == {"k": -1.0, "v": 1.0}
    assert agreement["places"][0] == {"index": 0, "k": [1, 8], "v": [8, 8]}
    assert "rank correlation: K -1.000, V 1.000" in kvmix("inspect", profile, "other.yaml").out


def test_profiles_of_one_layer(kvmix, tmp_path):
    make_profile([1.0]).save(tmp_path / "one.yaml")
    ran = kvmix("inspect", "one.yaml", "one.yaml", "--json")
    assert ran.json["scores"]["grad-norm"]["rank_correlation"] == {"k": 1.0, "v": 1.0}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (falling(9), "their models have different layers"),
        (make_profile([1.0] * 8, name="loss"), "they share no score"),
        (Plan.uniform(make_info(8), 2, 2), "one is a profile, the other a plan"),
    ],
)
def test_what_cannot_be_compared(kvmix, profile, tmp_path, other, message):
    other.save(tmp_path / "other.yaml")
    ran = kvmix("inspect", profile, "other.yaml")
    assert ran.code == 1
    assert message in ran.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: kvmix-plan/9\n", "format must be 'kvmix-plan/1' or 'kvmix-profile/1'"),
        ("format: [x]\n", "format must be 'kvmix-plan/1' or 'kvmix-profile/1'"),
        ("", "neither a plan nor a profile"),
        ("just text", "neither a plan nor a profile"),
        ("format: kvmix-plan/1\nlayers: {0: {k: {bits: 5}}}\n", "line 2: layers.0.k.bits: must be one of"),
        ("a: &a [*a]", "anchors are not allowed"),
        ("a: !!python/name:os.system x", "tags are not allowed"),
        ("0: {nbits_key: 8, nbits_value: 4}\n", "is a KVTuner preset, which does not name its model: add --model ID"),
    ],
)
def test_faulty_files(kvmix, tmp_path, text, message):
    (tmp_path / "file.yaml").write_text(text)
    ran = kvmix("inspect", "file.yaml", "--json")
    assert ran.code == 1
    assert "file.yaml" in ran.error
    assert message in ran.error
    assert message in ran.json["error"]["message"]


def test_a_file_that_is_not_there(kvmix):
    ran = kvmix("inspect", "gone.yaml")
    assert ran.code == 1
    assert "gone.yaml: cannot be read: No such file or directory" in ran.error


@pytest.mark.parametrize("step", [Rotate(matrix="r.safetensors"), Center(means="r.safetensors")])
def test_a_tensor_file_that_a_plan_names_has_to_be_there(kvmix, tmp_path, step):
    cache = CacheSettings(transforms=Transforms(k=(step,)))
    plan = Plan.from_short("0-1:k2v2", make_info(2), cache).save(tmp_path / "plan.yaml")
    ran = kvmix("inspect", plan)
    assert ran.code == 1
    assert f"there is no file {tmp_path / 'r.safetensors'}" in ran.error
    (tmp_path / "r.safetensors").touch()
    assert kvmix("inspect", plan).code == 0


@pytest.mark.parametrize(("content", "said"), [(b"other", "cut short, or no basis"), (None, "there is no such file")])
def test_the_basis_of_a_plan_has_to_be_there_and_whole(kvmix, tmp_path, content, said):
    info = make_info(2, head_dim=16)
    settings = settings_with(tmp_path, made_up_basis(info)).transform
    plan = tmp_path / "plan.yaml"
    storage = TransformTensor(widths=("21",) * info.kv_heads)
    layers = {index: LayerPlan(k=storage, v=storage) for index in range(2)}
    cache = CacheSettings(page=16, transform=settings.model_copy(update={"basis": "basis.safetensors"}))
    Plan.build(info, layers, cache).save(plan)
    assert kvmix("inspect", plan).code == 0
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other" / "basis.safetensors").write_bytes(content)
    ran = kvmix("inspect", plan.rename(tmp_path / "other" / "plan.yaml"), "--json")
    assert ran.code == 1
    assert said in ran.error
    assert ran.json["error"]["type"] == "PlanError"


def test_a_kvtuner_preset_of_the_built_in_model(kvmix, tmp_path):
    text = "".join(f"{layer}: {{nbits_key: 8, nbits_value: 4}}\n" for layer in range(8))
    (tmp_path / "preset.yaml").write_text(text)
    result = kvmix("inspect", "preset.yaml", "--model", "builtin:tiny", "--json").json
    assert (result["bits"]["nominal_k"], result["bits"]["nominal_v"]) == (8, 4)


def test_a_map_of_modelopt_of_the_built_in_model(kvmix, tmp_path):
    layers = {f"model.layers.{layer}.self_attn": {"quant_algo": "NVFP4"} for layer in range(6)}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"kv_cache_quantized_layers": layers}}))
    result = kvmix("inspect", "hf_quant_config.json", "--model", "builtin:tiny", "--json").json
    assert result["bits"]["nominal"] == (6 * 4 + 2 * 16) / 8
    assert "is a map of ModelOpt, which does not name its model" in kvmix("inspect", "hf_quant_config.json").error


@pytest.fixture
def explained(tmp_path):
    """A plan in its place beside the profile that it was made from, which has a score with curves."""
    profile = curved(4, head_dim=64)
    profile = profile.model_copy(update={"scores": {**falling(4).scores, **profile.scores}})
    profile.save(tmp_path / "profiles" / "org--model" / "profile.yaml")
    plan = allocate(profile, Budget(stored_bits=3), method="ilp", score="loss")
    return profile, plan, plan.save(tmp_path / "profiles" / "org--model" / "plans" / "plan.yaml")


def test_a_plan_beside_its_profile_says_why(kvmix, explained, tmp_path):
    profile, plan, path = explained
    ran = kvmix("inspect", path)
    assert ran.err == ""
    assert "K next" in ran.out
    assert "score:   loss, from profiles/org--model/profile.yaml" in ran.out.replace(f"{tmp_path}/", "")
    assert f"loss:    {plan.provenance['predicted_loss']:.5f} nats a token" in ran.out
    first = next(line for line in ran.out.splitlines() if line.split()[:1] == ["0"])
    layer = plan.layers[0]
    assert first.split()[1:3] == [str(layer.k.bits), f"{profile.scores['loss'].layers[0].k.mean:.3g}"]


def test_why_as_json(kvmix, explained):
    _, plan, path = explained
    why = kvmix("inspect", path, "--json").json["explanation"]
    assert (why["profile"], why["score"], why["predicted_by"]) == (
        str(path.parents[1] / "profile.yaml"),
        "loss",
        "loss",
    )
    assert why["predicted_loss"] == pytest.approx(plan.provenance["predicted_loss"])
    assert [(each["k"]["bits"], each["v"]["bits"]) for each in why["layers"]] == [
        (layer.k.bits, layer.v.bits) for layer in plan.layers.values()
    ]
    upgrades = [each[kind]["next"] for each in why["layers"] for kind in "kv" if each[kind]["next"]]
    assert why["next"]["next"] in upgrades
    assert all(upgrade["saves"] > 0 and upgrade["costs"] > 0 for upgrade in upgrades)


def test_a_score_without_curves_explains_importance_alone(kvmix, profiled, tmp_path):
    path = Plan.uniform(make_info(32), 2, 2).save(tmp_path / "plan.yaml")
    ran = kvmix("inspect", path)
    assert ran.err == "kvmix: using profile profiles/org--model/profile.yaml\n"
    assert ["31", "2", "1", "2", "32"] in [line.split() for line in ran.out.splitlines()]
    assert "next" not in ran.out


def test_another_profile_can_be_named_and_is_noticed(kvmix, explained, tmp_path):
    other = curved(4, head_dim=64, seed=1).save(tmp_path / "other.yaml")
    ran = kvmix("inspect", explained[2], "--profile", other)
    assert ran.code == 0
    assert "is not the profile that the plan was made from" in ran.err
    assert "from other.yaml" in ran.out.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("content", "said"), [("format: kvmix-profile/9\n", "format must be"), (None, "the plan was made for")]
)
def test_a_profile_that_does_not_explain_leaves_the_plan_as_it_is(kvmix, plan, tmp_path, content, said):
    beside = tmp_path / "profiles" / "org--model" / "profile.yaml"
    falling(9).save(beside)
    if content is not None:
        beside.write_text(content)
    ran = kvmix("inspect", plan)
    assert ran.code == 0
    assert said in ran.err
    assert "count" in ran.out
    given = kvmix("inspect", plan, "--profile", beside)
    assert given.code == 1
    assert said in given.error


@pytest.mark.slow
def test_the_picture_of_an_explained_plan_has_the_frontier(kvmix, explained, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_draw_frontier", lambda axes, frontier: drawn.update(vars(frontier)))
    assert kvmix("inspect", explained[2], "--plot", "picture.png").code == 0
    _, plan, _ = explained
    assert drawn["plan"] == (plan.bits.stored, pytest.approx(plan.provenance["predicted_loss"]))
    bits, losses = zip(*drawn["best"], strict=True)
    assert list(bits) == sorted(bits)
    assert list(losses) == sorted(losses, reverse=True)
    assert drawn["plan"] in [(stored, pytest.approx(loss)) for stored, loss in drawn["best"]]


def test_without_a_frontier_the_bits_are_drawn_all_the_same(kvmix, tmp_path):
    score = make_score([{"2g64": 0.5}], [{"2g64": 0.5}])
    Profile(model=make_info(1), scores={"loss": score}).save(tmp_path / "profiles" / "org--model" / "profile.yaml")
    path = Plan.uniform(make_info(1), 2, 2).save(tmp_path / "plan.yaml")
    ran = kvmix("inspect", path, "--plot", "picture.png")
    assert ran.code == 0
    assert "no frontier: score 'loss' was not measured for keys at" in ran.err
    assert (tmp_path / "picture.png").exists()


def test_curves_of_other_settings_than_the_plans_are_noticed(kvmix, explained, tmp_path):
    _, plan, _ = explained
    path = Plan.build(plan.model, plan.layers, CacheSettings(page=64)).save(tmp_path / "plan.yaml")
    score = curved(4, head_dim=64, setup={"page": 128}).save(tmp_path / "other.yaml")
    ran = kvmix("inspect", path, "--profile", score)
    assert "loss was measured with other settings than the plan's: page 64 instead of 128" in ran.err
