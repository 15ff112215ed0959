"""Search: plans are measured on calibration text, and the best one is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from ..allocation import TRIALS, AllocationOptions, Budget, allocate, refine
from ..errors import EvaluationError
from ..journal import Journal
from ..plan import CacheSettings, LayerPlan, Plan, TensorPlan
from ..plan.layers import AnyTensor
from ..profile import Profile

if TYPE_CHECKING:
    from ..evaluation.runner import Progress
    from ..models.loading import LoadedModel

FORMAT = "kvmix-trials/1"
STEP = 32
PREFIX = 0.25
"""Share of a document that is prefilled; the rest is scored."""


class Trial(TypedDict):
    """A measured plan: its layers as `layers_key` writes them, and its loss increase in nats per token."""

    plan: str
    loss: FiniteFloat


def search(
    profile: Profile,
    budget: Budget,
    options: AllocationOptions,
    load: Callable[[], LoadedModel],
    *,
    journal: Path | None = None,
    resume: bool = False,
    trials: int = TRIALS,
    texts: str = "builtin",
    samples: int = 4,
    progress: Progress | None = None,
) -> Plan:
    """Return the best of the plans that are measured.

    Args:
        profile: scores of the model, which decide the order of the trials.
        budget: limit that the plan must keep to.
        options: see `allocation.AllocationOptions`.
        load: function that loads the model; called once, after the budget was found to be within reach.
        journal: file of all measured losses; None keeps none.
        resume: continue with the losses that the file has.
        trials: most plans to measure.
        texts: text to measure on, as given to `--calibration`.
        samples: number of its documents.
        progress: progress bar, see `evaluation.runner.Progress`.

    Raises:
        KvmixError: if the budget cannot be met, plans cannot be measured, or the journal cannot be used.
    """
    from ..evaluation.runner import no_progress

    start = allocate(profile, budget, method="ilp", **options)
    loaded = load()
    start.check_model(loaded.info)
    seq_len = profile.score(start.provenance["score"]).calibration.seq_len
    bench = Bench(loaded, start.cache, texts, samples, seq_len, options.get("seed", 0))
    settings = {"format": FORMAT, **bench.settings}
    with (
        Journal(journal, settings, TypeAdapter(Trial), resume=resume) as record,
        (progress or no_progress)("search", trials) as step,
    ):
        measure = remembered(bench.increase, record)

        def measure_and_count(layers: Mapping[int, LayerPlan]) -> float:
            loss = measure(layers)
            step()
            return loss

        return refine(profile, budget, measure_and_count, trials=trials, **options)


def remembered(
    measure: Callable[[Mapping[int, LayerPlan]], float], record: Journal[Trial]
) -> Callable[[Mapping[int, LayerPlan]], float]:
    """Return a measurement that takes the losses of known plans from a journal and adds those of others to it."""
    losses = {trial["plan"]: trial["loss"] for trial in record.records}

    def recall(layers: Mapping[int, LayerPlan]) -> float:
        key = layers_key(layers)
        if key not in losses:
            losses[key] = measure(layers)
            record.append({"plan": key, "loss": losses[key]})
        return losses[key]

    return recall


def layers_key(layers: Mapping[int, LayerPlan]) -> str:
    """Return everything that a plan decides about its layers as one word: `0:k3v4,1:k2g128v2`."""

    def tensor(plan: AnyTensor) -> str:
        groups = plan.group_size if isinstance(plan, TensorPlan) else None
        return plan.short if groups is None else f"{plan.short}g{groups}"

    words = {layer: [kind[0] + tensor(each) for each, kind in plan.affine] for layer, plan in sorted(layers.items())}
    return ",".join(f"{layer}:{''.join(pair)}" for layer, pair in words.items())


@dataclass(frozen=True)
class Bench:
    """A model and the documents that plans are measured on.

    Args:
        loaded: the model.
        cache: settings of all plans.
        texts: text as given to `--calibration`.
        samples: number of documents.
        seq_len: tokens of a document.
        seed: seed of the choice of documents.
    """

    loaded: LoadedModel
    cache: CacheSettings
    texts: str
    samples: int
    seq_len: int
    seed: int

    @cached_property
    def documents(self) -> list[list[int]]:
        """Return the token ids of the documents, cut like those of a profile. Raises TextError."""
        from ..texts import load_texts
        from ..texts.tokens import cut_samples

        texts = load_texts(self.texts, seed=self.seed)
        limit = self.loaded.max_length
        return cut_samples(self.loaded.tokenizer, texts, self.samples, self.seq_len, self.seed, max_length=limit)

    @property
    def settings(self) -> dict[str, Any]:
        """Return everything that a loss depends on beside the plan's layers, as plain data for the journal."""
        from ..profiling import describe_samples

        calibration = describe_samples(self.documents, self.texts, self.seq_len, self.seed)
        return {
            "model": self.loaded.info.model_dump(mode="json"),
            "dtype": self.loaded.dtype,
            "cache": self.cache.model_dump(mode="json"),
            "calibration": calibration.model_dump(exclude_none=True),
            "prefix": PREFIX,
            "step": STEP,
        }

    def increase(self, layers: Mapping[int, LayerPlan]) -> float:
        """Return the increase of the mean loss per token over the unquantized cache, in nats.

        Raises:
            EvaluationError: if the loss is not finite, or no quantized token was read.
            QuantizationError: if the model's numbers cannot be quantized.
        """
        increase = self._loss(Plan.build(self.loaded.info, dict(layers), self.cache)) - self._unquantized
        if not math.isfinite(increase):
            raise EvaluationError(f"the loss on {self.texts} is not finite; try another --dtype")
        return increase

    @cached_property
    def _unquantized(self) -> float:
        return self._loss(None)

    def _loss(self, plan: Plan | None) -> float:
        """Return the mean loss per scored token, in nats."""
        from ..cache.subject import Subject, attended
        from ..decoding.feed import document_loss

        subject, loss, scored, quantized = Subject("search", plan), 0.0, 0, 0.0
        for ids in self.documents:
            cache, prefix = subject.cache(self.loaded.config, len(ids)), int(PREFIX * len(ids))
            loss += document_loss(self.loaded, cache, ids, prefix, STEP)
            scored += len(ids) - prefix - 1
            quantized += attended(cache)["quantized"]
        if plan is not None and not quantized:
            longest = max(map(len, self.documents))
            raise EvaluationError(
                f"nothing quantized was read: sink, window and page hold all of {longest} tokens; "
                "use a smaller --page and --window, or longer text"
            )
        return loss / scored
