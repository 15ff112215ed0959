"""The probes by name. A probe is loaded when it is first used."""

from __future__ import annotations

from ...errors import KvmixError
from ...registry import Registry
from ..probe import Probe

PROBES: Registry[type[Probe]] = Registry(
    "score",
    KvmixError,
    __name__,
    {
        "grad-norm": "grad_norm:GradNorm",
        "taylor": "taylor:Taylor",
        "fisher": "fisher:Fisher",
        "fisher-metric": "fisher_metric:FisherMetric",
        "codebooks": "codebooks:CoupledChannels",
        "error": "error:Error",
        "loss": "loss:Loss",
        "kl": "kl:Kl",
    },
)
