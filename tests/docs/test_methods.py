"""The scripts of docs/methods.md: what they compare fits its budget, and differences are what they say."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commandline import kvmix

from kvmix_cli.models.loading import load_info
from kvmix_cli.plan import Plan

ROOT = Path(__file__).parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods, against, head_budgets = example("methods"), example("against"), example("head_budgets")
INFO = load_info("builtin:tiny")
CASES = [(name, budget) for name, budgets in methods.METHODS.items() for budget in budgets]


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_every_method_has_a_plan_within_every_budget(name, budget):
    plan = methods.widest(INFO, budget, methods.METHODS[name][budget], methods._widths(name))
    assert budget - 0.4 < plan.bits.stored <= budget + methods.SLACK
    page = f"| `{name}` | {plan.bits.nominal:.2f} | {plan.bits.stored:.2f} |"
    assert page in (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("name", methods.HALVES)
def test_halves_have_the_same_bytes(name):
    plan = methods.half(INFO, methods.HALVES[name])
    assert (plan.bits.nominal, plan.bits.stored) == (2.0, 2.3125)
    assert f"`{name.removesuffix('-16')}`" in (ROOT / "docs" / "methods.md").read_text()


def in_this_process(command, **_):
    """Run `kvmix` as a subprocess would be, without starting one."""
    return SimpleNamespace(returncode=kvmix(*command[1:]).exit_code)


@pytest.mark.slow
def test_layers_get_the_most_that_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMIX_PROFILES_DIR", str(ROOT / "profiles"))
    monkeypatch.setattr(methods.subprocess, "run", in_this_process)
    plain, mixed = (methods.layered(INFO, 3.0, methods.LAYERED[name], tmp_path) for name in ("layers", "layers-mixkvq"))
    assert 2.95 < mixed.bits.stored <= plain.bits.stored <= 3.005
    assert len({layer.short for layer in plain.layers.values()}) > 1


def write(folder, records):
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_differences_are_paired(tmp_path):
    first = write(tmp_path / "a", [{"tokens": 10, "nll": 5.0 + i, "kl": [0.5, i]} for i in range(5)])
    second = write(tmp_path / "b", [{"tokens": 10, "nll": 7.0 + i, "kl": [1.5, i]} for i in range(5)])
    found = against.difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((-0.2, -0.2, -0.2))
    found = against.difference(first, second, "kl")
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    recalled = [write(tmp_path / name, [{"tokens": 9, "recalled": n}] * 2) for name, n in (("c", 4), ("d", 1))]
    assert against.difference(*recalled).value == 3


@pytest.mark.parametrize(("best", "expected"), [((8, 0), [0.75, 0.25]), ((4, 4), [0.5, 0.5]), ((7, 1), [0.75, 0.25])])
def test_a_head_keeps_its_share_of_the_best_tokens(best, expected):
    scores = torch.stack([(torch.arange(8) < count).float() + torch.rand(8) / 2 for count in best])
    assert head_budgets.shares([scores] * 2) == expected


@pytest.mark.slow
def test_budgets_of_heads_keep_as_much_as_heads_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(head_budgets, "PROMPTS", 1)
    monkeypatch.setattr(head_budgets, "LENGTH", 256)
    head_budgets.main("builtin:tiny", tmp_path / "plan.yaml")
    plan = Plan.load(tmp_path / "plan.yaml")
    assert (plan.bits.nominal, plan.bits.stored) == (2.0, 2.3125)
    assert any(layer.head_groups for layer in plan.layers.values())
