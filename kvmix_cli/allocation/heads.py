"""What each KV head gets of its own: widths, a budget of tokens, or all of its tokens.

A score by KV head (`kvmix profile --granularity head`) says what the heads of a layer are worth. There are three uses:

    widths      each head is a slot of the exact solver; the layer's loss is shared out by the heads' scores
    budgets     the tokens that a plan keeps are shared out over all heads of all layers, in proportion to their scores,
                each sure of a part of the mean (AdaKV, arXiv 2407.11550, whose scores are of the prompt; CoKV, arXiv
                2502.17501; BaKlaVa, arXiv 2502.13176)
    whole       the heads with the highest scores keep all tokens, the others what the policy leaves them (DuoAttention,
                arXiv 2410.10819, whose heads are found by training)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from kvmix_kernels.layout import KINDS, Kind

from ..errors import BudgetError
from ..plan import LayerPlan, Plan
from ..plan.document.fields import MOST_TOKENS
from ..plan.layers import HeadGroup
from ..plan.tokens import TokenShares
from ..profile import Profile, TensorScore
from ..proportions import shared_out
from ..state import profile_command
from .choices import Choices, TensorChoice, undominated
from .problem import Decision, Problem

SURE = 0.2
"""Part of the mean budget that every head is sure of (AdaKV's)."""
HeadSlot = tuple[int, Kind, int]
"""The keys, or values, of one KV head of a layer."""


def choices_by_head(problem: Problem) -> dict[HeadSlot, Choices]:
    """Return the choices for every head's keys and values. Raises BudgetError if the score has no heads."""
    found: dict[HeadSlot, Choices] = {}
    for layer in problem.layers:
        one = problem.model.heads(layer).model_copy(update={"kv_heads": 1})
        for kind in KINDS:
            score = getattr(problem.score.layers[layer], kind[0])
            for head, share in enumerate(_shares(score, problem.score_name, problem.profile)):
                found[layer, kind, head] = undominated(
                    TensorChoice(
                        tensor,
                        problem.budget.cost(tensor, kind, problem.cache, one),
                        share * problem.tensor_loss(layer, kind, tensor),
                    )
                    for tensor in problem.tensors(layer, kind)
                )
    return found


def decide_by_head(chosen: Mapping[HeadSlot, TensorChoice]) -> Decision:
    """Return the layers that one choice for every head makes: what most heads have, and groups of the others."""
    by_layer = defaultdict[int, dict[int, LayerPlan]](dict)
    for layer, kind, head in chosen:
        if kind == "key":
            k, v = (chosen[layer, of, head].tensor for of in KINDS)
            by_layer[layer][head] = LayerPlan(k=k, v=v)
    return {layer: grouped(heads) for layer, heads in sorted(by_layer.items())}


def grouped(heads: Mapping[int, LayerPlan]) -> LayerPlan:
    """Return a layer from the storage of each of its heads.

    Heads that follow the plan's token policy are the layer's own: a group has what it does not state from its layer.
    """
    plain = [head for head in sorted(heads) if heads[head].tokens is None] or sorted(heads)
    most = Counter(heads[head] for head in plain).most_common(1)[0][0]
    others = defaultdict[LayerPlan, list[int]](list)
    for head, plan in sorted(heads.items()):
        if plan != most:
            others[plan].append(head)
    groups = tuple(
        HeadGroup(
            heads=tuple(group),
            k=None if plan.k == most.k else plan.affine[0][0],
            v=None if plan.v == most.v else plan.affine[1][0],
            tokens=None if plan.tokens == most.tokens else plan.tokens,
        )
        for plan, group in others.items()
    )
    return most.model_copy(update={"head_groups": groups})


def with_budgets(plan: Plan, profile: Profile, score: str, sure: float = SURE, context: int | None = None) -> Plan:
    """Return a plan whose heads share out the tokens that it keeps, in proportion to a score.

    Args:
        plan: of a cache that keeps a number of tokens.
        profile: scores of its model.
        score: score with heads.
        sure: part of the mean that every head has, whatever its score.
        context: tokens that no head needs more of; what is left by heads that reach it goes to the others.

    Raises:
        BudgetError: if the plan keeps no number of tokens, or the score has no heads.
    """
    if plan.cache.kept is None:
        raise BudgetError("budgets of KV heads need a number of tokens to keep: add --with h2o-512, or another preset")
    page, fixed = plan.cache.page, (plan.cache.tokens.keep or 0) - plan.cache.kept if plan.cache.tokens else 0
    slots = [(layer, head) for layer in plan.layers for head in range(plan.model.heads(layer).kv_heads)]
    rooms = {layer: storage.settings(plan.cache).kept or 0 for layer, storage in plan.layers.items()}
    total = sum(rooms[layer] for layer, _ in slots) // page
    certain = [int(sure * rooms[layer]) // page for layer, _ in slots]
    worth = _worth(plan, profile, score)
    most = [(MOST_TOKENS if context is None else max(0, context - fixed)) // page - own for own in certain]
    pages = shared_out(total - sum(certain), [worth[slot] for slot in slots], [max(0, each) for each in most])
    keep = {slot: fixed + page * (more + own) for slot, more, own in zip(slots, pages, certain, strict=True)}
    return _with_tokens(plan, {slot: TokenShares(keep=tokens) for slot, tokens in keep.items()}, "budgets")


def with_whole_heads(plan: Plan, profile: Profile, score: str, share: float) -> Plan:
    """Return a plan in which a share of all KV heads, those with the highest scores, keep all of their tokens.

    Raises:
        BudgetError: if the plan drops no tokens, or the score has no heads.
    """
    if not plan.evicts:
        raise BudgetError(
            "heads that keep all tokens need others that do not: add --with streaming-512, or another preset"
        )
    worth = _worth(plan, profile, score)
    best = sorted(worth, key=lambda slot: (-worth[slot], slot))[: round(share * len(worth))]
    whole = TokenShares(evict=0.0)
    own = {slot: whole if slot in set(best) else plan.layers[slot[0]].tokens for slot in worth}
    return _with_tokens(plan, own, f"whole:{share:g}")


def _with_tokens(plan: Plan, tokens: Mapping[tuple[int, int], TokenShares | None], how: str) -> Plan:
    layers = {}
    for index, layer in plan.layers.items():
        of_heads = dict(_heads(index, layer, plan))
        layers[index] = grouped(
            {head: own.model_copy(update={"tokens": tokens[index, head]}) for head, own in of_heads.items()}
        )
    return Plan.build(plan.model, layers, plan.cache, {**plan.provenance, "by_head": how})


def _heads(index: int, layer: LayerPlan, plan: Plan) -> Iterator[tuple[int, LayerPlan]]:
    """Yield the storage of each KV head of a layer."""
    for heads, part in layer.parts(plan.model.heads(index).kv_heads):
        yield from ((head, part) for head in heads)


def _worth(plan: Plan, profile: Profile, name: str) -> dict[tuple[int, int], float]:
    """Return the score of every KV head, of keys and values together."""
    layers = profile.score(name).layers
    found: dict[tuple[int, int], float] = {}
    for index in plan.layers:
        pair = [_of_heads(tensor, name, profile) for tensor in (layers[index].k, layers[index].v)]
        found |= {(index, head): max(0.0, k + v) for head, (k, v) in enumerate(zip(*pair, strict=True))}
    return found


def _shares(tensor: TensorScore, name: str, profile: Profile) -> list[float]:
    """Return the share that each KV head has in a tensor's score."""
    heads = [max(0.0, head) for head in _of_heads(tensor, name, profile)]
    total = sum(heads)
    return [head / total if total else 1 / len(heads) for head in heads]


def _of_heads(tensor: TensorScore, name: str, profile: Profile) -> list[float]:
    if tensor.heads is None:
        command = profile_command(profile.model.id, "--score", name, "--granularity", "head")
        raise BudgetError(f"score '{name}' was not measured by KV head: run `{command} --replace`")
    return tensor.heads
