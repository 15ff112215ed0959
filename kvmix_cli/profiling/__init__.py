"""Measuring how much each layer's keys and values matter. One file a probe; see docs/add-a-probe.md.

run_profile(loaded, ["grad-norm"], texts=load_texts("builtin"), source="builtin") -> Profile
"""

from .base import CacheProbe, ChangeProbe, Probe, WeightProbe
from .change import Change
from .options import Options
from .probes import get_probe, probes
from .run import find_probes, run_profile

__all__ = [
    "CacheProbe",
    "Change",
    "ChangeProbe",
    "Options",
    "Probe",
    "WeightProbe",
    "find_probes",
    "get_probe",
    "probes",
    "run_profile",
]
