"""The probes by name. A probe is loaded when it is asked for."""

from __future__ import annotations

import importlib

from ...errors import KvmixError, did_you_mean
from ..base import Probe

_PROBES = {
    "grad-norm": "grad_norm:GradNorm",
    "taylor": "taylor:Taylor",
    "fisher": "fisher:Fisher",
    "error": "error:Error",
    "loss": "loss:Loss",
    "kl": "kl:Kl",
}


def probes() -> tuple[str, ...]:
    """The names of all probes."""
    return tuple(_PROBES)


def get_probe(name: str) -> Probe:
    """A probe by name. Raises KvmixError."""
    if name not in _PROBES:
        raise KvmixError(f"no score '{name}'{did_you_mean(name, _PROBES)}; there is {', '.join(_PROBES)}")
    module, _, attribute = _PROBES[name].partition(":")
    probe: Probe = getattr(importlib.import_module(f".{module}", __name__), attribute)()
    return probe
