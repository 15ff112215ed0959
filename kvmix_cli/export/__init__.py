"""Exports: plans as configuration of other engines, as far as these can express them. One file each, without torch.

TARGETS["vllm"].export(plan).text
"""

from __future__ import annotations

from ..errors import ExportError
from ..registry import Registry
from .target import Export, Target

TARGETS: Registry[Target] = Registry(
    "engine",
    ExportError,
    __name__,
    {
        "vllm": "vllm:TARGET",
        "vllm-plugin": "plugin:TARGET",
        "modelopt": "modelopt:TARGET",
        "llama.cpp": "llama_cpp:TARGET",
        "ik_llama": "llama_cpp:ENDS",
        "kvtuner": "kvtuner:TARGET",
    },
)

__all__ = ["TARGETS", "Export", "Target"]
