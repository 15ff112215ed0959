"""Profiling a model: samples in, a profile out, able to stop and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .. import journal as journals
from .._version import __version__
from ..cache.rotary import measure_rotations
from ..errors import DocumentError, KvmixError, ModelError
from ..journal import Journal
from ..models.loading import LoadedModel
from ..plan.codebooks import CodebooksFile
from ..plan.moments import MomentsFile, write_moments
from ..profile import Profile, Score
from ..texts.tokens import Samples, cut_samples
from .codebooks import learn_codebooks
from .grid import Grid
from .identity import check_not_lost, describe_samples, identify
from .means import mean_score
from .measure import ProbeOptions, measure_sample
from .moments import MomentParts, MomentSums, remove_parts
from .probe import ChangeProbe, MetricProbe, Probe
from .probes import PROBES
from .records import Sample, journal_settings, record_form
from .sharing import MeasuredSample, share_outliers, share_samples


class TensorFiles(TypedDict, total=False):
    """The records of files with the tensors that probes have measured."""

    moments: MomentsFile
    codebooks: CodebooksFile


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
        moments: file that moments of keys and values are written to, in the folder where the profile will be, with
            codebooks beside them; for `fisher-metric` and `codebooks` only.
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
    _check(loaded, probes, options, moments)
    chosen = cut_samples(
        loaded.tokenizer,
        texts,
        default_samples(probes) if samples is None else samples,
        seq_len,
        seed,
        shortest=max((grid.shortest for grid in _grids(probes, options)), default=0),
        max_length=loaded.max_length,
    )
    loaded.check_ids(chosen)
    calibration = describe_samples(chosen, source, seq_len, seed)
    outliers = share_outliers(loaded, chosen)
    identities = [identify(loaded, probe, options, calibration) for probe in probes]
    check_not_lost(before or {}, identities)
    settings, form = journal_settings(loaded, probes, options, calibration), record_form(loaded, probes, options)
    layers, metrics = loaded.info.quantizable, _metrics(probes)
    ropes = measure_rotations(loaded.model, layers, loaded.max_length) if metrics else dict.fromkeys(layers)
    if not ranks.leads:
        journal = moments = None
    with Journal(journal, settings, form, resume=resume) as record:
        if journal is not None and len(record.records) > len(chosen):
            raise DocumentError(str(journal), [f"it has {len(record.records)} samples, more than {len(chosen)}"])
        keeps_tokens = any(probe.keeps_tokens for probe in metrics)
        parts = MomentParts(journal, ropes, options.frame, keeps_tokens=keeps_tokens, resume=resume)
        _measure_rest(loaded, probes, options, chosen, record, parts, form, on_step)
        files = TensorFiles()
        if metrics and moments:
            files = _written(moments, parts.total(len(chosen)), loaded.info.id, len(chosen), metrics)
    if not ranks.leads:
        return Profile.model_validate_json(ranks.agree(b""))
    profile = Profile(
        model=loaded.info,
        provenance={"kvmix": __version__, "dtype": loaded.dtype},
        scores={
            probe.name: mean_score(probe, record.records, identity, **files)
            for probe, identity in zip(probes, identities, strict=True)
        },
        outliers=outliers(),
    )
    if ranks.world > 1:
        ranks.agree(profile.model_dump_json().encode())
    return profile


def _check(loaded: LoadedModel, probes: Sequence[Probe], options: ProbeOptions, moments: Path | None) -> None:
    """Raise KvmixError for options that the probes have no use for, and for a model or call that does not fit them."""
    options.check(probes)
    whole = [probe.name for probe in probes if isinstance(probe, ChangeProbe | MetricProbe)]
    if loaded.ranks.is_sharded and whole:
        raise KvmixError(
            f"score {whole[0]} looks at all heads of a layer, and every rank has a part of them: leave out "
            "--tensor-parallel, or use grad-norm, loss or kl"
        )
    if moments is None and (metrics := _metrics(probes)):
        raise KvmixError(f"score {metrics[0].name} measures tensors: name a file for them, moments=Path(...)")
    for grid in _grids(probes, options):
        grid.check(loaded.info)


def _grids(probes: Sequence[Probe], options: ProbeOptions) -> list[Grid]:
    return [grid for grid in map(options.grid, probes) if grid is not None]


def _metrics(probes: Sequence[Probe]) -> list[MetricProbe]:
    return [probe for probe in probes if isinstance(probe, MetricProbe)]


def _measure_rest(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    options: ProbeOptions,
    samples: Samples,
    record: Journal[Sample],
    parts: MomentParts,
    form: TypeAdapter[Sample],
    on_step: Callable[[int, int], None],
) -> None:
    """Measure the samples that are not in the journal yet; their records go there, their moments to `parts`."""

    def measure(number: int) -> MeasuredSample:
        sums = parts.begin()
        return MeasuredSample(measure_sample(loaded, probes, samples[number], options, sums), sums)

    has_moments = bool(_metrics(probes))
    on_step(len(record.records), len(samples))
    numbers = range(int(loaded.ranks.agree(str(len(record.records)).encode())), len(samples))
    try:
        for measured in share_samples(loaded.ranks, numbers, measure, form):
            if has_moments:
                parts.keep(len(record.records), measured.sums)
            record.append(measured.sample)
            on_step(len(record.records), len(samples))
    except (ModelError, SystemExit):
        if not record.records:
            record.remove()  # there is nothing to resume
        raise


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


def _written(path: Path, sums: MomentSums, model: str, documents: int, probes: Sequence[MetricProbe]) -> TensorFiles:
    """Write the tensors that probes measure, and return the records of their files. Raises OutputError."""
    found = TensorFiles()
    if any(not probe.keeps_tokens for probe in probes):
        predictions, tokens = sums.counts
        found["moments"] = MomentsFile(
            file=path.name,
            sha256=write_moments(path, sums.layers()),
            documents=documents,
            predictions=predictions,
            tokens=tokens,
            frame=sums.frame,
        )
    if any(probe.keeps_tokens for probe in probes):
        beside = path.with_suffix(f".codebooks{path.suffix}")
        codebooks, tokens = learn_codebooks(sums, model)
        found["codebooks"] = CodebooksFile(file=beside.name, sha256=codebooks.save(beside), tokens=tokens)
    return found
