"""The work that `profile`, `allocate` or `eval` would do with the same options, and about how long it takes.

Nothing is written. Times are those of a few forward passes of the model itself (`recommend.cost.ModelSpeed`), or of
one short sample; where weights are not on this machine they are not fetched for this, and no times are known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..allocation import TRANSFORM_SCORE
from ..counting import counted
from ..plan import Plan
from .measure import Prepared, Setup, SubjectNames, prepare
from .recommend.cost import FAR, NEAR, NO_WEIGHTS, QUESTIONS, ModelSpeed, PlannedStep, measure_speed, reading_step

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..allocation import AllocationOptions, Budget
    from ..evaluation.base import Settings, Task
    from ..models.loading import LoadedModel
    from ..profile import LongerSamples, Profile
    from ..profiling import ProbeOptions
    from .selection import Choice

SHORT = 384
"""Tokens of the sample that a profile's time is told from; more if a score needs more."""
PREDICTIONS = 4
"""Tensors of all predictions that a backward pass has beside each other: the logits, their logarithms, and the
gradients of both. A sample of 4,096 tokens of SmolLM2-135M takes 7.4 GiB in float32, of which they are 3.0."""
AGAIN_SECONDS = 10
"""Seconds below which that sample is measured a second time, which counts."""


@dataclass(frozen=True)
class DryRun:
    """The work that a command would do.

    Attributes:
        model: id of the model.
        steps: parts of the work.
        memory: bytes of weights, caches and activations, about; None if that is not known.
        writes: files and folders that would be written.
        basis: what the times are from.
    """

    model: str
    steps: tuple[PlannedStep, ...]
    memory: int | None
    writes: tuple[Path, ...]
    basis: str

    @property
    def seconds(self) -> float | None:
        """Return the time of all steps for which it can be told; None if for none."""
        known = [step.seconds for step in self.steps if step.seconds is not None]
        return sum(known) if known else None


def profile_work(
    model: str,
    load: Callable[[], LoadedModel],
    scores: Sequence[str],
    options: ProbeOptions,
    texts: Sequence[str],
    samples: int,
    seq_len: int,
    longer: LongerSamples | None,
    seed: int,
    writes: Sequence[Path],
) -> DryRun:
    """Return the work of a profile, told from one short sample; that of longer ones also from one twice as long.

    Raises:
        KvmixError: as `profile` does.
    """
    further = f" and {longer.samples} of {longer.seq_len}" if longer else ""
    what = f"{', '.join(scores)} on {counted(samples, 'sample')} of {seq_len} tokens{further}"
    if not _has_weights(model):
        return DryRun(model, (PlannedStep("profile", what, None),), None, tuple(writes), NO_WEIGHTS)
    from ..cache.rotary import measure_rotations
    from ..profiling import find_probes
    from ..profiling.measure import measure_sample
    from ..profiling.moments import MomentSums
    from ..texts.tokens import cut_samples
    from .coded import STEP

    loaded, probes = load(), find_probes(scores)
    grids = [grid for grid in map(options.grid, probes) if grid is not None]
    tokens = min(seq_len, max([SHORT, *(2 * grid.shortest for grid in grids)]))
    wanted = tokens if longer is None else 2 * tokens
    ids = cut_samples(loaded.tokenizer, texts, 1, wanted, seed, max_length=loaded.max_length)[0]
    twice, ids = ids, ids[:tokens]
    ropes = measure_rotations(loaded.model, loaded.info.quantizable, loaded.max_length)

    def timed(tokens: Sequence[int]) -> float:
        begun = time.perf_counter()
        measure_sample(loaded, probes, tokens, options, MomentSums(ropes, options.frame))
        return time.perf_counter() - begun

    one = timed(ids)
    if one < AGAIN_SECONDS:  # what is loaded or compiled once may be much of it
        one = timed(ids)
    timings, more = [(len(ids), one)], "longer ones in proportion"
    if len(twice) > len(ids):
        two = timed(twice)
        timings, more = [*timings, (len(twice), two)], f"one of {len(twice)} {two:.3g} s"
    seconds = samples * _extrapolated(timings, seq_len)
    if longer is not None:
        seconds += longer.samples * _extrapolated(timings, longer.seq_len)
    steps = [PlannedStep("profile", what, seconds)]
    if TRANSFORM_SCORE in scores:
        steps.append(reading_step(measure_speed(loaded, STEP), seq_len))
    basis = f"one sample of {len(ids)} tokens took {one:.3g} s; {more}"
    layers = loaded.info.layers
    longest = seq_len if longer is None else longer.seq_len
    memory = _memory(loaded, longest, caches=0, kept_layers=layers, predictions=PREDICTIONS)
    return DryRun(model, tuple(steps), memory, tuple(writes), basis)


def _extrapolated(timings: Sequence[tuple[int, float]], tokens: int) -> float:
    """Return the seconds that a sample of so many tokens takes, from the tokens and seconds of one or two shorter ones.

    They grow in proportion; with two samples, those of attention with the square of the tokens.
    """
    (few, brief), (many, lasting) = timings[0], timings[-1]
    slope = max(0.0, (lasting / many - brief / few) / (many - few)) if many > few else 0.0
    return tokens * (lasting / many + slope * (tokens - many))


def evaluation_work(
    choice: Choice, names: SubjectNames, setup: Setup, options: Mapping[str, Any], gates: Sequence[str] = ()
) -> DryRun:
    """Return the work of an evaluation. Raises KvmixError as `eval` does before it measures."""
    writes = (setup.results["root"],)
    if not _has_weights(choice.model, choice.revision):
        caches = counted(len(names.plans) + len(names.uniform) + len(names.baselines), "cache")
        what = f"{setup.tasks or 'perplexity'} with {caches}"
        return DryRun(choice.model, (PlannedStep("eval", what, None),), None, writes, NO_WEIGHTS)
    found = prepare(choice, names, setup, options, gates)
    setup.settings.check()
    for task in found.tasks:
        task.check_context(setup.settings, found.loaded.max_length)
    speed = measure_speed(found.loaded, setup.settings.step)
    steps = tuple(_task_steps(found, setup.settings, speed))
    contexts = [context.tokens for task in found.tasks if (context := task.context(setup.settings)) is not None]
    memory = _memory(found.loaded, max(contexts, default=setup.settings.length), caches=2)
    return DryRun(choice.model, steps, memory, writes, _basis(speed))


def allocation_work(profile: Profile, method: str, budget: Budget, options: AllocationOptions, path: Path) -> DryRun:
    """Return the work of an allocation, which is decided for this and not saved. Raises KvmixError as `allocate`."""
    from ..allocation import allocate

    begun = time.perf_counter()
    plan = allocate(profile, budget, method=method, **options)
    bits = f"{plan.bits.nominal:.4g} nominal, {plan.bits.stored:.4g} stored bits"
    step = PlannedStep("decide", f"{method}: {bits}", time.perf_counter() - begun)
    basis = "the plan was decided, and is not saved; no model is loaded"
    return DryRun(profile.model.id, (step,), None, (path,), basis)


def search_work(profile: Profile, load: Callable[[], LoadedModel], trials: int, samples: int, path: Path) -> DryRun:
    """Return the work of a search: the plans that it would measure."""
    seq_len = next(iter(profile.scores.values())).calibration.seq_len
    what = f"the loss of up to {counted(trials, 'plan')} on {counted(samples, 'document')} of {seq_len} tokens"
    if not _has_weights(profile.model.id, profile.model.revision):
        return DryRun(profile.model.id, (PlannedStep("search", what, None),), None, (path,), NO_WEIGHTS)
    from .search import PREFIX, STEP

    loaded = load()
    speed, start = measure_speed(loaded, STEP), int(PREFIX * seq_len)
    one = speed.prefill(start) + speed.read(start, seq_len)
    step = PlannedStep("search", what, (trials + 1) * samples * one)
    return DryRun(profile.model.id, (step,), _memory(loaded, seq_len, caches=1), (path,), _basis(speed))


def _task_steps(found: Prepared, settings: Settings, speed: ModelSpeed) -> Iterator[PlannedStep]:
    rows = len(found.subjects) + 1
    for task in found.tasks:
        context, count = task.context(settings), task.limit(settings)
        if context is None or task.timed:
            yield PlannedStep(task.name, f"with {rows} caches; its samples have lengths of their own", None)
            continue
        one = _sample_seconds(task, settings, speed, context.tokens)
        yield PlannedStep(
            task.name, f"{counted(count, 'sample')} of {context.tokens} tokens with {rows} caches", rows * count * one
        )


def _sample_seconds(task: Task, settings: Settings, speed: ModelSpeed, tokens: int) -> float:
    """Return the seconds of one sample through one cache."""
    if task.side_by_side:  # a document that is read back step by step
        return speed.read_back(min(settings.prefix, tokens), tokens)
    return speed.prefill(tokens) + speed.read(tokens, tokens + QUESTIONS)


def _memory(loaded: LoadedModel, tokens: int, *, caches: int, kept_layers: int = 1, predictions: int = 0) -> int:
    """Return the bytes of weights, of unquantized caches of so many tokens, and of activations that are kept.

    Args:
        predictions: float32 tensors of the predictions of all tokens.
    """
    from ..models.activations import activation_sizes
    from ..models.stock import FLOAT32_BYTES, stock_cache

    size = loaded.model.dtype.itemsize
    cache = Plan.uniform(loaded.info, 16, 16).unquantized_bytes(tokens, element_bytes=size)
    sizes = activation_sizes(loaded.config, stock_cache(loaded.config, loaded.info.id))
    kept = kept_layers * sizes.peak(tokens, 1, size) + predictions * tokens * sizes.vocabulary * FLOAT32_BYTES
    tensors = (*loaded.model.parameters(), *loaded.model.buffers())
    weights: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(weights.values()) + caches * cache + kept


def _has_weights(model: str, revision: str | None = None) -> bool:
    from ..models.sources import has_weights

    return has_weights(model, revision)


def _basis(speed: ModelSpeed) -> str:
    return (
        f"a few passes on this machine: behind {NEAR} and {FAR} tokens a step of {speed.step} takes "
        f"{1e3 * speed.at(NEAR):.3g} and {1e3 * speed.at(FAR):.3g} ms, a prompt {speed.prompt:.0%} of its steps"
    )
