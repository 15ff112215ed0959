"""docs/systems.md: a row for every preset and every system of the field, and figures that are those of the tables."""

import re
from pathlib import Path

import pytest

from kvmix_cli.plan.presets import presets
from kvmix_cli.studies.leaderboard.systems import COMBINATIONS, STORED_BITS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, TABLES = (DOCS / "systems.md").read_text(), (DOCS / "systems-tables.md").read_text()
STATES = {"works", "partly", "not yet", "export", "skipped", "nothing to build"}
SYSTEMS = """
KVmix, MiKV, MixKVQ, KVTuner, ZipCache, RotateKV, SVDq, AsymKV, MiniKV, QAQ, Cocktail, TaDA, XQuant, AQUA-KV,
CQ, QJL, DecoQuant, QuantizedPruning, PM-KVQ, Kitty, KIVI, BiSup, ZipVL, PQCache, SubGen, D2O, KVMerger,
MorphKV, BalanceKV, KVCrush, CoKV, BaKlaVa, Fast KVzip, ReCalKV, Eigen Attention, CLLA, HCache, ShadowKV,
TriForce, TokenSelect, INTP, longctx_bench, kvpress, StreamingLLM, SnapKV, PyramidKV, AdaKV, H2O, TOVA,
BumbleBee, KeyDiff, Expected attention, KVzip, LOOK-M, CaM, ChunkKV, VL-Cache, Quest, DuoAttention, OSCAR,
OScaR, KVarN, Block-GTQ, KVTC, SPECTRA, AATC, KVQuant, TurboQuant, PolarQuant, VecInfer, NSNQuant, CommVQ,
HIGGS, KVLinC, SQuat, SAW-INT4, NVFP4 KV, InnerQ, RateQuant, AlignedKV, OjaKV, QuaRot, fraQtl, EDEN, LU-KV, InfLLM,
LLMLingua-2
"""
"""Those of the literature that kvmix grew from."""


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


ROWS = [
    row for line in PAGE.splitlines() if line.startswith("| ") and len(row := cells(line)) == 7 and row[2] in STATES
]


@pytest.mark.parametrize("name", re.split(r",\s*", SYSTEMS.strip()))
def test_every_system_has_a_row(name):
    own = [row for row in ROWS if name in re.split(r", | \(|\)", row[0])]
    assert len(own) == 1, name


def test_every_preset_has_a_row():
    named = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[1])}
    assert named - set(COMBINATIONS) == set(presets())


def test_what_does_not_work_says_why_and_what_works_says_how():
    for name, _, state, how, _, _, differs in ROWS:
        assert how if state == "works" else differs, name


@pytest.mark.parametrize("size", STORED_BITS)
def test_every_row_of_the_command_is_in_every_table_or_left_out(size):
    section = TABLES.split(f"\n## {size:g} stored bits\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`([^`]+)`", section)) >= {*presets(), *COMBINATIONS}


def measured_rows(title, page=TABLES):
    """Return the cells of each row of a section's table, by the row's names."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith("| `")]
    return {name: row for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def test_rows_on_smollm2_are_those_of_the_command():
    smol = measured_rows("SmolLM2-135M")
    assert {"kivi-2", "transform-2", "layers"} <= set(smol) <= {*presets(), *COMBINATIONS}
    assert all(cell in ("", "no plan") or float(cell) > 0 for row in smol.values() for cell in row[1:5])


def test_the_one_table_has_the_figures_of_the_others():
    one, smol = measured_rows("One table", PAGE), measured_rows("SmolLM2-135M")
    for place, size in enumerate(STORED_BITS):
        tiny = measured_rows(f"{size:g} stored bits")
        for name, row in one.items():
            losses, recalled = (tiny[name][4].split()[0], tiny[name][7]) if name in tiny else ("-", "-")
            assert row[5].split(", ")[place] == recalled, name
            assert rounded(row[1 + place], losses), name
            assert rounded(row[7 + place], smol[name][1 + place].replace("no plan", "-") if name in smol else ""), name
    assert {name: row[11] for name, row in one.items() if row[11] != "-"} == {
        name: row[3] for name, row in measured_rows("2.5 stored bits").items()
    }
    speeds = {name: row[3].split()[0] for name, row in measured_rows("Speed").items()}
    assert {name: row[12] for name, row in one.items()} == {name: speeds[name] for name in one}


def rounded(shown, measured):
    """Whether a cell shows another one, rounded to two digits if it is a number."""
    return shown == measured or (bool(shown and measured) and abs(float(shown) / float(measured) - 1) < 0.06)


def test_figures_of_systems_are_those_of_the_table():
    measured = {name: float(row[4].split()[0]) for name, row in measured_rows("2.5 stored bits").items()}
    for row in ROWS:
        names, figures = re.findall(r"`([^`]+)`", row[1]), row[5].split(" / ")
        for name, figure in zip(names, figures, strict=True) if names else ():
            known = {f"{measured[name]:.3f}"} if name in measured else {"no plan", "not measured"}
            assert abs(float(figure) - measured[name]) < 6e-4 if name in measured else figure in known, name
