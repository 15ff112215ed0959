"""The work of a recommendation that is still to be done, and about how long it takes: a few forward passes are timed.

A step of tokens behind p others takes a + b p seconds. Both are measured, through the unquantized cache and through one
of 4 bits, since half of the reading is through each. A prompt takes what its steps would, times a measured ratio. Where
documents are read back, every token's predictions are compared with the unquantized cache's, which is timed as well.

How many plans have to be measured is known only when it is done, so times are ranges: from one proof to several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ... import state
from ...counting import counted
from ...errors import PlanError
from ...plan import ModelInfo, Plan
from ..coded import DOCUMENTS, EXACT, PROMPT, REACH
from ..profiles import existing_profile
from .bench import DIVERGENCE, ModelBench, Purpose, make_task, prefix, prepare, read_purpose
from .plans import SEQ_LEN, WAYS, has_score
from .study import FIRST_DOCUMENTS

if TYPE_CHECKING:
    from ...cache.subject import Subject
    from ...evaluation.base import Task
    from ...models.loading import LoadedModel

NEAR, FAR = 256, 2048
"""Tokens in the cache before the steps that are timed."""
REPEATS = 3
BITS = 4
GRADIENTS = 4.0
"""Time of a calibration document over that of reading it once as a prompt: a forward and a backward pass, and the sums
of squares of all layers' gradients, keys and values."""
QUESTIONS = 100
"""Tokens of questions and answers behind a context, about."""
NO_WEIGHTS = "no times: the weights are not on this machine, and this does not download them"
"""What times are from, where there are none."""


class PlanCount(NamedTuple):
    """The number of plans that a part of the work is done with: at least, as a rule, and at most."""

    least: int
    usual: int
    most: int

    def __str__(self) -> str:
        return f"{self.least} to {self.most} plans"


ONE = PlanCount(1, 1, 1)
COMPARED = PlanCount(2, 4, 8)
"""Plans that are compared before one is proven: the first guess and the one below it suffice if both come out so; 8 is
the most that the search among the 17 of `plans.STORED_BITS` takes. For SmolLM2 it was 4, for `builtin:tiny` 4 to 6
(docs/recommend.md)."""
PROVEN = PlanCount(1, 2, 3)
"""Plans whose KL is measured on all documents. For SmolLM2 the first one was above the limit in the last part of the
positions, and the next one passed; for `builtin:tiny` it was one or two (docs/recommend.md). There is no bound but the
number of plans."""
ANSWERED = PlanCount(1, 1, PROVEN.most)
"""Plans that do the other tasks: only those whose KL passes."""


class PlannedStep(NamedTuple):
    """A part of the work.

    Attributes:
        seconds: about; None if that cannot be told, 0 for what is there already.
        plans: how many plans it is done with; `seconds` is of the usual number.
        each: seconds of one plan of these.
    """

    name: str
    what: str
    seconds: float | None
    plans: PlanCount = ONE
    each: float = 0.0

    @property
    def range(self) -> tuple[float, float]:
        """Return the seconds with the fewest and with the most plans; zeros if no time can be told."""
        plans, seconds = self.plans, self.seconds or 0.0
        return seconds - (plans.usual - plans.least) * self.each, seconds + (plans.most - plans.usual) * self.each


@dataclass(frozen=True)
class Forecast:
    """The work, and how long it takes.

    Attributes:
        length: tokens of the documents that KL is measured on.
        memory: bytes of weights and of the two caches that are in memory together, unquantized.
        basis: the measurement that the times are from.
    """

    model: ModelInfo
    context: int
    length: int
    steps: tuple[PlannedStep, ...]
    memory: int
    basis: str

    @property
    def seconds(self) -> float:
        """Return the time of all steps for which it can be told."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def range(self) -> tuple[float, float]:
        """Return the time of these steps with the fewest and with the most plans."""
        shortest, longest = zip(*(step.range for step in self.steps), strict=True)
        return sum(shortest), sum(longest)

    @property
    def per_proof(self) -> float:
        """Return the time of each plan that has to be proven beyond `PROVEN.most`, at most; 0 if none is known."""
        return sum(step.each for step in self.steps if step.plans.most == PROVEN.most)


@dataclass(frozen=True)
class ModelSpeed:
    """The speed of a model on this machine.

    Attributes:
        step: tokens of a step.
        base: seconds of a step with nothing before it.
        slope: seconds that each token before it adds.
        prompt: seconds of a prompt, over those of steps with the same tokens.
        compare: seconds in which the predictions of one token are compared with others.
    """

    step: int
    base: float
    slope: float
    prompt: float
    compare: float = 0.0

    def at(self, tokens: int) -> float:
        """Return the seconds of a step behind so many tokens."""
        return self.base + self.slope * tokens

    def read(self, start: int, stop: int) -> float:
        """Return the seconds of tokens from `start` to `stop`, fed step by step."""
        return (stop - start) / self.step * self.at((start + stop) // 2)

    def read_back(self, start: int, stop: int) -> float:
        """Return the seconds of a document through one cache: `start` tokens as a prompt, then compared steps."""
        return self.prefill(start) + self.read(start, stop) + (stop - start) * self.compare

    def prefill(self, tokens: int) -> float:
        """Return the seconds of a prompt."""
        return self.prompt * self.read(0, tokens)


def forecast(purpose: Purpose, load: Callable[[], LoadedModel]) -> Forecast:
    """Return the work that `recommend` would do, and about how long it takes. Nothing is written.

    Where the weights are not on this machine, they are not downloaded for this, and no times are known.

    Raises:
        KvmixError: as `recommend` does before it measures.
    """
    from ...models.sources import has_weights

    if not has_weights(purpose.model, purpose.revision):
        return _unknown(purpose)
    bench = prepare(purpose, load, None)
    speed = measure_speed(bench.loaded, purpose.step)
    size = bench.loaded.model.dtype.itemsize
    per_token, to_read = 1e3 / speed.step, f"{NEAR} and {FAR} tokens"
    return Forecast(
        model=bench.loaded.info,
        context=bench.context,
        length=bench.documents[0],
        steps=tuple(_steps(purpose, bench, speed)),
        memory=bench.weights + _caches(bench.loaded.info, bench.documents[0], size),
        basis=(
            f"a few passes on this machine: behind {to_read} a token takes {per_token * speed.at(NEAR):.3g} and "
            f"{per_token * speed.at(FAR):.3g} ms in steps of {speed.step}, as a prompt {speed.prompt:.0%} of that; "
            f"a calibration document {GRADIENTS:g} times its prompt"
        ),
    )


def _unknown(purpose: Purpose) -> Forecast:
    """Return the work on a model whose weights would have to be downloaded."""
    facts, context = read_purpose(purpose)
    steps = [PlannedStep("download", f"the weights of {purpose.model}", None)]
    steps += [PlannedStep("profile", WAYS[0].score, None), PlannedStep("compare", "KL of a few plans", None)]
    steps += [
        PlannedStep(name, f"of one plan at {context} tokens", None) for name in (DIVERGENCE, *purpose.other_tasks)
    ]
    memory = facts.weights.total + _caches(facts.info, context, facts.element_bytes)
    return Forecast(facts.info, context, context, tuple(steps), memory, NO_WEIGHTS)


def _caches(info: ModelInfo, tokens: int, element_bytes: int) -> int:
    """Return the bytes of two unquantized caches: the plan's cache takes at most as many."""
    return 2 * Plan.uniform(info, FULL_PRECISION_BITS, FULL_PRECISION_BITS).unquantized_bytes(
        tokens, element_bytes=element_bytes
    )


def _steps(purpose: Purpose, bench: ModelBench, speed: ModelSpeed) -> Iterator[PlannedStep]:
    yield from _profiling(purpose, speed, bench.loaded)
    length = bench.documents[0]
    both = 2 * speed.read_back(prefix(length), length)
    limit = purpose.limit or make_task(DIVERGENCE).default_limit
    few = min(FIRST_DOCUMENTS, limit)
    what = f"KL of {COMPARED} on {counted(few, 'document')} of {length} tokens"
    yield PlannedStep("compare", what, COMPARED.usual * few * both, COMPARED, few * both)
    what, one = f"KL of {PROVEN} on {counted(limit - few, 'more document')}", (limit - few) * both
    yield PlannedStep("prove", what, PROVEN.usual * one, PROVEN, one)
    for name in purpose.other_tasks:
        yield _proof(make_task(name), purpose, bench, speed)


def reading_step(speed: ModelSpeed, tokens: int) -> PlannedStep:
    """Return the work of reading documents of samples of `tokens` through plans of transform codes."""
    first = min(PROMPT, tokens)
    one = speed.prefill(first) + speed.read(first, REACH * tokens)
    what = f"{DOCUMENTS} documents of {REACH * tokens} tokens through caches of {len(EXACT)} plans"
    return PlannedStep("read codes", what, DOCUMENTS * (len(EXACT) + 1) * one)


def _profiling(purpose: Purpose, speed: ModelSpeed, loaded: LoadedModel) -> Iterator[PlannedStep]:
    from ...profiling import default_samples

    path, way = state.profile_path(purpose.model), WAYS[0]
    if has_score(existing_profile(path), way):
        yield PlannedStep("profile", f"{path} is there", 0.0)
        return
    samples, tokens = default_samples([way.score]), min(SEQ_LEN, loaded.max_length or SEQ_LEN)
    what = f"{way.score} on {counted(samples, 'document')} of {tokens} tokens"
    yield PlannedStep("profile", what, samples * GRADIENTS * speed.prefill(tokens))
    yield reading_step(speed, tokens)


def _proof(task: Task, purpose: Purpose, bench: ModelBench, speed: ModelSpeed) -> PlannedStep:
    context = task.context(bench.settings(purpose.limit, bench.context))
    if context is None:
        return PlannedStep(task.name, "as many prompts as the task has, or --limit", None)
    count = task.limit(bench.settings(purpose.limit, bench.context))
    one = count * (speed.prefill(bench.context) + speed.read(bench.context, bench.context + QUESTIONS))
    what = f"{counted(count, 'exercise')} of {bench.context} tokens, through the unquantized cache and {ANSWERED}"
    return PlannedStep(task.name, what, (1 + ANSWERED.usual) * one, ANSWERED, one)


def measure_speed(loaded: LoadedModel, step: int) -> ModelSpeed:
    """Return the speed of a model, from prompts and steps at two lengths."""
    from ...cache.subject import Subject

    limit = loaded.max_length or FAR + REPEATS * step
    far = max(2, min(FAR, limit - REPEATS * step))
    near = min(NEAR, far // 2)
    vocabulary = min(loaded.vocabulary, 1000)
    ids = [number % vocabulary for number in range(far + REPEATS * step)]
    times = {tokens: [0.0, 0.0] for tokens in (near, far)}
    _time(loaded, Subject(), ids, near, step)  # what is loaded or set up once is in no time
    for tokens in times:
        for subject in (Subject(), Subject("speed", _timed_plan(loaded.info))):
            prompt, one = _time(loaded, subject, ids, tokens, step)
            times[tokens][0] += prompt / 2
            times[tokens][1] += one / 2
    slope = max(0.0, (times[far][1] - times[near][1]) / (far - near))
    base = max(times[near][1] - slope * near, 1e-9)
    steps = ModelSpeed(step, base, slope, 1.0).read(0, far)
    return ModelSpeed(step, base, slope, times[far][0] / steps, _time_of_comparing(loaded, step))


def _time_of_comparing(loaded: LoadedModel, step: int) -> float:
    """Return the seconds in which the predictions of one token are compared, of a step's."""
    import torch

    from ...evaluation.alongside import divergence
    from ...models.memory import devices, synchronize

    on = devices(loaded.model)
    logits = torch.zeros(step, loaded.vocabulary, device=loaded.device)
    divergence(logits, logits)
    synchronize(on)
    start = time.perf_counter()
    divergence(logits, logits)
    synchronize(on)
    return (time.perf_counter() - start) / step


def _timed_plan(info: ModelInfo) -> Plan:
    """Return a plan of a few bits; in full precision for heads that cannot be packed."""
    try:
        return Plan.uniform(info, BITS, BITS)
    except PlanError:
        return Plan.uniform(info, FULL_PRECISION_BITS, FULL_PRECISION_BITS)


def _time(loaded: LoadedModel, subject: Subject, ids: list[int], tokens: int, step: int) -> tuple[float, float]:
    """Return the seconds of a prompt, and of the fastest of a few steps behind it."""
    import torch

    from ...decoding.feed import feed, prefill
    from ...models.memory import devices, synchronize

    cache = subject.cache(loaded.config, reserve=len(ids))
    on = devices(loaded.model)

    def seconds(work: Callable[[], object]) -> float:
        synchronize(on)
        start = time.perf_counter()
        work()
        synchronize(on)
        return time.perf_counter() - start

    with torch.inference_mode():
        prompt = seconds(lambda: prefill(loaded, cache, ids[:tokens]))
        parts = feed(loaded, cache, ids[tokens : tokens + REPEATS * step], step)
        return prompt, min(seconds(lambda: next(parts)) for _ in range(REPEATS))
