"""Journal of a profile: what its parts must agree in, and the form of its records, one a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from ..models.loading import LoadedModel
from ..plan import HeadGeometry
from ..profile import Calibration
from .identity import curve_choices
from .measure import ProbeOptions
from .probe import CacheProbe, MetricProbe, Probe
from .results import SampleResult

FORMAT = "kvmix-journal/2"

Sample = dict[str, SampleResult]
"""The results of one sample by score."""


def journal_settings(
    loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions, calibration: Calibration
) -> dict[str, Any]:
    """Return everything that must be the same for two parts of a run to belong together, for the journal's head."""
    return {
        "format": FORMAT,
        "model": loaded.info.id,
        "revision": loaded.info.revision,
        "config_sha256": loaded.info.config_sha256,
        "dtype": loaded.dtype,
        "scores": [probe.name for probe in probes],
        "bits": options.bits,
        "group_sizes": options.group_sizes,
        "per_head": options.per_head,
        **({} if options.encode is None else {"encode": options.encode}),
        **({} if options.window is None else {"window": options.window.short}),
        **({"evict": options.evict} if options.evict else {}),
        **({"frame": options.frame} if any(isinstance(probe, MetricProbe) for probe in probes) else {}),
        **calibration.model_dump(),
    }


def record_form(loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions) -> TypeAdapter[Sample]:
    """Return the schema of a journal's record: the scores, layers, choices and heads of this very run."""
    info = loaded.info
    choices: dict[str, dict[HeadGeometry, list[list[str]]]] = {}
    for probe in probes:
        grid = options.grid(probe)
        choices[probe.name] = {
            heads: [[], []] if grid is None else curve_choices(grid, heads) for heads in info.geometries
        }
    evict = {probe.name: options.evict if isinstance(probe, CacheProbe) else () for probe in probes}
    has_heads = {probe.name: options.per_head and not isinstance(probe, CacheProbe) for probe in probes}

    def check(sample: Sample) -> Sample:
        if list(sample) != list(choices):
            raise ValueError("other scores")
        for name, result in sample.items():
            if list(result.layers) != info.quantizable:
                raise ValueError("other layers")
            for index, layer in result.layers.items():
                heads = info.heads(index)
                if [sorted(each.curve) for each in layer] != choices[name][heads]:
                    raise ValueError("other choices")
                if sorted(result.evict.get(index, ())) != sorted(evict[name]):
                    raise ValueError("other shares evicted")
                if {len(each.heads) for each in layer} != {heads.kv_heads if has_heads[name] else 0}:
                    raise ValueError("other heads")
        return sample

    return TypeAdapter(Annotated[Sample, AfterValidator(check)])
