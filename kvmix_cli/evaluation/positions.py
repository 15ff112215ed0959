"""Divergence by the position of the predicted token, made from records, without torch.

A mean over a whole document hides whether predictions get worse the more quantized tokens they read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from .bootstrap import ratio
from .results import Estimate, Row, Table

BUCKET = 1024
"""Positions of a bucket."""


class PositionBucket(TypedDict):
    """The predicted tokens at positions `start` to `stop` - 1 of their documents.

    Attributes:
        tokens: how many there are.
        kl: their mean KL(unquantized || subject), in nats.
        same_token: share of them whose most likely token is the unquantized cache's.
    """

    start: int
    stop: int
    tokens: int
    kl: Estimate
    same_token: Estimate


def by_position(records: Sequence[Mapping[str, Any]]) -> list[PositionBucket]:
    """Return the buckets that have tokens, in their order; none for records without divergences."""
    if not records or not all("kl" in record for record in records):
        return []
    sums: defaultdict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for record in records:
        for number, sum_of_one in _sums(record).items():
            sums[number].append(sum_of_one)
    found = []
    for number in sorted(sums):
        kl, same, tokens = zip(*sums[number], strict=True)
        found.append(
            PositionBucket(
                start=number * BUCKET,
                stop=(number + 1) * BUCKET,
                tokens=sum(tokens),
                kl=ratio(kl, tokens),
                same_token=ratio(same, tokens),
            )
        )
    return found


def _sums(record: Mapping[str, Any]) -> dict[int, tuple[float, int, int]]:
    """Return one document's divergence, tokens that stayed the same, and tokens, by the number of the bucket."""
    changed = set(record["changed"])
    found: dict[int, tuple[float, int, int]] = {}
    for index, nats in enumerate(record["kl"]):
        number = (record["first"] + index) // BUCKET
        kl, same, tokens = found.get(number, (0.0, 0, 0))
        found[number] = (kl + nats, same + (index not in changed), tokens + 1)
    return found


def position_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of every row's divergence by position; none where all tokens are in one bucket."""
    found = {row.plan: buckets for row in rows if (buckets := by_position(row.records))}
    if max(map(len, found.values()), default=0) < 2:
        return []
    cells = [
        [plan, f"{each['start']}-{each['stop'] - 1}", str(each["tokens"]), _text(each["kl"]), _text(each["same_token"])]
        for plan, buckets in found.items()
        for each in buckets
    ]
    columns = ("plan", "position", "tokens", "kl", "same token")
    return [Table("divergence by position of the predicted token", columns, cells, "kl in nats a token\n")]


def _text(estimate: Estimate) -> str:
    interval = "" if estimate.low == estimate.high else f" [{estimate.low:.3g}, {estimate.high:.3g}]"
    return f"{estimate.value:.4g}{interval}"
