"""The programs of examples/ that users start from: the shell script as a CI job would run it, and those in Python."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import forking
import pytest

from kvmix_cli.evaluation.tasks.longbench.data import open_source, read_questions
from kvmix_cli.evaluation.tasks.longbench.datasets import DATASETS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GATE = EXAMPLES / "gate.sh"
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


def printed(name, capsys, *arguments):
    """Run a program as its user would, in this process; return what it prints."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.slow
def test_jobs_of_an_array_finish_one_leaderboard(tmp_path):
    """Two at a time, on a few documents: every row is measured once, and both come to the same table."""
    forking.run("profile", "builtin:tiny", "--samples", 1, "--seq-len", 64, cwd=tmp_path, check=True)
    kvmix, inherited = forking.in_shell()
    fewer = "--methods rank --random-plans 1 --stored-bits 3,3.5 --limit 2 --length 200 --prefix 100 --threads 1"
    command = tmp_path / "bin" / "kvmix"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {kvmix} "$@" {fewer}\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    jobs = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / "sweep.sbatch"), "builtin:tiny"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "TASKS": "perplexity", "SLURM_ARRAY_TASK_ID": str(number)},
            pass_fds=inherited,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    tables = [job.communicate(timeout=600)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert tables[0] == tables[1]
    folders = list((tmp_path / "results").glob("perplexity__*"))
    assert len(folders) > 4
    for folder in folders:
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 2
        assert "metrics" in json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_transformers_generates_from_a_plan_file(capsys):
    out = printed("generate", capsys)
    same = [int(count) for count in re.findall(r"^(\d+) of 24 new tokens are the same", out, re.MULTILINE)]
    packed, plain = map(float, re.search(r"([\d.]+) MiB instead of ([\d.]+) \(2\.75 stored", out).groups())
    assert len(same) == 2
    assert max(same) > 12, "2.75 bits change little of what is most likely"
    assert packed < plain / 3


@pytest.mark.slow
def test_lm_eval_asks_caches_of_several_widths(capsys):
    pytest.importorskip("lm_eval")
    out = printed("lm_eval_tasks", capsys, "--limit", 2, "--bits", "16,2")
    read = dict(re.findall(r"^(\d+) bits, [\d.]+ stored, (\d+)% read quantized$", out, re.MULTILINE))
    assert list(read) == ["16", "2"]
    assert read["16"] == "0"
    assert int(read["2"]) > 50
    assert len(re.findall(r"which_text_follows acc [01]\.\d+ acc_norm", out)) == 2


@pytest.mark.slow
def test_a_long_prompt_is_read_once(tmp_path, capsys):
    options = ("--text", EXAMPLES / "generate.py", "--file", tmp_path / "shared.safetensors")
    first, second = printed("prompt_cache", capsys, *options), printed("prompt_cache", capsys, *options)
    found = re.search(r"^(\d+) tokens in .*: [\d.]+ MiB, ([\d.]+) times less than in bfloat16\n", first)
    assert found and float(found[2]) > 1
    taken = [
        tuple(map(int, pair)) for pair in re.findall(r"^(\d+) of (\d+) tokens were in the file", first, re.MULTILINE)
    ]
    assert len(taken) == 2
    assert all(int(found[1]) - 1 <= held < tokens for held, tokens in taken)
    assert "tokens in " not in second.splitlines()[0], "the file is used, not made again"
    answers = [re.sub(r"loaded in \d+ ms", "", out) for out in (first[found.end() :], second)]
    assert answers[0] == answers[1]


def test_values_in_longbenchs_format_are_stated_once_and_not_in_what_is_cut(tmp_path):
    spec = importlib.util.spec_from_file_location("longbench_values", EXAMPLES / "longbench_values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "data")
    records = [json.loads(line) for line in (tmp_path / "data" / "trec.jsonl").read_text().splitlines()]
    assert len(records) == module.RECORDS
    for each in records:
        (answer,), name = each["answers"], each["input"].split()[1]
        assert f"\n{name} = {answer}\n" in each["context"]
        assert answer in each["all_classes"] and len(set(each["all_classes"])) == module.VALUES
        assert max(map(each["context"].index, each["all_classes"])) < 0.4 * len(each["context"])
    found = read_questions(open_source(tmp_path / "data"), "trec.jsonl", DATASETS["trec"], strict=True)
    assert len(found.questions) == len(records), "they are in the schema that kvmix reads"


@pytest.mark.slow
def test_rows_decode_in_turns_beside_equal_widths(tmp_path, capsys):
    shutil.copytree(PLANS.parent, tmp_path / "tiny", ignore=shutil.ignore_patterns("plans"))
    short = ("--length", 256, "--turns", 2, "--turn", 2)
    out = printed(
        "speeds", capsys, "builtin:tiny", tmp_path / "tiny" / "profile.yaml", "--preset", "transform-2", *short
    )
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["unquantized", "kivi-2", "transform-2"]
    assert rows[0][3] == "1.00 [1.00, 1.00]"
    assert int(rows[0][1]) > int(rows[1][1]), "the unquantized row takes more bytes"
    median, low, high = map(float, re.findall(r"[\d.]+", rows[1][3]))
    assert low <= median <= high
