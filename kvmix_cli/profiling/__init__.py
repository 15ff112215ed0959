"""Profiling: measuring how much each layer's keys and values matter. One file a probe; see docs/add-a-probe.md.

run_profile(loaded, ["grad-norm"], texts=load_texts("builtin"), source="builtin") -> Profile
"""

from .change import Change
from .measure import ProbeOptions
from .probe import CacheProbe, ChangeProbe, Probe, WeightProbe
from .probes import PROBES
from .run import describe_samples, find_probes, profile_lock, run_profile

__all__ = [
    "PROBES",
    "CacheProbe",
    "Change",
    "ChangeProbe",
    "Probe",
    "ProbeOptions",
    "WeightProbe",
    "describe_samples",
    "find_probes",
    "profile_lock",
    "run_profile",
]
