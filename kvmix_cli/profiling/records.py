"""Journal of a profile: what its parts must agree in, and the form of its records, one a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from ..models.loading import LoadedModel
from ..plan import HeadGeometry, ModelInfo
from ..profile import Calibration
from .identity import curve_choices
from .measure import ProbeOptions
from .probe import MetricProbe, Probe
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
        **calibration.model_dump(exclude_none=True),
    }


def record_form(loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions) -> TypeAdapter[Sample]:
    """Return the schema of a journal's record: the scores, layers, choices and heads of this very run."""
    forms = {probe.name: _ResultForm.of(loaded.info, probe, options) for probe in probes}

    def check(sample: Sample) -> Sample:
        if list(sample) != list(forms):
            raise ValueError("other scores")
        for name, result in sample.items():
            forms[name].check(result)
        return sample

    return TypeAdapter(Annotated[Sample, AfterValidator(check)])


@dataclass(frozen=True)
class _ResultForm:
    """Form of one probe's result for a sample in a run.

    Attributes:
        choices: of the curves of keys and of values, by the heads of a layer.
        shares: shares whose eviction is measured.
        scores_heads: whether every KV head has a score.
    """

    model: ModelInfo
    choices: dict[HeadGeometry, list[list[str]]]
    shares: list[float]
    scores_heads: bool

    @classmethod
    def of(cls, model: ModelInfo, probe: Probe, options: ProbeOptions) -> _ResultForm:
        """Return the form that a probe's results have with these options."""
        choices = {heads: curve_choices(options.grid(probe), heads) for heads in model.geometries}
        return cls(model, choices, sorted(options.shares(probe)), options.scores_heads(probe))

    def check(self, result: SampleResult) -> None:
        """Raise ValueError for a result of another run."""
        if list(result.layers) != self.model.quantizable:
            raise ValueError("other layers")
        for index, layer in result.layers.items():
            heads = self.model.heads(index)
            if [sorted(each.curve) for each in layer] != self.choices[heads]:
                raise ValueError("other choices")
            if sorted(result.evict.get(index, ())) != self.shares:
                raise ValueError("other shares evicted")
            if {len(each.heads) for each in layer} != {heads.kv_heads if self.scores_heads else 0}:
                raise ValueError("other heads")
