"""Paired difference of two plans' losses on the same samples, with a 95 % interval.

    python examples/against.py results/perplexity__builtin--tiny__a results/perplexity__builtin--tiny__b

Of two runs of `kvmix eval --task perplexity`: nats a token, negative where the first is better. Of two of `recall`:
values recalled in an exercise, positive where the first is better.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvmix_cli.evaluation.bootstrap import ratio
from kvmix_cli.evaluation.results import Estimate


def difference(first: Path, second: Path) -> Estimate:
    """Return the first run's sums less the second's, over all that was scored."""
    pairs = list(zip(_records(first), _records(second), strict=True))
    changes = [_sum(a) - _sum(b) for a, b in pairs]
    return ratio(changes, [a["tokens"] if "nll" in a else 1 for a, _ in pairs])


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def _sum(record: dict) -> float:
    return record["nll"] if "nll" in record else record["recalled"]


if __name__ == "__main__":
    estimate = difference(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]")
