"""Published systems at equal stored bytes as tables: a row for each plan, from the lowest loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...evaluation.results import Estimate, Table
from .evaluation import format_estimate

if TYPE_CHECKING:
    from ...plan import Plan
    from ...studies.leaderboard import Board
    from ...studies.leaderboard.standings import Standing

COLUMNS = (
    ("KL", "perplexity", "kl", ""),
    ("same token", "perplexity", "same_token", ""),
    ("recall", "recall", "recall", ""),
    ("LongBench", "longbench", "longbench", ""),
    ("bytes", "memory", "measured_bytes", "bytes"),
    ("tokens/s", "throughput", "decode_tokens_per_s", ""),
)
"""Title, task without its members, metric and unit of what is shown of each row, if its task was measured."""


def system_tables(board: Board, context: int) -> list[Table]:
    """Return a table for each size.

    Args:
        context: tokens of a context whose bytes are stated as bits an element.
    """
    sizes = dict.fromkeys(each.stored_bits for each in board.standings)
    return [_table(board, stored_bits, context) for stored_bits in sizes]


def _table(board: Board, stored_bits: float, context: int) -> Table:
    standings = [each for each in board.standings if each.stored_bits == stored_bits]
    measured = {report.task.partition(":")[0]: report.task for report in board.reports}
    shown = [(title, measured[task], metric, unit) for title, task, metric, unit in COLUMNS if task in measured]
    against = {
        each.first: format_estimate(each.difference, "nats")
        for each in board.comparisons
        if each.stored_bits == stored_bits
    }
    head = ("system", "nominal", "stored", f"bits at {context}", "loss", f"against {board.champion}")
    rows = [
        [
            ", ".join(each.names),
            f"{each.plan.bits.nominal:.2f}",
            f"{each.plan.bits.stored:.2f}",
            f"{bits_at(each.plan, context):.2f}",
            format_estimate(each.loss, "nats"),
            against.get(each.names[0], "-"),
            *(format_estimate(_metric(each, task, metric), unit) for _, task, metric, unit in shown),
        ]
        for each in standings
    ]
    title = f"{stored_bits:g} stored bits: increase of the loss in nats a token"
    notes = "".join(f"{line}\n" for line in _notes(board, stored_bits))
    return Table(title, (*head, *(title for title, *_ in shown)), rows, notes)


def bits_at(plan: Plan, context: int) -> float:
    """Return all bytes of a context as bits an element: also what is in full precision, in 16 bits."""
    elements = plan.unquantized_bytes(context, element_bytes=1)
    return 8 * plan.cache_bytes(context).total / elements


def _metric(standing: Standing, task: str, metric: str) -> Estimate | None:
    return standing.rows[task].metrics.get(metric)


def _notes(board: Board, stored_bits: float) -> Iterator[str]:
    """Yield rows that are missing, with the reason, and what was measured."""
    for reason, names in _reasons(board, stored_bits).items():
        yield f"left out: {', '.join(names)}: {reason}"
    for report in board.reports:
        yield report.description


def _reasons(board: Board, stored_bits: float) -> dict[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for each in board.left_out:
        if each.stored_bits == stored_bits:
            found.setdefault(each.reason, []).append(each.name)
    return {reason: tuple(names) for reason, names in found.items()}
