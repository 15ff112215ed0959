"""Leaderboards as tables, and as plain data for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...evaluation.results import Table
from ...studies.leaderboard.board import Board
from ...studies.leaderboard.standings import Comparison, Standing
from .evaluation import format_estimate, rows_json

DIVERGENCES = (("KL", "kl"), ("same token", "same_token"))
"""Columns of the comparison with the unquantized cache's predictions, and their metrics."""


def tables(board: Board) -> list[Table]:
    """Return a table for each budget, and one of the correlations of predicted and measured losses."""
    budgets = dict.fromkeys(each.stored_bits for each in board.standings)
    found = [_budget_table(board, stored_bits) for stored_bits in budgets]
    return [*found, _correlation_table(board)]


def _correlation_table(board: Board) -> Table:
    rows = [[score, "-" if rho is None else f"{rho:.3f}", f"{n}"] for score, (rho, n) in board.correlations.items()]
    measured = "".join(f"{report.description}\n" for report in board.reports)
    return Table("predicted against measured loss", ["score", "Spearman", "plans"], rows, measured)


def _budget_table(board: Board, stored_bits: float) -> Table:
    standings = [each for each in board.standings if each.stored_bits == stored_bits]
    scores, recall = list(board.correlations), any(report.task == "recall" for report in board.reports)
    measured = ["measured", "perplexity", *(name for name, _ in DIVERGENCES), *(["recall"] if recall else [])]
    columns = ["plan", "nominal", "stored", *scores, *measured]
    title = f"at most {stored_bits:g} stored bits: loss in nats a token, as scores predict it and as measured"
    said = [_sentence(each) for each in board.comparisons if each.stored_bits == stored_bits]
    said += [f"left out: {each.name}, {each.reason}" for each in board.left_out if each.stored_bits == stored_bits]
    rows = [_cells(each, scores, recall) for each in standings]
    return Table(title, columns, rows, "".join(f"{line}\n" for line in said))


def _cells(each: Standing, scores: Sequence[str], recall: bool) -> list[str]:
    """Return names, bits, every score's prediction, and the measurements; a dash where there is none."""
    bits = [f"{each.plan.bits.nominal:.2f}", f"{each.plan.bits.stored:.2f}"]
    predicted = [f"{each.predicted[score]:.4f}" if score in each.predicted else "-" for score in scores]
    share = "-" if each.loss is None else f"{100 * math.expm1(each.loss.value):+.2f} %"
    recalled = [format_estimate(each.rows["recall"].metrics.get("recall"), "")] if recall else []
    metrics = each.rows["perplexity"].metrics
    diverged = [format_estimate(metrics.get(metric), "") for _, metric in DIVERGENCES]
    return [", ".join(each.names), *bits, *predicted, format_estimate(each.loss, "nats"), share, *diverged, *recalled]


def _sentence(each: Comparison) -> str:
    share = "" if each.ratio is None else f", {each.ratio:.2f} times its loss"
    return f"{each.first} against {each.second}: {format_estimate(each.difference, 'nats')} nats a token{share}"


def plan_names(board: Board) -> dict[str, list[str]]:
    """Return the names of every plan, each with its budget, by the name of the plan's runs."""
    named: dict[str, list[str]] = {}
    for each in board.standings:
        names = [f"{name} at {each.stored_bits:g}" for name in each.names]
        named.setdefault(each.rows["perplexity"].plan, []).extend(names)
    return named


def board_json(board: Board) -> dict[str, Any]:
    """Return all rows, each plan once by the name of its runs, and the standings with these names."""
    return {
        "tokens": sum(report.tokens for report in board.reports),
        "rows": rows_json(board.reports),
        "reference": board.reports[0].reference.plan,
        "gates": [],
        "leaderboard": {
            "champion": board.champion,
            "standings": [_standing_json(each) for each in board.standings],
            "comparisons": [asdict(each) for each in board.comparisons],
            "correlations": {score: {"spearman": rho, "plans": n} for score, (rho, n) in board.correlations.items()},
            "left_out": [asdict(each) for each in board.left_out],
        },
    }


def _standing_json(each: Standing) -> dict[str, Any]:
    return {
        "stored_bits": each.stored_bits,
        "names": list(each.names),
        "plan": each.rows["perplexity"].plan,
        "short": each.plan.short,
        "bits": each.plan.bits.model_dump(),
        "predicted": dict(each.predicted),
    }
