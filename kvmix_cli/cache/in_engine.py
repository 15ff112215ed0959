"""A plan as a serving engine holds it, in a transformers cache: what that costs can be measured without the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kvmix_kernels.blocks import BlockLayer, BlockTensor
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..plan import Plan
from ..plan.engine_blocks import check_blocks, stored_bits
from ..plan.tensor_files import check_bases
from .blocks import block_layer
from .mixed import CountingCache

BLOCK = 16
"""Tokens of a block, which change nothing of what is read; whole blocks are in any frame."""


class TokenwiseLayer(DynamicLayer):
    """Keys and values of one layer in full precision, of what they are after every token was stored by itself.

    A prompt attends to itself in that form as well, so that it makes no difference how an engine splits it.
    """

    def __init__(self, plan: Plan, index: int) -> None:
        super().__init__()
        self._plan, self._index = plan, index
        self._held: BlockLayer | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values and return all of them, `[B, H_kv, T, D]`."""
        if self._held is None:
            self._held = block_layer(self._plan, self._index, BLOCK, key_states.dtype)
        first = self.get_seq_length()
        keys = _stored(self._held.keys, key_states, first)
        values = _stored(self._held.values, value_states, first)
        held: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return held


def _stored(tensor: BlockTensor, states: Tensor, first: int) -> Tensor:
    """Return `[B, H_kv, S, D]` as it is read back; `first` is the position of the first token."""
    batch, _, count, _ = states.shape
    positions = torch.arange(first, first + count).repeat(batch)
    tokens: Tensor = tensor.round_trip(states.transpose(1, 2).flatten(0, 1), positions).unflatten(0, (batch, count))
    return tokens.transpose(1, 2).contiguous()


class TokenwiseCache(CountingCache):
    """A transformers cache whose layers hold what an engine with the plan would read.

    It simulates, and saves no memory.
    """

    @classmethod
    def from_plan(cls, plan: Plan) -> TokenwiseCache:
        """Return an empty cache. Raises PlanError if an engine cannot hold the plan."""
        check_blocks(plan, BLOCK)
        check_bases(plan)
        return cls(layers=[TokenwiseLayer(plan, index) for index in range(plan.model.layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all of them."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.attended.add(key_states, keys, None)
        return keys, values


@dataclass(frozen=True)
class EngineBaseline:
    """A plan as an engine holds it; see `cache.subject.Baseline`.

    Attributes:
        name: of the row.
        plan: the plan.
    """

    name: str
    plan: Plan

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the plan's checksum."""
        return {"plan_sha256": self.plan.sha256}

    @property
    def nominal_bits(self) -> float:
        """Return the bits of codes, which are the plan's."""
        return self.plan.bits.nominal

    @property
    def stored_bits(self) -> float:
        """Return the bits of an element in blocks, scales included."""
        return stored_bits(self.plan)

    def cache(self, config: PreTrainedConfig) -> TokenwiseCache:
        """Return an empty cache. Raises PlanError if an engine cannot hold the plan."""
        return TokenwiseCache.from_plan(self.plan)
