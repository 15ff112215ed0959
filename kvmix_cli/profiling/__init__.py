"""Profiling: measuring how much each layer's keys and values matter. One file a probe; see docs/add-a-probe.md.

run_profile(loaded, ["grad-norm"], texts=load_texts("builtin"), source="builtin") -> Profile
"""

from .change import Change
from .identity import describe_samples
from .measure import ProbeOptions
from .probe import CacheProbe, ChangeProbe, MetricProbe, Probe, WeightProbe
from .probes import PROBES
from .run import default_samples, find_probes, profile_lock, remove_journal, run_profile
from .samples import check_longer

__all__ = [
    "PROBES",
    "CacheProbe",
    "Change",
    "ChangeProbe",
    "MetricProbe",
    "Probe",
    "ProbeOptions",
    "WeightProbe",
    "check_longer",
    "default_samples",
    "describe_samples",
    "find_probes",
    "profile_lock",
    "remove_journal",
    "run_profile",
]
