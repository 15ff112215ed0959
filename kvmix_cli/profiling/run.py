"""Profiling a model: samples in, a profile out, able to stop and go on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models import LoadedModel
from ..profile import Calibration, LayerScore, Profile, Score, Statistic
from .base import Probe
from .calibration import Samples, cut_samples, describe
from .journal import Journal, Sample
from .registry import get_probe


def run_profile(
    loaded: LoadedModel,
    *,
    score: str = "grad-norm",
    texts: Sequence[str],
    source: str,
    samples: int = 30,
    seq_len: int = 1024,
    seed: int = 0,
    journal: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    probe: Probe | None = None,
) -> Profile:
    """Score every layer that can be quantized on calibration text.

    Args:
        score: name of the probe.
        texts: documents; `source` is how the profile names them.
        samples: of at most `seq_len` tokens each. If the text gives fewer, all of it is used, and
            `calibration.samples` of the profile says how many there were.
        journal: file of finished samples. The caller removes it once the profile is saved.
        resume: go on with the samples in the journal.
        on_step: called with the number of finished samples and of all, first at the start.
        probe: instead of the registered one, e.g. `GradNorm(checkpointing=True)`.

    Raises:
        TextError: if there is not enough text, or the model does not take `seq_len` tokens.
        ProjectionError, ModelError: if the model cannot be scored.
        DocumentError, OutputError: for a journal that does not fit or cannot be written.
    """
    probe = probe or get_probe(score)
    chosen = cut_samples(loaded, texts, samples, seq_len, seed)
    calibration = describe(chosen, source, seq_len, seed)
    record = Journal(journal, _settings(loaded, score, calibration), resume=resume)
    on_step(len(record.samples), len(chosen))
    _measure(loaded, probe, chosen, record, on_step)
    return Profile(
        model=loaded.info,
        provenance={"kvmix": __version__, "dtype": _dtype(loaded)},
        calibration=calibration,
        scores={score: _score(record.samples, loaded.info.quantizable)},
    )


def _measure(
    loaded: LoadedModel, probe: Probe, chosen: Samples, record: Journal, on_step: Callable[[int, int], None]
) -> None:
    left = chosen[len(record.samples) :]
    if not left:
        return
    with probe.prepared(loaded) as measure:
        for ids in left:
            start = time.perf_counter()
            layers = measure(torch.tensor([ids], device=loaded.device))
            record.append(Sample(time.perf_counter() - start, layers))
            on_step(len(record.samples), len(chosen))


def _settings(loaded: LoadedModel, score: str, calibration: Calibration) -> dict[str, Any]:
    """What must be the same for two parts of a run to belong together."""
    return {
        "model": loaded.info.id,
        "revision": loaded.info.revision,
        "config_sha256": loaded.info.config_sha256,
        "dtype": _dtype(loaded),
        "score": score,
        **calibration.model_dump(),
    }


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _score(samples: Sequence[Sample], layers: Sequence[int]) -> Score:
    return Score(
        seconds=sum(sample.seconds for sample in samples),
        layers={
            index: LayerScore(
                k=_statistic([sample.layers[index].k for sample in samples]),
                v=_statistic([sample.layers[index].v for sample in samples]),
            )
            for index in layers
        },
    )


def _statistic(values: Sequence[float]) -> Statistic:
    return Statistic(mean=statistics.fmean(values), std=statistics.stdev(values) if len(values) > 1 else 0.0)
