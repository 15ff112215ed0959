"""Profiling a model: samples in, a profile out, able to stop and go on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..models.loading import LoadedModel
from ..profile import Calibration, LayerScore, Profile, Score, ScoreSetup, TensorScore
from .base import CacheProbe, ChangeProbe, Numbers, Probe, WeightProbe
from .calibration import cut_samples, describe
from .choices import Grid
from .journal import Journal, Sample
from .options import Options
from .probes import get_probe
from .reading import read_back
from .shared import shared_pass


def run_profile(
    loaded: LoadedModel,
    scores: Sequence[str | Probe] = ("grad-norm",),
    *,
    texts: Sequence[str],
    source: str,
    samples: int = 30,
    seq_len: int = 1024,
    seed: int = 0,
    options: Options | None = None,
    journal: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Score every layer that can be quantized on calibration text.

    Args:
        scores: probes, by name or as they are. They are measured together where they can be.
        texts: documents; `source` is how the profile names them.
        samples: of at most `seq_len` tokens each. If the text gives fewer, all of it is used, and
            `calibration.samples` of the scores says how many there were.
        journal: file of finished samples. The caller removes it once the profile is saved.
        resume: go on with the samples in the journal.
        on_step: called with the number of finished samples and of all, first at the start.

    Raises:
        TextError: if there is not enough text, or the model does not take `seq_len` tokens.
        ProjectionError, ModelError, QuantizationError: if the model cannot be scored.
        DocumentError, OutputError: for a journal that does not fit or cannot be written.
        KvmixError: for an unknown score, or an option that no score has a use for.
    """
    probes, options = find_probes(scores), options or Options()
    options.check(probes)
    grids = [grid for grid in map(options.grid, probes) if grid is not None]
    for grid in grids:
        grid.check(loaded.info.head_dim)
    shortest = max((grid.shortest for grid in grids), default=0)
    chosen = cut_samples(loaded, texts, samples, seq_len, seed, shortest)
    calibration = describe(chosen, source, seq_len, seed)
    record = Journal(journal, _settings(loaded, probes, options, calibration), resume=resume)
    on_step(len(record.samples), len(chosen))
    for ids in chosen[len(record.samples) :]:
        record.append(_measure(loaded, probes, ids, options))
        on_step(len(record.samples), len(chosen))
    return Profile(
        model=loaded.info,
        provenance={"kvmix": __version__, "dtype": loaded.dtype},
        scores={probe.name: _score(probe, record.samples, calibration, options) for probe in probes},
    )


def find_probes(scores: Sequence[str | Probe]) -> list[Probe]:
    """Probes by name. Raises KvmixError."""
    return [get_probe(score) if isinstance(score, str) else score for score in scores]


def _measure(loaded: LoadedModel, probes: Sequence[Probe], tokens: Sequence[int], options: Options) -> Sample:
    """One sample, measured by all probes."""
    ids = torch.tensor([tokens], device=loaded.device)
    sharing = [probe for probe in probes if isinstance(probe, WeightProbe | ChangeProbe)]
    found: Sample = {}
    if sharing:
        grid = next(filter(None, map(options.grid, sharing)), ChangeProbe.grid)
        found = shared_pass(loaded, sharing, ids, grid, per_head=options.per_head, checkpointing=options.checkpointing)
    for probe in probes:
        if isinstance(probe, CacheProbe):
            found[probe.name] = read_back(loaded, probe, ids, options.grid(probe) or probe.grid)
    return {probe.name: found[probe.name] for probe in probes}


def _settings(
    loaded: LoadedModel, probes: Sequence[Probe], options: Options, calibration: Calibration
) -> dict[str, Any]:
    """What must be the same for two parts of a run to belong together."""
    return {
        "model": loaded.info.id,
        "revision": loaded.info.revision,
        "config_sha256": loaded.info.config_sha256,
        "dtype": loaded.dtype,
        "scores": [probe.name for probe in probes],
        "bits": options.bits,
        "group_sizes": options.group_sizes,
        "per_head": options.per_head,
        **calibration.model_dump(),
    }


def _score(probe: Probe, samples: Sequence[Sample], calibration: Calibration, options: Options) -> Score:
    """Means over the samples."""
    measured = [sample[probe.name] for sample in samples]
    grid = options.grid(probe)
    return Score(
        seconds=sum(each.seconds for each in measured),
        unit=probe.unit,
        calibration=calibration,
        setup=ScoreSetup() if grid is None else _setup(grid),
        layers={
            index: LayerScore(
                k=_tensor([each.layers[index].k for each in measured]),
                v=_tensor([each.layers[index].v for each in measured]),
            )
            for index in measured[0].layers
        },
    )


def _setup(grid: Grid) -> ScoreSetup:
    cache = grid.cache
    return {"page": cache.page, "sink": cache.sink, "window": cache.window.short, "scale_dtype": cache.scale_dtype}


def _tensor(numbers: Sequence[Numbers]) -> TensorScore:
    values = [each.value for each in numbers]
    curves = [each.curve for each in numbers]
    return TensorScore(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
        curve={choice: statistics.fmean(curve[choice] for curve in curves) for choice in curves[0]},
        heads=[statistics.fmean(head) for head in zip(*(each.heads for each in numbers), strict=True)] or None,
    )
