"""Scores of tokens by the attention that they have received."""

from __future__ import annotations

from torch import Tensor

from .tokens import TOKEN_SCORES, Candidates, TokenScore


@TOKEN_SCORES.register("attention")
class AccumulatedAttention(TokenScore):
    """Attention that a token has received, `S_i = sum_t softmax(q_t K / sqrt d)_i`.

    After H2O (arXiv 2306.14048, section 4) and MiKV (arXiv 2402.18096, section 3). Differs from both: a prompt's sum is
    estimated from a sample of its queries, and a token's tier is chosen once, when it leaves the window, instead of at
    every step.
    """

    follows = True


@TOKEN_SCORES.register("normalised")
class NormalisedAttention(TokenScore):
    """Attention that a token has received from each query that could see it (ZipCache, arXiv 2405.14256, section 4.2).

    An accumulated sum favours the tokens that have been there longest.
    """

    extrapolates = False

    def importance(self, tokens: Candidates) -> Tensor:
        if tokens.observers is None:
            raise AssertionError("the score `normalised` needs the number of observers")
        return tokens.received / tokens.observers.clamp(min=1)


@TOKEN_SCORES.register("snapkv")
class LastQueries(TokenScore):
    """Attention received from the last 32 queries, in the mean over 5 neighbours (SnapKV, arXiv 2404.14469, section 4).

    `S_i = mean over j in [i - 2, i + 2] of sum over the last W queries t of softmax(q_t K / sqrt d)_j`. Differs: the
    weights of a group's query heads are summed, and decoded tokens are scored alike when they leave the window.
    """

    queries = "last"
    pool = ("mean", 5)
    follows = True


@TOKEN_SCORES.register("tova")
class NewestQuery(TokenScore):
    """Attention received from the newest query, in the mean over all heads (TOVA, arXiv 2401.06104, section 3.2).

    `S_i = mean over heads of softmax(q_T K / sqrt d)_i`. Differs: tokens are dropped a flush at a time.
    """

    queries = "last"
    last = 1
    heads = "shared"
    follows = True


@TOKEN_SCORES.register("morphkv")
class StrongestOfLast(TokenScore):
    """The strongest attention from any of the last 32 queries (MorphKV, arXiv 2503.00979, section 3: its max fusion).

    `S_i = max over the last W queries t of softmax(q_t K / sqrt d)_i`. Differs: W is 200 there, logits are summed over
    a group before the softmax, and the choice is renewed at every step.
    """

    queries = "last"
    reduce = "max"
    follows = True


@TOKEN_SCORES.register("kvcrush")
class Representatives(TokenScore):
    """Tokens by attention, and a quarter of the budget for representatives of the others (KVCrush, arXiv 2503.00022).

    A token has a bit for each KV head: its attention is in the upper half. Those that attention leaves out are ordered
    by the Hamming distance of their bits to the anchor, the majority of each bit, and one of each equal stretch is
    kept. Differs: one base score, no blocks.
    """

    def importance(self, tokens: Candidates) -> Tensor:
        rank = tokens.received.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        count = rank.shape[2]
        bits = rank < count // 2
        anchor = bits.float().mean(2, keepdim=True) > 0.5
        distance = (bits != anchor).sum(1, keepdim=True).expand_as(rank)
        chosen = tokens.kept // 4
        certain = tokens.kept - chosen
        by_distance = distance.masked_fill(rank < certain, -1).argsort(dim=-1, stable=True).argsort(dim=-1) - certain
        stretch = max(1, (count - certain) // max(1, chosen))
        represents = (by_distance >= 0) & (by_distance % stretch == 0)
        return represents * (rank >= certain) * float(count) - rank.clamp(min=certain) - 2.0 * count * (rank >= certain)


@TOKEN_SCORES.register("kvzip")
class ReadAgain(TokenScore):
    """The strongest attention when the prompt is read again against itself (KVzip, arXiv 2505.23416, section 3).

    `S_i = max over the queries t of "repeat it" and the chunk that i is in of softmax(q_t K / sqrt d)_i`, over sinks,
    that chunk, and the queries' own tokens; the maximum is over the query heads of a group, too. Tokens that come after
    the prompt are scored by the strongest attention that they have received. Differs: all KV heads keep equally many.
    """

    reduce = "max"
    waits = True
