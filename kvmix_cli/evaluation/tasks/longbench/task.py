"""LongBench and LongBench-E as tasks: every prompt is read back through the cache, every answer is scored."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ....cache.subject import Subject
from ....decoding.batch import StopRule, generate_batch, run_in_batches
from ....decoding.settings import end_tokens
from ....errors import EvaluationError
from ....texts.tokens import encode
from ...base import Settings, Task
from ...bootstrap import mean_of_means
from ...records import LongBenchRecord
from ...results import Estimate, Metric
from . import data, lm_eval_parts, prompts
from .datasets import BINS, KVMIX8, MEMBERS, MEMBERS_E, SUBSETS, LongBenchDataset, select
from .prompts import LongBenchPrompt, PromptList

if TYPE_CHECKING:
    from ....models.loading import LoadedModel

AUTO_BATCH = 16
"""Prompts that `--batch-size auto` begins with; half of them, and so on, when memory is short."""

Part = tuple[str, str | None]
"""A data set, and one of its bins of lengths or all of them."""


@dataclass(frozen=True)
class LongBench(Task[LongBenchPrompt, LongBenchRecord]):
    """LongBench: questions become prompts with lm-eval's texts, and what is too long is cut in the middle.

    Attributes:
        members: data sets and named subsets; none of them is all of them.
        data_dir: see `data.open_source`.
        max_length: tokens of a prompt; None is what the model's limit leaves beside the answer.
        strict: a malformed line is an error, and not skipped.
        batch_size: prompts at a time, `auto` for as many as memory allows; only such of the same length share a batch.
    """

    members: tuple[str, ...] = ()
    data_dir: Path | None = None
    max_length: int | None = None
    strict: bool = False
    batch_size: int | str | None = None

    family: ClassVar[str] = "longbench"
    suffix: ClassVar[str] = ""
    known: ClassVar[Mapping[str, tuple[str, ...]]] = MEMBERS
    unread: ClassVar[tuple[str, ...]] = ("length", "prefix", "step", "text")
    default_limit: ClassVar[int] = sys.maxsize

    def __post_init__(self) -> None:
        """Raise EvaluationError for an unknown member."""
        select(self.members, self.known, self.family)

    @property
    def name(self) -> str:
        """See `Task.name`."""
        return self.family + (f":{','.join(self.members)}" if self.members else "")

    @property
    def datasets(self) -> tuple[LongBenchDataset, ...]:
        """Return the data sets that were chosen."""
        return select(self.members, self.known, self.family)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return averages and single data sets, 0 to 100."""
        averages = [Metric(name, higher_is_better=True) for name in self.averages]
        return (*averages, Metric(f"{self._prefix}_change", higher_is_better=True, plans_only=True))

    @property
    def averages(self) -> dict[str, tuple[Part, ...]]:
        """Return the parts over which each metric is the mean; every data set counts the same."""
        names = [dataset.name for dataset in self.datasets]
        found: dict[str, tuple[Part, ...]] = {self._prefix: tuple((name, None) for name in names)}
        found |= {f"{self._prefix}_{name}": parts for name, parts in self._subsets(names).items()}
        return found | {f"{self._prefix}_{dataset.key}": ((dataset.name, None),) for dataset in self.datasets}

    def options(self) -> dict[str, Any]:
        """Return all that the numbers depend on beside the prompts; neither the place of the data nor the batch."""
        return {"members": self.members, "max_length": self.max_length, "lm_eval": lm_eval_parts.version()}

    def limit(self, settings: Settings) -> int:
        """Return the most prompts: `--limit` is for each data set."""
        return super().limit(settings) * len(self.datasets)

    def context(self, settings: Settings) -> None:
        """Return None: a prompt is as long as it is."""

    def samples(self, loaded: LoadedModel, settings: Settings) -> PromptList:
        """Return prompts of all data sets, the longest of each first, so that a lack of memory shows at once.

        Raises:
            KvmixError: if data or lm-eval are missing or damaged, or a prompt cannot be made to fit.
        """
        self._check(loaded)
        files = self._read()
        found = PromptList()
        found.skipped = tuple(file.notice for file in files.values() if file.notice)
        for dataset, file in files.items():
            chosen = file.questions[: super().limit(settings)]
            made = [prompts.make_prompt(loaded, dataset, each, self.max_length, self.suffix) for each in chosen]
            found += sorted(made, key=lambda prompt: -len(prompt.ids))
        return found

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[LongBenchPrompt], settings: Settings
    ) -> Iterator[LongBenchRecord]:
        """Yield one record a prompt, in their order, whatever the batch."""
        auto = self.batch_size == "auto"
        size = AUTO_BATCH if auto else int(self.batch_size or 1)
        return run_in_batches(
            samples,
            partial(answer_prompts, loaded, subject),
            take=prompts.first_alike,
            size=size,
            least=1 if auto else size,
            device=loaded.device,
            too_large=partial(_too_large, loaded),
        )

    def measure(
        self, loaded: LoadedModel, subject: Subject, sample: LongBenchPrompt, settings: Settings
    ) -> LongBenchRecord:
        """Return the record of one prompt; `tokens` are those generated."""
        return answer_prompts(loaded, subject, [sample])[0]

    def summarise(
        self, records: Sequence[LongBenchRecord], reference: Sequence[LongBenchRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        """Return the averages, and the change against the reference on the same prompts."""
        scores = [record["score"] for record in records]
        metrics = {}
        for name, parts in self.averages.items():
            if groups := _groups(records, scores, parts):
                metrics[name] = mean_of_means(groups, seed)
        if reference is not None:
            change = [record["score"] - other["score"] for record, other in zip(records, reference, strict=True)]
            parts = self.averages[self._prefix]
            metrics[f"{self._prefix}_change"] = mean_of_means(_groups(records, change, parts), seed)
        return metrics

    def describe(self, samples: Sequence[LongBenchPrompt], settings: Settings) -> str:
        """Return the prompts and the protocol that was used."""
        cut = sum(prompt.cut > 0 for prompt in samples)
        most = "the model's limit" if self.max_length is None else f"--max-length {self.max_length}"
        return (
            f"{prompts.describe_prompts(samples)}, {cut} of them cut in the middle to fit {most}; "
            f"prompts and metrics of lm-eval {lm_eval_parts.version()}; {prompts.describe_chat(samples)}; "
            "greedy answers, each of their tokens read out of the cache; scores 0 to 100"
        )

    def notices(self, samples: Sequence[LongBenchPrompt], settings: Settings) -> tuple[str, ...]:
        """Return a notice for each file with lines that were skipped."""
        return samples.skipped if isinstance(samples, PromptList) else ()

    @property
    def _prefix(self) -> str:
        return self.family.replace("-", "_")

    def _subsets(self, names: Sequence[str]) -> dict[str, tuple[Part, ...]]:
        """Return averages over named parts of the data sets that were chosen."""
        complete = set(SUBSETS[KVMIX8]) <= set(names)
        return {KVMIX8: tuple((name, None) for name in SUBSETS[KVMIX8])} if complete else {}

    def _check(self, loaded: LoadedModel) -> None:
        """Raise EvaluationError for a missing package, and for a prompt length out of its range."""
        for dataset in self.datasets:
            lm_eval_parts.metric(dataset.metric)
        if self.max_length is None:
            return
        if self.max_length < prompts.MIN_TOKENS:
            raise EvaluationError(f"--max-length must be at least {prompts.MIN_TOKENS}, got {self.max_length}")
        if loaded.max_length is not None and self.max_length > loaded.max_length:
            raise EvaluationError(
                f"--max-length {self.max_length} is more than the model's limit of {loaded.max_length} tokens"
            )

    def _read(self) -> dict[LongBenchDataset, data.QuestionFile]:
        source = data.open_source(self.data_dir)
        names = {dataset: f"{dataset.name}{self.suffix}.jsonl" for dataset in self.datasets}
        data.check_names(source, list(names.values()))
        return {dataset: data.read_questions(source, name, dataset, self.strict) for dataset, name in names.items()}


@dataclass(frozen=True)
class LongBenchE(LongBench):
    """LongBench-E: 13 of the data sets, with comparable amounts of data in each of three bins of lengths."""

    family: ClassVar[str] = "longbench-e"
    suffix: ClassVar[str] = "_e"
    known: ClassVar[Mapping[str, tuple[str, ...]]] = MEMBERS_E

    @property
    def averages(self) -> dict[str, tuple[Part, ...]]:
        """Return the parts of LongBench's averages, and then of the same averages in each bin."""
        whole = super().averages
        binned = {
            f"{name}_{bin_name}": tuple((dataset, bin_name) for dataset, _ in parts)
            for name, parts in whole.items()
            for bin_name in BINS
        }
        return whole | binned

    def _subsets(self, names: Sequence[str]) -> dict[str, tuple[Part, ...]]:
        return {}


def answer_prompts(loaded: LoadedModel, subject: Subject, batch: Sequence[LongBenchPrompt]) -> list[LongBenchRecord]:
    """Return the records of prompts of one data set and one length, which share a cache.

    All of a prompt but its last token is prefilled. In a plain `generate` the prefill itself, which reads unquantized
    keys and values, would decide the first token of the answer; here it is decided by a query that read the cache.
    """
    dataset = batch[0].dataset
    ids = [prompt.ids for prompt in batch]
    found = generate_batch(loaded, subject, ids, len(ids[0]) - 1, stop_rule(loaded, dataset))
    records: list[LongBenchRecord] = []
    for prompt, tokens in zip(batch, found.tokens, strict=True):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        records.append(
            LongBenchRecord(
                sample=prompt.name,
                dataset=dataset.name,
                length=prompt.length,
                tokens=len(tokens),
                prompt_tokens=len(prompt.ids),
                cut_tokens=prompt.cut,
                prediction=text,
                score=lm_eval_parts.score(dataset, text, prompt.answers, prompt.classes),
                attended=found.attended,
            )
        )
    return records


def stop_rule(loaded: LoadedModel, dataset: LongBenchDataset) -> StopRule:
    """Return the end of an answer: the model's end tokens, and on samsum a newline, though not as the first token."""
    ends = end_tokens(loaded)
    if not dataset.stop_at_newline:
        return StopRule(dataset.max_new_tokens, tuple(ends))
    newline = encode(loaded.tokenizer, "\n")[-1:]
    return StopRule(dataset.max_new_tokens, (*ends, *newline), min_new_tokens=1)


def _groups(records: Sequence[LongBenchRecord], numbers: Sequence[float], parts: Sequence[Part]) -> list[list[float]]:
    """Return the numbers of each part that has any."""
    found = (
        [
            number
            for record, number in zip(records, numbers, strict=True)
            if record["dataset"] == name and (bin_name is None or record["length"] in BINS[bin_name])
        ]
        for name, bin_name in parts
    )
    return [group for group in found if group]


def _too_large(loaded: LoadedModel, batch: Sequence[LongBenchPrompt]) -> EvaluationError:
    """Return the error for a batch that does not fit; what was measured before it is kept."""
    prompts_of = "a prompt" if len(batch) == 1 else f"{len(batch)} prompts"
    where = f"out of memory at {prompts_of} of {len(batch[0].ids)} tokens ({batch[0].name}) on {loaded.device}"
    resume = "free some" if len(batch) == 1 else "use a smaller --batch-size"
    return EvaluationError(f"{where}; {resume} and go on with --resume, or use a smaller --max-length")
