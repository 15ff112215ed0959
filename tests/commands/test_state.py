"""Which file a command means."""

import json
import os
import re

import pytest
from made_up import falling, make_info

from kvmix_cli import state
from kvmix_cli.errors import StateError


def make(path, age=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "profiles"


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("meta-llama/Llama-2-7b", "meta-llama--Llama-2-7b"),
        ("gpt2", "gpt2"),
        ("builtin:tiny", "builtin--tiny"),
        ("/models/Llama-2-7b/", "Llama-2-7b"),
        ("./Llama", "Llama"),
        ("../x/y z", "y-z"),
        ("..", None),
        ("a/../../etc", "etc"),
        ("x" * 150, "x" * 150),
        ("a\0b", "a-b"),
    ],
)
def test_folder_names(model, folder):
    name = state.slug(model)
    assert folder is None or name == folder
    assert "/" not in name
    assert not name.startswith(".")


def test_a_long_name_is_cut_and_still_its_own():
    names = {state.slug(text) for text in ("x" * 151, "x" * 5000, "ü" * 200, "org/" + "x" * 5000)}
    assert len(names) == 4
    assert all(len(name.encode()) <= state.MAX_NAME + 10 for name in names)


def test_a_local_folder_has_its_own_name_and_a_hash_of_its_path(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model").mkdir(parents=True)
    name = state.slug("org/model")
    assert re.fullmatch(r"model--[0-9a-f]{8}", name)
    assert {state.slug(same) for same in ("./org/model", "org/model/", tmp_path / "org" / "model")} == {name}
    assert state.slug("other/model") != name
    assert state.slug(".").startswith(f"{tmp_path.name}--")


def test_files_of_a_local_folder_from_before_names_had_hashes(root, tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "model").mkdir(parents=True)
    old = falling(2).model_copy(update={"model": make_info(2, model_id=str(tmp_path / "one" / "model"))})
    path = old.save(root / "model" / "profile.yaml")
    said = []
    assert state.find_profile(model="one/model", say=said.append).absolute() == path
    assert "profiles/model is from an earlier kvmix; new files of one/model go to profiles/model--" in said[0]
    with pytest.raises(StateError, match="no profile in profiles/model--"):
        state.find_profile(model="two/model")


def test_the_profile_of_the_only_model(root):
    path, said = make(root / "org--model" / "profile.yaml"), []
    assert state.find_profile(say=said.append).absolute() == path
    assert said == ["using profile profiles/org--model/profile.yaml"]


@pytest.mark.parametrize(("find", "file"), [(state.find_profile, "profile.yaml"), (state.find_plan, "plans/a.yaml")])
def test_two_models_need_a_choice(root, find, file):
    paths = {name: make(root / name / file) for name in ("a--x", "b--y")}
    with pytest.raises(StateError, match=r"2 models have a .* \(a--x, b--y\): choose with --model"):
        find()
    assert find(model="b/y").absolute() == paths["b--y"]
    assert find(model="a--x").absolute() == paths["a--x"]


def test_an_unfinished_profile_counts_as_a_candidate(root):
    make(root / "a--x" / "profile.yaml")
    make(root / "b--y" / "profile.partial.jsonl")
    with pytest.raises(StateError, match="choose with --model"):
        state.find_profile()
    with pytest.raises(
        StateError, match=r"interrupted and left .*b--y/profile.partial.jsonl: finish it with `kvmix profile MODEL"
    ):
        state.find_profile(model="b/y")


def test_the_command_that_finishes_a_profile_has_all_of_its_settings(root):
    settings = {"model": "b/y", "scores": ["fisher-metric"], "window": "recent:64", "frame": 256, "samples": 20}
    journal = make(root / "b--y" / "profile.partial.jsonl")
    journal.write_text(json.dumps({**settings, "longer": {"samples": 3, "seq_len": 4096}}) + "\n")
    wanted = "profile b/y --score fisher-metric --window recent:64 --frame 256 --samples 20 --longer 3x4096"
    with pytest.raises(StateError, match=f"finish it with `kvmix {wanted}"):
        state.find_profile(model="b/y")


def test_a_finished_profile_is_not_hidden_by_a_later_interruption(root):
    path = make(root / "a--x" / "profile.yaml")
    make(root / "a--x" / "profile.partial.jsonl")
    assert state.find_profile().absolute() == path


def test_the_newest_plan(root):
    make(root / "a--x" / "plans" / "old.yaml", age=60)
    new, said = make(root / "a--x" / "plans" / "new.yaml", age=30), []
    assert state.find_plan(say=said.append).absolute() == new
    assert said == ["using plan profiles/a--x/plans/new.yaml"]


def test_a_plan_of_a_family_is_never_the_newest(root):
    chosen = make(root / "a--x" / "plans" / "rank-3.yaml", age=60)
    point = make(root / "a--x" / "plans" / "pareto-4.yaml", age=30)
    point.write_text("# kvmix allocate --method pareto\nprovenance: {kvmix: 0.1.0, method: pareto, score: kl}\n")
    assert state.find_plan().absolute() == chosen
    assert state.find_plan("pareto-4").absolute() == point
    chosen.unlink()
    with pytest.raises(StateError, match=r"only plans of a family.*name one with --plan; there are pareto-4"):
        state.find_plan()


def test_plans_of_the_same_age_go_by_name(root):
    for name in "cab":
        make(root / "a--x" / "plans" / f"{name}.yaml")
    assert state.find_plan().stem == "a"


def test_a_plan_by_name(root):
    path, said = make(root / "a--x" / "plans" / "rank-2.3.yaml"), []
    make(root / "a--x" / "plans" / "paper.yaml")
    assert state.find_plan("rank-2.3", say=said.append).absolute() == path
    assert said == ["using plan profiles/a--x/plans/rank-2.3.yaml"]
    with pytest.raises(StateError, match=r"no plan 'ppaer' in .* \(did you mean 'paper'\?\)"):
        state.find_plan("ppaer")
    with pytest.raises(StateError, match=r"there are paper, rank-2\.3"):
        state.find_plan("zzz")


def test_a_plan_by_its_name_without_the_hash_of_its_options(root):
    path = make(root / "a--x" / "plans" / "ilp-3-0a1b2c+mikv.yaml")
    assert state.find_plan("ilp-3+mikv").absolute() == path
    make(root / "a--x" / "plans" / "ilp-3-ffffff+mikv.yaml")
    with pytest.raises(StateError, match="no plan 'ilp-3\\+mikv'"):
        state.find_plan("ilp-3+mikv")
    whole = make(root / "a--x" / "plans" / "ilp-3+mikv.yaml")
    assert state.find_plan("ilp-3+mikv").absolute() == whole


def test_files_that_are_named(root, tmp_path):
    path = make(tmp_path / "elsewhere.yaml")
    assert state.find_profile(path) == path
    assert state.find_plan(str(path)) == path
    assert state.find_plan(make(tmp_path / "a.plan")) == tmp_path / "a.plan"
    for find in (state.find_profile, state.find_plan):
        with pytest.raises(StateError, match=r"gone\.yaml does not exist"):
            find("gone.yaml")


def test_a_named_profile_that_was_never_finished(tmp_path):
    (tmp_path / "mine.partial.jsonl").write_text('{"model": "org/model"}\n')
    with pytest.raises(StateError, match=r"kvmix profile org/model --out mine\.yaml --resume"):
        state.find_profile("mine.yaml")


@pytest.mark.parametrize(
    ("find", "command"),
    [(state.find_profile, "`kvmix profile MODEL`"), (state.find_plan, "`kvmix allocate --avg-bits 3`")],
)
def test_an_empty_folder_says_what_to_do(find, command):
    with pytest.raises(StateError) as error:
        find()
    assert f"in profiles: make one with {command}" in str(error.value)
    with pytest.raises(StateError, match="in profiles/org--x"):
        find(model="org/x")


def test_the_folder_can_be_moved(kvmix, profiled, tmp_path, monkeypatch):
    profiled.parent.parent.rename(tmp_path / "moved")
    assert kvmix("allocate", "--avg-bits", 3).code == 1
    assert kvmix("allocate", "--avg-bits", 3, "--profiles-dir", "moved").code == 0
    assert (tmp_path / "moved" / "org--model" / "plans" / "rank-3.yaml").is_file()
    assert kvmix("allocate", "--avg-bits", 3).code == 1
    monkeypatch.setenv("KVMIX_PROFILES_DIR", "moved")
    assert kvmix("allocate", "--avg-bits", 3).code == 0
    assert kvmix("allocate", "--avg-bits", 3, "--profiles-dir", "other").code == 1


@pytest.mark.parametrize("find", [state.find_plan, state.find_profile])
def test_what_is_no_file_is_named_as_what_it_is(root, tmp_path, find):
    """A text with a separator is a path, not the name of a plan."""
    make(root / "a--x" / "plans" / "one.yaml")
    for place, said in {
        "profiles": "is a folder",
        "/dev/null": "is a pipe or a device",
        "a/b": "b does not exist",
    }.items():
        with pytest.raises(StateError, match=said):
            find(str(tmp_path / place))


def test_of_many_plans_some_are_named(root):
    for number in range(100):
        make(root / "a--x" / "plans" / f"plan-{number:02}.yaml")
    with pytest.raises(StateError, match=r"plan-00, .*, plan-09 and 90 more \(`kvmix list plans`\)$"):
        state.find_plan("gone")
