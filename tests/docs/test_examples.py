"""The shell script of docs/evaluation.md, as a CI job would run it."""

import json
import os
import subprocess
from pathlib import Path

import forking
import pytest

ROOT = Path(__file__).parents[2]
GATE = ROOT / "examples" / "gate.sh"
PLANS = ROOT / "profiles" / "builtin--tiny" / "plans"


def run(folder, plan):
    """Run the script with a `kvmix` that evaluates shorter texts."""
    command = folder / "bin" / "kvmix"
    command.parent.mkdir()
    kvmix, inherited = forking.in_shell()
    shorter = f'test "$1" = eval && set -- "$@" --length 640\nexec {kvmix} "$@"'
    command.write_text(f"#!/bin/sh\n{shorter}\n")
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "SAMPLES": "1"}
    return subprocess.run(
        ["bash", str(GATE), str(plan)],
        cwd=folder,
        env=environment,
        pass_fds=inherited,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_good_plan_passes_and_leaves_its_numbers_and_a_page(tmp_path):
    done = run(tmp_path, PLANS / "ilp-stored-2.75.yaml")
    assert done.returncode == 0, done.stderr
    assert all(gate["passed"] for gate in json.loads((tmp_path / "results.json").read_text())["gates"])
    assert "<html" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.md").read_text().startswith("<!--") or "|" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "code", "said"), [("0-7:k1v1", 3, "perplexity"), ("nowhere.yaml", 1, "nowhere.yaml")])
def test_a_bad_plan_fails_with_the_reason(tmp_path, plan, code, said):
    if plan != "nowhere.yaml":
        text = (PLANS / "paper.yaml").read_text()
        head = text[: text.index("bits:")]
        cache = next(line for line in text.splitlines() if line.startswith("cache:"))
        plan = tmp_path / "one-bit.yaml"
        plan.write_text(f'{head}{cache}\nlayers: "0-7:k1v1"\n')
    done = run(tmp_path, plan)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
