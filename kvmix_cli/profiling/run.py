"""Profiling a model: samples in, a profile out, able to stop and go on."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import AfterValidator, TypeAdapter

from .. import journal as journals
from .._version import __version__
from ..cache.rotary import measure_rotations
from ..errors import DocumentError, KvmixError, ModelError
from ..journal import Journal
from ..models.loading import LoadedModel
from ..plan import HeadGeometry
from ..plan.moments import FRAME, MomentsFile, write_moments
from ..profile import Calibration, LayerOutliers, LayerScore, Profile, Score, ScoreSetup, TensorScore
from ..ranks import Ranks
from ..texts.tokens import cut_samples
from .grid import Grid
from .identity import ScoreSettings, check_not_lost
from .measure import KINDS, ProbeOptions, measure_sample
from .moments import MomentParts, MomentSums, remove_parts
from .outliers import measure_outliers
from .probe import CacheProbe, ChangeProbe, MetricProbe, Probe
from .probes import PROBES
from .results import SampleResult, TensorResult

FORMAT = "kvmix-journal/2"
K = TypeVar("K")

Sample = dict[str, SampleResult]
"""The results of one sample by score, a record of the journal."""
Outliers = dict[int, LayerOutliers]
"""Outliers by layer."""


def run_profile(
    loaded: LoadedModel,
    scores: Sequence[str | Probe] = ("grad-norm",),
    *,
    texts: Sequence[str],
    source: str,
    samples: int | None = None,
    seq_len: int = 1024,
    seed: int = 0,
    options: ProbeOptions | None = None,
    journal: Path | None = None,
    moments: Path | None = None,
    resume: bool = False,
    before: Mapping[str, Score] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Score every layer that can be quantized on calibration text.

    Every rank of `loaded` measures its share of the samples and returns the same profile; the leader keeps the files.

    Args:
        scores: probes, by name or as they are. They are measured together where they can be.
        texts: documents; `source` is their name in the profile.
        samples: number of samples, of at most `seq_len` tokens each; None for `default_samples`. If the text gives
            fewer, all of it is used, and `calibration.samples` of the scores says how many there were.
        journal: file of finished samples. The caller removes it with `remove_journal` once the profile is saved.
        moments: file that moments of keys and values are written to, in the folder where the profile will be; for
            `fisher-metric` only.
        resume: go on with the samples in the journal.
        before: scores that must not be replaced by ones of other settings, or of less.
        on_step: called with the number of finished samples and of all, first at the start.

    Raises:
        TextError: if there is not enough text, or the model does not take `seq_len` tokens or one of the tokens.
        ProjectionError, ModelError, QuantizationError: if the model cannot be scored.
        StateError, DocumentError, OutputError: if the journal is in use, does not fit or cannot be written.
        KvmixError: for an unknown score, an option that no score has a use for, or a score in `before` that would be
            lost.
    """
    probes, options, ranks = find_probes(scores), options or ProbeOptions(), loaded.ranks
    options.check(probes)
    if ranks.is_sharded and (whole := [each.name for each in probes if isinstance(each, ChangeProbe | MetricProbe)]):
        raise KvmixError(
            f"score {whole[0]} looks at all heads of a layer, and every rank has a part of them: leave out "
            "--tensor-parallel, or use grad-norm, loss or kl"
        )
    metrics = [probe.name for probe in probes if isinstance(probe, MetricProbe)]
    if metrics and moments is None:
        raise KvmixError(f"score {metrics[0]} measures tensors: name a file for them, moments=Path(...)")
    grids = [grid for grid in map(options.grid, probes) if grid is not None]
    for grid in grids:
        grid.check(loaded.info)
    shortest = max((grid.shortest for grid in grids), default=0)
    chosen = cut_samples(
        loaded.tokenizer,
        texts,
        default_samples(probes) if samples is None else samples,
        seq_len,
        seed,
        shortest=shortest,
        max_length=loaded.max_length,
    )
    loaded.check_ids(chosen)
    calibration = describe_samples(chosen, source, seq_len, seed)
    outliers = _measure_outliers(loaded, chosen)
    identities = [_identify(loaded, probe, options, calibration) for probe in probes]
    check_not_lost(before or {}, identities)
    settings, form = _settings(loaded, probes, options, calibration), _record_form(loaded, probes, options)
    layers = loaded.info.quantizable
    ropes = measure_rotations(loaded.model, layers, loaded.max_length) if metrics else dict.fromkeys(layers)
    if not ranks.leads:
        journal = moments = None

    def measure(number: int) -> _Measured:
        sums = MomentSums(ropes, options.frame)
        return _Measured(measure_sample(loaded, probes, chosen[number], options, sums), sums)

    with Journal(journal, settings, form, resume=resume) as record:
        if journal is not None and len(record.records) > len(chosen):
            raise DocumentError(str(journal), [f"it has {len(record.records)} samples, more than {len(chosen)}"])
        parts = MomentParts(journal, ropes, resume=resume)
        on_step(len(record.records), len(chosen))
        numbers = range(int(ranks.agree(str(len(record.records)).encode())), len(chosen))
        try:
            for measured in _in_order(ranks, numbers, measure, form):
                if metrics:
                    parts.keep(len(record.records), measured.sums)
                record.append(measured.sample)
                on_step(len(record.records), len(chosen))
        except (ModelError, SystemExit):
            if not record.records:
                record.remove()  # there is nothing to resume
            raise
        file = None
        if metrics and moments:
            file = _write_moments(moments, parts.total(len(chosen)), len(chosen), options.frame)
    if not ranks.leads:
        return Profile.model_validate_json(ranks.agree(b""))
    profile = Profile(
        model=loaded.info,
        provenance={"kvmix": __version__, "dtype": loaded.dtype},
        scores={
            probe.name: _score(probe, record.records, each, file)
            for probe, each in zip(probes, identities, strict=True)
        },
        outliers=outliers(),
    )
    if ranks.world > 1:
        ranks.agree(profile.model_dump_json().encode())
    return profile


class _Measured(NamedTuple):
    sample: Sample
    sums: MomentSums


def _in_order(
    ranks: Ranks, numbers: Sequence[int], measure: Callable[[int], _Measured], form: TypeAdapter[Sample]
) -> Iterator[_Measured]:
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
            yield _Measured(form.validate_json(line), sums)


def _measure_outliers(loaded: LoadedModel, samples: Sequence[Sequence[int]]) -> Callable[[], Outliers]:
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


def default_samples(scores: Sequence[str | Probe]) -> int:
    """Return the samples that these probes need: the most that one of them does. Raises KvmixError."""
    return max(probe.samples for probe in find_probes(scores))


def remove_journal(journal: Path) -> None:
    """Delete a journal and the parts beside it, once the profile is saved."""
    journal.unlink(missing_ok=True)
    remove_parts(journal)


@contextmanager
def profile_lock(path: Path) -> Iterator[None]:
    """Within this block keep others from measuring for, or writing, the same profile file.

    Scores are added to the profile that is there, so it must not change between reading and saving it:

        with profile_lock(path):
            before = Profile.load(path)
            result = run_profile(..., journal=...)
            result.save(path)

    Raises:
        StateError: if another process holds it.
        OutputError: if the folder cannot be written.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    held = journals.lock(path)
    try:
        yield
    finally:
        journals.release(held)
        with suppress(OSError):
            for folder in made:  # the innermost first; one with a file in it stays
                folder.rmdir()


def find_probes(scores: Sequence[str | Probe]) -> list[Probe]:
    """Return probes by name; those that are given as they are stay so. Raises KvmixError for an unknown name."""
    return [PROBES[score]() if isinstance(score, str) else score for score in scores]


def describe_samples(samples: Sequence[Sequence[int]], source: str, seq_len: int, seed: int) -> Calibration:
    """Return the record that a profile keeps of its samples, token ids."""
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return Calibration(
        source=source,
        sha256=digest.hexdigest(),
        samples=len(samples),
        seq_len=seq_len,
        seed=seed,
        tokens=sum(map(len, samples)),
    )


def _settings(
    loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions, calibration: Calibration
) -> dict[str, Any]:
    """Return everything that must be the same for two parts of a run to belong together."""
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


def _identify(loaded: LoadedModel, probe: Probe, options: ProbeOptions, calibration: Calibration) -> ScoreSettings:
    grid, info = options.grid(probe), loaded.info
    setup = ScoreSetup() if grid is None else _setup(grid)
    if isinstance(probe, MetricProbe) and options.frame != FRAME:
        setup["frame"] = options.frame
    by_heads = [] if grid is None else [_choices(grid, heads) for heads in info.geometries]
    return ScoreSettings(
        score=probe.name,
        weights=(info.revision, info.config_sha256, loaded.dtype),
        choices=[sorted({key for choices in by_heads for key in choices[place]}) for place in range(len(KINDS))],
        setup=setup,
        per_head=options.per_head and not isinstance(probe, CacheProbe),
        evict=options.evict if isinstance(probe, CacheProbe) else (),
        calibration=calibration,
    )


def _choices(grid: Grid, heads: HeadGeometry) -> list[list[str]]:
    """Return the choices of the curves of keys and of values in a layer with these heads."""
    return [sorted(grid.layouts(kind, heads.dim(kind))) for kind in KINDS]


def _record_form(loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions) -> TypeAdapter[Sample]:
    """Return the schema of a journal's record: the scores, layers, choices and heads of this very run."""
    info = loaded.info
    choices: dict[str, dict[HeadGeometry, list[list[str]]]] = {}
    for probe in probes:
        grid = options.grid(probe)
        choices[probe.name] = {heads: [[], []] if grid is None else _choices(grid, heads) for heads in info.geometries}
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


def _write_moments(path: Path, sums: MomentSums, documents: int, frame: int) -> MomentsFile:
    predictions, tokens = sums.counts
    digest = write_moments(path, sums.layers())
    return MomentsFile(
        file=path.name, sha256=digest, documents=documents, predictions=predictions, tokens=tokens, frame=frame
    )


def _score(probe: Probe, samples: Sequence[Sample], settings: ScoreSettings, moments: MomentsFile | None) -> Score:
    """Return a probe's means over the samples."""
    measured = [sample[probe.name] for sample in samples]
    return Score(
        seconds=sum(each.seconds for each in measured),
        unit=probe.unit,
        calibration=settings.calibration,
        setup=settings.setup,
        moments=moments if isinstance(probe, MetricProbe) else None,
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


def _setup(grid: Grid) -> ScoreSetup:
    cache = grid.cache
    setup: ScoreSetup = {
        "page": cache.page,
        "sink": cache.sink,
        "window": cache.window.short,
        "scale_dtype": cache.scale_dtype,
    }
    if cache.encode != "minmax":
        setup["encode"] = cache.encode
    return setup


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
