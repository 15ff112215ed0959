"""`kvmix allocate --method search`: plans are measured on calibration text, and the best one is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console, state
from ..errors import EvaluationError

if TYPE_CHECKING:
    from ..allocation import Budget, Options
    from ..models.loading import LoadedModel
    from ..plan import CacheSettings, LayerPlan, Plan
    from ..profile import Profile

STEP = 32
PREFIX = 0.25
"""Share of a document that is prefilled; the rest is scored."""


@dataclass(frozen=True)
class Effort:
    """How long to search, and on what: `samples` documents of `texts`, as given to `--calibration`."""

    trials: int
    texts: str
    samples: int
    resume: bool


def search(
    source: Profile, budget: Budget, chosen: Options, path: Path, effort: Effort, load: Mapping[str, Any]
) -> Plan:
    """The best of the plans that are measured. Their losses are kept beside `path`, for `--resume`.

    Args:
        load: options of `load_model`.

    Raises:
        KvmixError: if the budget cannot be met, or plans cannot be measured.
    """
    from ..allocation import allocate, refine
    from ..allocation.trials import Trials
    from ..files import check_writable
    from ..models.loading import load_model

    check_writable(path)
    start = allocate(source, budget, method="ilp", **chosen)  # a budget out of reach is an error before any work
    loaded = load_model(source.model.id, revision=source.model.revision, **load)
    start.check_model(loaded.info)
    seq_len = source.score(start.provenance["score"]).calibration.seq_len
    bench = Bench(loaded, start.cache, effort.texts, effort.samples, seq_len, chosen["seed"])
    recall = Trials(state.trials_path(path), bench.settings, resume=effort.resume).remembered(bench.increase)
    with console.progress("search", effort.trials) as bar:

        def measure(layers: Mapping[int, LayerPlan]) -> float:
            loss = recall(layers)
            bar()
            return loss

        try:
            return refine(source, budget, measure, trials=effort.trials, **chosen)
        except KeyboardInterrupt:
            console.alert("what was measured is kept: go on with the same command and --resume")
            raise


@dataclass(frozen=True)
class Bench:
    """A model and the documents that plans are measured on.

    Args:
        cache: settings of all plans.
        texts: as given to `--calibration`.
    """

    loaded: LoadedModel
    cache: CacheSettings
    texts: str
    samples: int
    seq_len: int
    seed: int

    @cached_property
    def documents(self) -> list[list[int]]:
        """Token ids, cut like those of a profile. Raises TextError."""
        from ..texts import load_texts
        from ..texts.tokens import cut_samples

        texts = load_texts(self.texts, seed=self.seed)
        limit = self.loaded.max_length
        return cut_samples(self.loaded.tokenizer, texts, self.samples, self.seq_len, self.seed, max_length=limit)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a measured loss depends on beside the plan's layers, as plain data."""
        from ..profiling import describe_samples

        return {
            "model": self.loaded.info.model_dump(mode="json"),
            "dtype": self.loaded.dtype,
            "cache": self.cache.model_dump(mode="json"),
            "calibration": describe_samples(self.documents, self.texts, self.seq_len, self.seed).model_dump(),
            "prefix": PREFIX,
            "step": STEP,
        }

    def increase(self, layers: Mapping[int, LayerPlan]) -> float:
        """Increase of the mean loss a token over the unquantized cache, in nats.

        Raises:
            EvaluationError: if it is not finite, or no quantized token was read.
            QuantizationError: if the model's numbers cannot be quantized.
        """
        from ..plan import Plan

        increase = self._loss(Plan.build(self.loaded.info, dict(layers), self.cache)) - self._unquantized
        if not math.isfinite(increase):
            raise EvaluationError(f"the loss on {self.texts} is not finite; try another --dtype")
        return increase

    @cached_property
    def _unquantized(self) -> float:
        return self._loss(None)

    def _loss(self, plan: Plan | None) -> float:
        """Mean loss a scored token, in nats."""
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
