"""The scripts that measure on a GPU work: they run small, without one, in Triton's interpreter."""

from pathlib import Path

import forking
import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "bench_quantize_gpu.py": [],
    "bench_attend_gpu.py": ["--batches", "1", "--contexts", "256"],
    "bench_generate_gpu.py": ["--settings", "160+2", "--steps", "1"],
}


def run(script, *arguments):
    path = ROOT / "kernels" / "bench" / script
    code = f"import interpreting; interpreting.run_script({str(path)!r})"
    return forking.run(*arguments, code=code, imports=forking.INTERPRETER)


@pytest.mark.slow
@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_dry_run_measures_nothing_and_saves_nothing(script, tmp_path):
    result = run(script, "--dry-run", "--out", tmp_path / "results", *ARGUMENTS[script])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("a dry run: no figure means anything")
    assert "ERROR" not in result.stdout
    assert not (tmp_path / "results").exists()


def test_the_summary_shows_every_row(tmp_path):
    columns = "date,machine,isa,threads,torch,op,shape,context,name,ms,gb_per_s,ratio"
    row = "2026-01-01,A GPU,sm_90,,2.13,attend-gpu,llama batch 8,4096,kvmix 2,0.5,1,4.2"
    (tmp_path / "results.csv").write_text(f"{columns}\n{row}\n")
    assert run("summary.py", tmp_path).returncode == 0
    assert "| llama batch 8 | 4096 | kvmix 2 | 0.5 | 1 | 4.2 |" in (tmp_path / "summary.md").read_text()
