"""vLLM's attention backend for layers of a plan: pages of bytes, written token by token, read by our kernels.

Imported in processes of vLLM only. It is the same on a CPU and on a GPU but for the backend of vLLM that it extends:
`kvmix_kernels.blocks` has native code for the one and Triton kernels for the other.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from kvmix_kernels.blocks import BlockLayer
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout

from ..cache.blocks import block_layer, bytes_per_token
from ..errors import PlanError
from ..plan import Plan
from .batch import EngineBatch

if current_platform.is_cpu():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as EngineBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as EngineAttention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as EngineMetadataBuilder
else:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend as EngineBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl as EngineAttention
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder as EngineMetadataBuilder

LEAST_BLOCK = 32
"""Tokens of the smallest block; the engine's are multiples of it."""
NO_WINDOW = (-1, (-1, -1))
"""How backends of vLLM write that a layer has no sliding window."""


class PlanMetadataBuilder(EngineMetadataBuilder):
    """Builder of a step's batch, once for all layers of one size."""

    _cudagraph_support = AttentionCGSupport.NEVER  # a batch depends on lengths that the host knows

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> EngineBatch:
        """Return the batch of a step from what vLLM knows of it."""
        step = common_attn_metadata
        if step.causal is not True:
            raise PlanError("an engine that holds a plan attends causally; this model does not: unset KVMIX_PLAN")
        count, pages = step.num_reqs, -(-step.max_seq_len // self.kv_cache_spec.block_size)
        starts, lengths = step.query_start_loc_cpu[: count + 1], step.seq_lens[:count]
        return EngineBatch.of(starts, lengths, step.block_table_tensor[:count, :pages], step.slot_mapping)


class PlanAttention(EngineAttention):
    """Attention of one layer over the blocks of its plan."""

    plan: ClassVar[Plan]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None or self.sliding_window not in NO_WINDOW:
            raise PlanError("an engine that holds a plan has neither ALiBi nor sliding windows: unset KVMIX_PLAN")
        self._held: BlockLayer | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: EngineBatch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the new tokens and attend to all; arguments are those of vLLM's own backends.

        Args:
            layer: vLLM's attention layer.
            query: `[n, H, D]`, of tokens of all sequences.
            key: `[n, H_kv, D]`.
            value: `[n, H_kv, D_v]`.
            kv_cache: `[N, H_kv, page, bytes]` uint8.
            attn_metadata: the batch, None for a warm-up.
            output: `[n, H, D_v]`, written to and returned.
            output_scale: of quantized outputs, which a plan does not have.
            output_block_scale: the same.
        """
        if attn_metadata is None:
            return output
        held = self._layer(layer.layer_name, kv_cache.shape[2], query)
        count = len(attn_metadata.slots)
        blocks = kv_cache.view(kv_cache.shape[0], -1)
        attn_metadata.write(held, blocks, key[:count], value[:count])
        softcap = self.logits_soft_cap or None
        attn_metadata.attend(held, blocks, query[:count], output[:count], self.scale, softcap, self.sinks)
        return output

    def _layer(self, name: str, block: int, query: Tensor) -> BlockLayer:
        """Return the storage of this rank's heads, in the query's dtype and on its device."""
        if self._held is None:
            shard = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            with torch.inference_mode(False):  # tensors that later calls keep
                index = extract_layer_index(name)
                self._held = block_layer(self.plan, index, block, query.dtype, shard, query.device)
        return self._held


def backend_of(plan: Plan, index: int, block: int | None) -> type[EngineBackend]:
    """Return the backend of a layer, one for all layers whose tokens take as many bytes.

    Args:
        plan: the plan.
        index: of the layer.
        block: tokens of a block, over which the room for a sink is spread; None for the smallest.
    """
    ranks = get_tensor_model_parallel_world_size()
    token_bytes = bytes_per_token(plan, index, block or LEAST_BLOCK, torch.get_default_dtype(), ranks)
    return _backend(plan.sha256, token_bytes, _Held(plan))


class _Held:
    """A plan as an argument that no cache compares."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)


@functools.cache
def _backend(sha256: str, token_bytes: int, held: _Held) -> type[EngineBackend]:
    name = f"KVMIX_{token_bytes}"
    attention = type(f"PlanAttention{token_bytes}", (PlanAttention,), {"plan": held.plan})

    class PlanBackend(EngineBackend):
        """Attention over layers whose tokens take `token_bytes` a KV head."""

        forward_includes_kv_cache_update: bool = True

        @staticmethod
        def get_name() -> str:
            return name

        @staticmethod
        def get_impl_cls() -> type[PlanAttention]:
            return attention

        @staticmethod
        def get_builder_cls() -> type[PlanMetadataBuilder]:
            return PlanMetadataBuilder

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
            return (KVCacheLayout.LBHNC,)  # blocks, then heads, then tokens

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(LEAST_BLOCK)]

        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            if spec.state_content_bytes is not None:
                return spec
            return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes)

    PlanBackend.__name__ = PlanBackend.__qualname__ = f"PlanBackend{token_bytes}"
    globals()[PlanBackend.__name__] = PlanBackend  # where vLLM looks it up by name
    register_backend(name, f"{__name__}.{PlanBackend.__name__}")
    return PlanBackend
