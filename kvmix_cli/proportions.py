"""Whole numbers in proportion to weights, with a sum that is given."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Return whole numbers that add up to `total`, or to all of `most`, in proportion to weights, each at most `most`.

    The largest remainders are rounded up. What a number cannot take goes to the others.
    """
    found = dict[int, int]()
    while True:
        rest = [place for place in range(len(weights)) if place not in found]
        shares = _in_proportion(total - sum(found.values()), [weights[place] for place in rest])
        full = [place for place, share in zip(rest, shares, strict=True) if share >= most[place]]
        if not full:
            found |= dict(zip(rest, shares, strict=True))
            return [found[place] for place in range(len(weights))]
        found |= {place: most[place] for place in full}


def _in_proportion(total: int, weights: Sequence[float]) -> list[int]:
    whole = sum(weights)
    exact = [total * weight / whole if whole else total / len(weights) for weight in weights]
    floors = [int(number) for number in exact]
    order = sorted(range(len(exact)), key=lambda place: (floors[place] - exact[place], place))
    for place in order[: total - sum(floors)]:
        floors[place] += 1
    return floors
