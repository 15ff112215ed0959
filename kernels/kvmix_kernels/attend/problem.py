"""The attention problem: the one argument of every way to attend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import Coded
from ..segments import Segments
from ..sorted_tokens import SortedTokens


class QueryProblem(ABC):
    """Queries of any problem, and the number of them that share a KV head: all that some launches look at.

    Attributes:
        query: `[B, H, S, D]`.
        scaling: factor on `q·k`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sink_logits: `[H]`, one logit of a query head that enters the softmax and has no value (GPT-OSS).
    """

    query: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None

    @property
    @abstractmethod
    def kv_heads(self) -> int:
        """Number of KV heads, `H_kv`."""

    @property
    def batch(self) -> int:
        """Number of sequences, `B`."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads, `H`."""
        return self.query.shape[1]

    @property
    def ratio(self) -> int:
        """Query heads to a KV head."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """Number of queries, `S`."""
        return self.query.shape[2]


@dataclass(frozen=True, eq=False)
class AttentionProblem(QueryProblem):
    """Softmax attention of queries over keys and values; query head `h` reads KV head `h // (H / H_kv)`.

    A solution is a pair of tensors: the output `[B, H, S, D_v]` in the query's dtype, and the logarithms of the sums
    of weights `[B, H, S]`, float32 or, for float64 queries, float64. A row that may attend to nothing has output 0 and
    logarithm -inf.

    Attributes:
        query: `[B, H, S, D]`, the last `S` of the `T` cached tokens.
        key: segments of `[B, H_kv, T, D]`.
        value: segments of `[B, H_kv, T, D_v]`, in the same tiers as the keys if those are in tiers.
        scaling: factor on `q·k`.
        mask: broadcastable to `[B, H, S, T]`; boolean (True is attended) or added to the scores. None is causal.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sink_logits: `[H]`, one logit of a query head that enters the softmax and has no value (GPT-OSS).

    Raises:
        ValueError: if heads, sizes, lengths or tiers do not fit together.
    """

    query: Tensor
    key: Segments
    value: Segments
    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        query, key, value = self.query.shape, self.key.shape, self.value.shape
        if key[:3] != value[:3]:
            raise ValueError(f"keys {list(key)} and values {list(value)} differ in batch, heads or tokens")
        if query[0] != key[0] or query[1] % key[1] or query[3] != key[3]:
            raise ValueError(
                f"queries {list(query)} do not fit keys {list(key)}: expected the same batch and channels, and a"
                " multiple of the keys' heads"
            )
        if query[2] > key[2]:
            raise ValueError(f"{query[2]} queries but only {key[2]} cached tokens; expected at most one query a token")
        tiered = [isinstance(tensor.packed, SortedTokens) for tensor in (self.key, self.value)]
        if tiered[0] != tiered[1] or (tiered[0] and self.key.edges != self.value.edges):
            raise ValueError("keys and values are not in the same tiers; expected one token policy for both")

    @property
    def kv_heads(self) -> int:
        """Number of KV heads, `H_kv`."""
        return self.key.tail.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of queries and keys, `D`."""
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        """Channels of values, `D_v`."""
        return self.value.tail.shape[3]

    @property
    def is_coded(self) -> bool:
        """Return whether keys or values are transform codes, which no GPU kernel attends to."""
        return any(isinstance(tensor.packed, Coded) for tensor in (self.key, self.value))

    @property
    def is_differentiated(self) -> bool:
        """Return whether autograd must see the arithmetic, which it cannot inside a kernel."""
        if not torch.is_grad_enabled():
            return False
        return self.query.requires_grad or self.key.tail.requires_grad or self.value.tail.requires_grad
