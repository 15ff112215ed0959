"""Tensor files that a plan names: beside the plan, and nowhere else."""

import pytest
import torch
from made_up import make_info
from safetensors.torch import save_file

from kvmix_cli.cache.transforms import build
from kvmix_cli.errors import DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.transforms import Center, Rotate, Transforms


def saved(folder, file, kind="rotate"):
    """Write a plan with a transform from a file, as Python can make it with any path."""
    step = Rotate(matrix=file) if kind == "rotate" else Center(means=file)
    plan = Plan.from_short("0-1:k2v2", make_info(2), CacheSettings(transforms=Transforms(v=(step,))))
    return plan.save(folder / "plan.yaml")


def steps(plan):
    dim = plan.model.head_dim
    return build(plan.cache.transforms, "value", 0, dim, "cpu", torch.float32).steps


def test_a_file_is_found_beside_its_plan_from_any_working_folder(tmp_path, monkeypatch):
    plan = Plan.load(saved(tmp_path, "tensors/r.safetensors"))
    dim = plan.model.head_dim
    (tmp_path / "tensors").mkdir()
    save_file({"rotation": torch.eye(dim)}, tmp_path / "tensors" / "r.safetensors")
    for folder in (tmp_path, tmp_path / "tensors", tmp_path.parent):
        monkeypatch.chdir(folder)
        assert len(steps(plan)) == 1


def test_a_file_is_beside_its_plan_when_that_is_read_through_a_link(tmp_path):
    (tmp_path / "plans").mkdir()
    plan = Plan.load(saved(tmp_path / "plans", "r.safetensors"))
    save_file({"rotation": torch.eye(plan.model.head_dim)}, tmp_path / "plans" / "r.safetensors")
    (tmp_path / "mine.yaml").symlink_to("plans/plan.yaml")
    assert len(steps(Plan.load(tmp_path / "mine.yaml"))) == 1


def test_where_a_plan_lies_changes_neither_its_checksum_nor_its_text(tmp_path):
    (tmp_path / "other").mkdir()
    here, there = (Plan.load(saved(folder, "r.safetensors")) for folder in (tmp_path, tmp_path / "other"))
    assert here.sha256 == there.sha256
    assert here.to_yaml() == there.to_yaml()


@pytest.mark.parametrize("kind", ["rotate", "center"])
@pytest.mark.parametrize("file", ["../r.safetensors", "/etc/passwd", "a/../../r", "~/r", "link/r.safetensors"])
def test_a_path_that_leads_out_of_the_plans_folder_is_refused(tmp_path, kind, file):
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    path = saved(folder, file, kind)
    with pytest.raises(DocumentError, match=r"leads out of .*, the folder of this file: put the tensors inside it"):
        Plan.load(path)


@pytest.mark.parametrize("file", ["", ".", "a/.."])
def test_the_folder_itself_is_no_tensor_file(tmp_path, file):
    with pytest.raises(DocumentError, match=f"'{file}' names no file: write the name of the one with the tensors"):
        Plan.load(saved(tmp_path, file))


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    plan = Plan.load(saved(tmp_path, "r.safetensors"))
    with pytest.raises(PlanError, match=f"there is no file {tmp_path}/r.safetensors"):
        steps(plan)
