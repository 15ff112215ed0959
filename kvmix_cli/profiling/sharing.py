"""Profiling on several ranks: each measures its share of the samples and sends it to the leader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pydantic import TypeAdapter

from ..models.loading import LoadedModel
from ..profile import LayerOutliers
from ..ranks import Ranks
from .moments import MomentSums
from .outliers import measure_outliers
from .records import Sample

Outliers = dict[int, LayerOutliers]
"""Outliers by layer."""


class MeasuredSample(NamedTuple):
    """Results of every score on one sample, and the sums of its moments."""

    sample: Sample
    sums: MomentSums


def share_samples(
    ranks: Ranks, numbers: Sequence[int], measure: Callable[[int], MeasuredSample], form: TypeAdapter[Sample]
) -> Iterator[MeasuredSample]:
    """Yield all samples in order to the leader. Any other rank measures its share and sends it, and is given none."""
    topic = ranks.topic()
    for number in numbers:
        if ranks.is_mine(number):
            own = measure(number)
            if ranks.leads:
                yield own
            elif not ranks.is_sharded:
                ranks.send(topic, number, form.dump_json(own.sample) + b"\n" + own.sums.encode())
        elif ranks.leads:
            line, _, tensors = ranks.receive(topic, number).partition(b"\n")
            sums = MomentSums({})
            sums.merge_encoded(tensors)
            yield MeasuredSample(form.validate_json(line), sums)


def share_outliers(loaded: LoadedModel, samples: Sequence[Sequence[int]]) -> Callable[[], Outliers]:
    """Measure the outliers of the first sample, and return the function by which the leader gets them.

    Where each rank has a copy of the model, the rank that would have the next sample measures them.
    """
    ranks, form = loaded.ranks, TypeAdapter(Outliers)
    topic = ranks.topic()
    if not ranks.is_mine(len(samples)):
        return lambda: form.validate_json(ranks.receive(topic, 0))
    found = measure_outliers(loaded, samples[0])
    if not ranks.leads and not ranks.is_sharded:
        ranks.send(topic, 0, form.dump_json(found))
    return lambda: found
