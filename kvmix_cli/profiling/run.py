"""Profiling a model: samples in, a profile out, able to stop and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .. import journal as journals
from .._version import __version__
from ..cache.rotary import measure_rotations
from ..counting import counted
from ..errors import DocumentError, KvmixError, ModelError
from ..journal import Journal
from ..models.loading import LoadedModel
from ..plan.tensors.codebooks import CodebooksFile
from ..plan.tensors.moments import MomentsFile, write_moments
from ..profile import Calibration, LongerSamples, Profile, Score
from ..texts.tokens import Samples
from .codebooks import learn_codebooks
from .grid import Grid
from .identity import ScoreSettings, check_not_lost, identify
from .means import mean_score
from .measure import ProbeOptions, measure_sample
from .moments import MomentParts, MomentSums, remove_parts
from .probe import ChangeProbe, MetricProbe, Probe
from .probes import PROBES
from .records import Sample, journal_settings, record_form
from .samples import check_longer, choose_samples
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
    longer: LongerSamples | None = None,
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
        longer: further samples, of at most so many tokens, for probes of moments only. As many as the text has.
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
    probes, options = find_probes(scores), options or ProbeOptions()
    check_longer(probes, seq_len, longer)
    _check(loaded, probes, options, moments)
    count = default_samples(probes) if samples is None else samples
    shortest = max((grid.shortest for grid in _grids(probes, options)), default=0)
    chosen, calibration = choose_samples(loaded, texts, source, count, seq_len, longer, seed, shortest)
    loaded.check_ids(chosen)
    work = _Work(loaded, probes, options, chosen, calibration)
    outliers = share_outliers(loaded, chosen[: calibration.samples])
    check_not_lost(before or {}, work.identities)
    if not loaded.ranks.leads:
        work.measure(None, None, resume, on_step)
        return Profile.model_validate_json(loaded.ranks.agree(b""))
    profile = Profile(
        model=loaded.info,
        provenance={"kvmix": __version__, "dtype": loaded.dtype},
        scores=work.measure(journal, moments, resume, on_step),
        outliers=outliers(),
    )
    if loaded.ranks.world > 1:
        loaded.ranks.agree(profile.model_dump_json().encode())
    return profile


@dataclass(frozen=True)
class _Work:
    """The samples of a profile, and the probes that each of them is measured with.

    Attributes:
        samples: token ids.
        calibration: what the profile says of them.
    """

    loaded: LoadedModel
    probes: Sequence[Probe]
    options: ProbeOptions
    samples: Samples
    calibration: Calibration

    @cached_property
    def identities(self) -> list[ScoreSettings]:
        """Return what the numbers of each probe depend on."""
        return [identify(self.loaded, probe, self.options, self.calibration) for probe in self.probes]

    def measure(
        self, journal: Path | None, moments: Path | None, resume: bool, on_step: Callable[[int, int], None]
    ) -> dict[str, Score]:
        """Measure what the journal does not have yet, and write the moments; return the scores on the leader.

        Raises:
            DocumentError: if the journal has more samples than there are.
        """
        settings = journal_settings(self.loaded, self.probes, self.options, self.calibration)
        form = record_form(self.loaded, self.probes, self.options)
        layers, metrics = self.loaded.info.quantizable, _metrics(self.probes)
        ropes = measure_rotations(self.loaded.model, layers, self.loaded.max_length) if metrics else {}
        with Journal(journal, settings, form, resume=resume) as record:
            if journal is not None and len(record.records) > len(self.samples):
                fault = f"it has {counted(len(record.records), 'sample')}, more than {len(self.samples)}"
                raise DocumentError(str(journal), [fault])
            keeps_tokens = any(probe.keeps_tokens for probe in metrics)
            parts = MomentParts(journal, ropes, self.options.frame, keeps_tokens=keeps_tokens, resume=resume)
            self._measure_rest(record, parts, form, on_step)
            files = TensorFiles()
            if metrics and moments:
                documents = len(self.samples)
                files = _written(moments, parts.total(documents), self.loaded.info.id, documents, metrics)
        if not self.loaded.ranks.leads:
            return {}
        return {
            probe.name: mean_score(probe, record.records, identity, **files)
            for probe, identity in zip(self.probes, self.identities, strict=True)
        }

    def _measure_rest(
        self,
        record: Journal[Sample],
        parts: MomentParts,
        form: TypeAdapter[Sample],
        on_step: Callable[[int, int], None],
    ) -> None:
        """Measure the samples that are not in the journal yet; their records go there, their moments to `parts`."""
        ranks, total = self.loaded.ranks, len(self.samples)

        def measure(number: int) -> MeasuredSample:
            sums = parts.begin()
            sample = measure_sample(self.loaded, self.probes, self.samples[number], self.options, sums)
            return MeasuredSample(sample, sums)

        has_moments = bool(_metrics(self.probes))
        on_step(len(record.records), total)
        numbers = range(int(ranks.agree(str(len(record.records)).encode())), total)
        try:
            for measured in share_samples(ranks, numbers, measure, form):
                if has_moments:
                    parts.keep(len(record.records), measured.sums)
                record.append(measured.sample)
                on_step(len(record.records), total)
        except (ModelError, SystemExit):
            if not record.records:
                record.remove()  # there is nothing to resume
            raise


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
