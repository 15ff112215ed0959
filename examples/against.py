"""Paired difference of two plans' losses on the same samples, with a 95 % interval.

    python examples/against.py results/perplexity__builtin--tiny__a results/perplexity__builtin--tiny__b
    python examples/against.py results/perplexity__builtin--tiny__a results/perplexity__builtin--tiny__b kl

Of two runs of `kvmix eval --task perplexity`: nats a token, negative where the first is better; with `kl` of the
divergence from the unquantized cache, in place of the loss. Of two of `recall`: values recalled in an exercise,
positive where the first is better.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvmix_cli.evaluation.bootstrap import ratio
from kvmix_cli.evaluation.results import Estimate


def difference(first: Path, second: Path, of: str = "nll") -> Estimate:
    """Return the first run's sums less the second's, over all that was scored, of `nll` or `kl` if it has those."""
    pairs = list(zip(_records(first), _records(second), strict=True))
    changes = [_sum(a, of) - _sum(b, of) for a, b in pairs]
    return ratio(changes, [a["tokens"] if "nll" in a else 1 for a, _ in pairs])


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def _sum(record: dict, of: str) -> float:
    if "nll" not in record:
        return record["recalled"]
    return record["nll"] if of == "nll" else sum(record["kl"])


if __name__ == "__main__":
    estimate = difference(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    print(f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]")
