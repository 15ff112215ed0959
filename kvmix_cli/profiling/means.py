"""Means of a probe's results over all samples, which a profile keeps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..plan.tensors.codebooks import CodebooksFile
from ..plan.tensors.moments import MomentsFile
from ..profile import LayerScore, Score, TensorScore
from .identity import ScoreSettings
from .probe import MetricProbe, Probe
from .records import Sample
from .results import TensorResult

K = TypeVar("K")


def mean_score(
    probe: Probe,
    samples: Sequence[Sample],
    settings: ScoreSettings,
    moments: MomentsFile | None = None,
    codebooks: CodebooksFile | None = None,
) -> Score:
    """Return a probe's means over the samples, for the profile, with the record of the file that is its own."""
    measured = [sample[probe.name] for sample in samples]
    return Score(
        seconds=sum(each.seconds for each in measured),
        unit=probe.unit,
        calibration=settings.calibration,
        setup=settings.setup,
        moments=moments if isinstance(probe, MetricProbe) and not probe.keeps_tokens else None,
        codebooks=codebooks if isinstance(probe, MetricProbe) and probe.keeps_tokens else None,
        identity=settings.identity,
        layers={
            index: LayerScore(
                k=_mean([each.layers[index].k for each in measured]),
                v=_mean([each.layers[index].v for each in measured]),
                evict=_mean_curve([each.evict.get(index, {}) for each in measured]),
            )
            for index in measured[0].layers
        },
    )


def _mean(results: Sequence[TensorResult]) -> TensorScore:
    values = [each.value for each in results]
    return TensorScore(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
        curve=_mean_curve([each.curve for each in results]),
        heads=[statistics.fmean(head) for head in zip(*(each.heads for each in results), strict=True)] or None,
    )


def _mean_curve(curves: Sequence[Mapping[K, float]]) -> dict[K, float]:
    return {choice: statistics.fmean(curve[choice] for curve in curves) for choice in curves[0]}
