"""The profiles and plans in `profiles/`: whole, of one model, and made of each other."""

from pathlib import Path

import pytest

from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile
from kvmix_cli.studies.directions import has_directions, read_basis

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "profiles").glob("*/profile.yaml"))
PLANS = [
    pytest.param(path, id=f"{path.parents[1].name}-{path.stem}")
    for folder in FOLDERS
    for path in sorted(folder.glob("plans/*.yaml"))
]


def test_both_models_are_there():
    assert [folder.name for folder in FOLDERS] == ["builtin--tiny", "smollm2-135m"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_profile_has_its_directions(folder):
    profile = Profile.load(folder / "profile.yaml")
    assert has_directions(profile)
    assert list(read_basis(profile, folder).layers) == profile.model.quantizable
    assert "/" not in profile.model.id, "no path of the machine that measured it"


@pytest.mark.parametrize("path", PLANS)
def test_a_plan_is_of_the_profile_beside_it(path):
    plan, profile = Plan.load(path), Profile.load(path.parents[1] / "profile.yaml")
    plan.check_model(profile.model)
    assert plan.model.id == profile.model.id
    assert plan.provenance["profile_sha256"] == profile.sha256
