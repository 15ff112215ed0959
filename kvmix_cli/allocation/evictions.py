"""Bits of keys, bits of values and the share of tokens to evict, chosen at once for every layer.

    minimise  sum over layers of loss_k(b_k) + loss_v(b_v) + loss_evicted(e)
    with      sum over layers of (1 - e) (cost_k(b_k) + cost_v(b_v)) + cost of the tier map  <=  budget

What eviction costs is measured by itself (`kvmix profile --score kl --evict 0.25,0.5,0.75`); that its loss adds up with
those of the widths is assumed, as it is for layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from kvmix_kernels.layout import KINDS

from ..errors import BudgetError
from ..plan import CacheSettings, LayerPlan
from ..plan.forms import BitCount
from ..plan.sizes import layer_bytes, parts_of, tensor_bits
from ..plan.tokens import TokenPolicy, TokenShares
from ..state import profile_command
from .curves import falling
from .knapsack import least_cost, least_loss
from .problem import Decision, Problem

PRECISION = 2**10
"""Costs are whole numbers of so many parts of a bit."""


class LayerChoice(NamedTuple):
    """One way to store a layer, with its cost and its loss in the score's unit."""

    plan: LayerPlan
    cost: int
    loss: float


def with_evictions(cache: CacheSettings, shares: tuple[float, ...]) -> CacheSettings:
    """Return cache settings whose layers may evict any of these shares.

    The tokens' score and flush are those of the cache, if it has a policy.

    Raises:
        BudgetError: if a share is no share, or cannot be whole pages of a flush.
    """
    if any(not 0 <= share < 1 for share in shares):
        raise BudgetError(f"shares to evict are from 0 on and below 1, got {', '.join(f'{each:g}' for each in shares)}")
    most = max(shares)
    if not most:
        raise BudgetError("shares to evict need at least one that is more than 0; leave out --evict to evict nothing")
    if cache.tokens is not None and (cache.tokens.tiers or cache.tokens.keep is not None):
        raise BudgetError("shares to evict do not go with tiers, or with a number of tokens to keep; leave out --with")
    pages = math.lcm(*(Fraction(share).limit_denominator(1000).denominator for share in shares))
    flush = cache.page * pages if cache.tokens is None else cache.tokens.flush
    policy = TokenPolicy(score="attention" if cache.tokens is None else cache.tokens.score, evict=most, flush=flush)
    for share in shares:
        for fault in TokenPolicy(evict=share, flush=flush).faults(cache.page) if share else ():
            raise BudgetError(f"{share:g} cannot be evicted: {fault}")
    return cache.model_copy(update={"tokens": policy})


def solve_with_evictions(problem: Problem) -> Decision:
    """Decide widths and shares with the least loss within the budget, or the least cost within the loss.

    Raises:
        BudgetError: if no plan meets the budget, or the score has not measured one of the choices.
    """
    slots = {layer: _choices(problem, layer) for layer in problem.layers}
    if problem.loss_limit is None:
        pinned = sum(_cost(problem, layer, pin) for layer, pin in problem.pins.items())
        allowance = _allowance(problem) - pinned
        floor = sum(choices[0].cost for choices in slots.values())
        if floor > allowance:
            raise BudgetError(
                f"no plan meets the budget, even with {100 * max(problem.evictions):g} % of the tokens evicted"
            )
        chosen = least_loss(list(slots.values()), allowance)
    else:
        problem.check_loss(sum(choices[-1].loss for choices in slots.values()))
        chosen = least_cost(list(slots.values()), problem.loss_limit)
    return {layer: choice.plan for layer, choice in zip(slots, chosen, strict=True)}


def _choices(problem: Problem, layer: int) -> tuple[LayerChoice, ...]:
    """Return the choices for a layer, the cheapest first, without those that cost more and lose no less."""
    losses, most = _evicted(problem, layer), max(problem.evictions)
    k, v = ([(each, problem.tensor_loss(layer, of, each)) for each in problem.tensors(layer, of)] for of in KINDS)
    found = []
    for (key, key_loss), (value, value_loss) in product(k, v):
        for share in problem.evictions:
            plan = LayerPlan(k=key, v=value, tokens=None if share == most else TokenShares(evict=share))
            found.append(LayerChoice(plan, _cost(problem, layer, plan), key_loss + value_loss + losses[share]))
    kept: list[LayerChoice] = []
    for choice in sorted(found, key=lambda each: (each.cost, each.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return tuple(kept)


def _evicted(problem: Problem, layer: int) -> Mapping[float, float]:
    """Return the loss of each share; noise that would make a larger share lose less is levelled out."""
    measured = problem.score.layers[layer].evict
    missing = [share for share in problem.evictions if share and share not in measured]
    if missing:
        model, shares = problem.model.id, ",".join(f"{share:g}" for share in problem.evictions if share)
        command = profile_command(model, "--score", "kl", "--evict", shares, "--replace")
        raise BudgetError(
            f"score '{problem.score_name}' has not measured what evicting {missing[0]:g} of the tokens costs: run "
            f"`{command}`, and add --score kl"
        )
    kept = {round(1000 * (1 - share)): loss for share, loss in measured.items()}
    levelled = falling(kept)
    return {share: levelled[round(1000 * (1 - share))] if share else 0.0 for share in problem.evictions}


def _cost(problem: Problem, layer: int, plan: LayerPlan) -> int:
    """Return the bytes of a layer under a budget of memory, and otherwise bits of a token, tier map included."""
    budget, heads = problem.budget, problem.model.heads(layer)
    if budget.memory is not None:
        return layer_bytes(plan, problem.cache, heads, budget.context, budget.batch, budget.element_bytes).total
    count: BitCount = "stored" if budget.counts_stored else "nominal"
    bits = 0.0
    for part, settings, geometry in parts_of(plan, problem.cache, heads):
        for tensor, kind in part.tensors:
            bits += tensor_bits(tensor, kind, settings, geometry.dim(kind), count) * geometry.elements(kind)
    return round(PRECISION * bits)


def _allowance(problem: Problem) -> float:
    budget, geometries = problem.budget, problem.model.geometries
    if budget.limit is None:
        raise BudgetError("shares to evict need a budget of bits, bytes or loss, not a share of the layers")
    if budget.memory is not None:
        return budget.memory
    return budget.limit * PRECISION * sum(heads.token_elements * len(layers) for heads, layers in geometries.items())
