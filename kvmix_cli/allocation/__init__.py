"""From scores to a plan under a budget. One file a method, each with `solve(problem) -> widths`; no torch.

allocate(profile, Budget(avg_bits=2.3)) -> Plan
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import __version__
from ..errors import BudgetError, did_you_mean
from ..plan import CacheSettings, LayerPlan, Plan, TensorPlan
from ..profile import Profile
from ..windows import Rpc
from .base import Budget, Problem, Widths

__all__ = [
    "K_BITS",
    "PRESETS",
    "V_BITS",
    "Budget",
    "Method",
    "Preset",
    "Problem",
    "Widths",
    "allocate",
    "get_method",
    "methods",
]

K_BITS = (2, 3, 4, 8)
V_BITS = (2, 4, 8)
"""Up to 3.5 bits the two ladders are the paper's; above, they go on."""

_METHODS = {"rank": ".rank", "uniform": ".uniform", "random": ".random"}


class Method(NamedTuple):
    """A way to decide, and which of the problem's `score` and `seed` it depends on."""

    solve: Callable[[Problem], Widths]
    uses: tuple[str, ...]


class Preset(NamedTuple):
    """Settings that belong together."""

    budget: Budget
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    cache: CacheSettings


PRESETS = {
    "paper": Preset(
        budget=Budget(),
        k_bits=(2, 3),
        v_bits=(2, 4),
        cache=CacheSettings(page=32, sink=0, group_size=32, scale_dtype="float16", window=Rpc()),
    )
}


def methods() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


def get_method(name: str) -> Method:
    """A method by name. Raises BudgetError for an unknown one."""
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS) or f"; there are {', '.join(_METHODS)}"
        raise BudgetError(f"unknown method '{name}'{hint}")
    module = importlib.import_module(_METHODS[name], __name__)
    return Method(module.solve, module.USES)


def allocate(
    profile: Profile,
    budget: Budget,
    *,
    method: str = "rank",
    k_bits: Sequence[int] = K_BITS,
    v_bits: Sequence[int] = V_BITS,
    cache: CacheSettings | None = None,
    seed: int = 0,
    score: str = "grad-norm",
) -> Plan:
    """Decide the widths of every layer's keys and values.

    Args:
        k_bits, v_bits: widths to choose from.
        seed: of methods that draw at random.
        score: which of the profile's scores to use.

    Raises:
        BudgetError: if no plan meets the budget; the message has the reachable range.
        DocumentError: if the profile has no such score.
        PlanError: if the model's heads cannot be packed.
    """
    chosen = get_method(method)
    cache = cache or CacheSettings()
    scores = profile.score(score).layers
    problem = Problem(profile.model, scores, budget, tuple(k_bits), tuple(v_bits), cache, seed, score)
    widths = chosen.solve(problem)
    layers = {layer: LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v)) for layer, (k, v) in widths.items()}
    provenance = {
        "kvmix": __version__,
        "method": method,
        **{name: getattr(problem, name) for name in chosen.uses},
        "budget": budget.summary,
        "profile_sha256": profile.sha256,
    }
    return Plan.build(profile.model, layers, cache, provenance)
