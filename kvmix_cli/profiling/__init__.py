"""Measuring how much each layer's keys and values matter. One file a probe; see docs/add-a-probe.md.

run_profile(loaded, texts=load_texts("builtin"), source="builtin") -> Profile
"""

from .base import KV, Measure, Probe
from .registry import get_probe, probes
from .run import run_profile

__all__ = ["KV", "Measure", "Probe", "get_probe", "probes", "run_profile"]
