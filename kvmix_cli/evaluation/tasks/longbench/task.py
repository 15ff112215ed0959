"""LongBench and LongBench-E as tasks: every prompt is read back through the cache, every answer is scored."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ....cache.subject import Subject
from ....errors import EvaluationError
from ...base import Settings, Task
from ...bootstrap import mean_of_means
from ...results import Estimate, Metric, Record
from . import borrowed, data, prompts
from .answers import answer
from .datasets import BINS, KVMIX8, MEMBERS, MEMBERS_E, SUBSETS, Dataset, select
from .samples import Prompt, Prompts, alike, chatted, counted
from .scores import score

if TYPE_CHECKING:
    from ....models.loading import LoadedModel

AUTO_BATCH = 16
"""Prompts that `--batch-size auto` begins with; half of them, and so on, when memory is short."""

Part = tuple[str, str | None]
"""A data set, and one of its bins of lengths or all of them."""


@dataclass(frozen=True)
class LongBench(Task):
    """Records become prompts with lm-eval's texts; what is too long is cut in the middle.

    Attributes:
        members: data sets and named subsets; none of them is all of them.
        data_dir: see `data.find`.
        max_length: tokens of a prompt; None is what the model's limit leaves beside the answer.
        strict: a malformed line is an error, and not skipped.
        batch_size: prompts at a time, `auto` for as many as memory allows; only such of the same length go together.
    """

    members: tuple[str, ...] = ()
    data_dir: Path | None = None
    max_length: int | None = None
    strict: bool = False
    batch_size: int | str | None = None

    family: ClassVar[str] = "longbench"
    suffix: ClassVar[str] = ""
    known: ClassVar[Mapping[str, tuple[str, ...]]] = MEMBERS
    default_limit: ClassVar[int] = sys.maxsize

    def __post_init__(self) -> None:
        """Raises EvaluationError for an unknown member."""
        select(self.members, self.known, self.family)

    @property
    def name(self) -> str:
        return self.family + (f":{','.join(self.members)}" if self.members else "")

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """Those that were chosen."""
        return select(self.members, self.known, self.family)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Averages and single data sets, 0 to 100."""
        averages = [Metric(name, higher_is_better=True) for name in self.averages]
        return (*averages, Metric(f"{self._prefix}_change", higher_is_better=True, plans_only=True))

    @property
    def averages(self) -> dict[str, tuple[Part, ...]]:
        """The mean over which parts each metric is; every data set counts the same."""
        names = [dataset.name for dataset in self.datasets]
        found: dict[str, tuple[Part, ...]] = {self._prefix: tuple((name, None) for name in names)}
        found |= {f"{self._prefix}_{name}": parts for name, parts in self._subsets(names).items()}
        return found | {f"{self._prefix}_{dataset.key}": ((dataset.name, None),) for dataset in self.datasets}

    def options(self) -> dict[str, Any]:
        """What the numbers depend on beside the prompts themselves; neither the place of the data nor the batch."""
        return {"members": self.members, "max_length": self.max_length, "lm_eval": borrowed.version()}

    def limit(self, settings: Settings) -> int:
        """The most prompts: `--limit` is for each data set."""
        return super().limit(settings) * len(self.datasets)

    def context(self, settings: Settings) -> None:
        """A prompt is as long as it is."""

    def samples(self, loaded: LoadedModel, settings: Settings) -> Prompts:
        """Prompts of all data sets, of each the longest first, so that memory that does not suffice shows at once.

        Raises:
            EvaluationError: if data or lm-eval are missing or damaged, or a prompt cannot be made to fit.
        """
        self._check(loaded)
        files = data.find(self.data_dir)
        read = {
            dataset: data.read(files, f"{dataset.name}{self.suffix}.jsonl", dataset, self.strict)
            for dataset in self.datasets
        }
        found = Prompts()
        found.skipped = tuple(entries.notice for entries in read.values() if entries.notice)
        for dataset, entries in read.items():
            chosen = entries.found[: super().limit(settings)]
            made = [self._prompt(loaded, dataset, entry) for entry in chosen]
            found += sorted(made, key=lambda prompt: -len(prompt.ids))
        return found

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[Prompt], settings: Settings
    ) -> Iterator[Record]:
        """One record a prompt, in their order, whatever the batch."""
        auto = self.batch_size == "auto"
        size = AUTO_BATCH if auto else int(self.batch_size or 1)
        start = 0
        while start < len(samples):
            batch = alike(samples[start : start + size])
            try:
                found = self._ask(loaded, subject, batch)
            except torch.OutOfMemoryError as error:
                if not auto or len(batch) == 1:
                    raise EvaluationError(_shortage(loaded, batch)) from error
                size = len(batch) // 2
                continue
            yield from found
            start += len(batch)

    def measure(self, loaded: LoadedModel, subject: Subject, sample: Prompt, settings: Settings) -> Record:
        """Ask one question and score the answer; `tokens` are those generated."""
        return self._ask(loaded, subject, [sample])[0]

    def summarise(
        self, records: Sequence[Record], reference: Sequence[Record] | None, seed: int
    ) -> dict[str, Estimate]:
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

    def describe(self, samples: Sequence[Prompt], settings: Settings) -> str:
        """Which protocol was used, on what."""
        cut = sum(prompt.cut > 0 for prompt in samples)
        most = "the model's limit" if self.max_length is None else f"--max-length {self.max_length}"
        return (
            f"{counted(samples)}, {cut} of them cut in the middle to fit {most}; "
            f"prompts and metrics of lm-eval {borrowed.version()}; {chatted(samples)}; "
            "greedy answers, each of their tokens read out of the cache; scores 0 to 100"
        )

    def notices(self, samples: Sequence[Prompt], settings: Settings) -> tuple[str, ...]:
        """What was left out of the data."""
        return samples.skipped if isinstance(samples, Prompts) else ()

    @property
    def _prefix(self) -> str:
        """Of metrics' names."""
        return self.family.replace("-", "_")

    def _subsets(self, names: Sequence[str]) -> dict[str, tuple[Part, ...]]:
        """Averages over named parts of the data sets that were chosen."""
        complete = set(SUBSETS[KVMIX8]) <= set(names)
        return {KVMIX8: tuple((name, None) for name in SUBSETS[KVMIX8])} if complete else {}

    def _check(self, loaded: LoadedModel) -> None:
        """Raise EvaluationError for what would go wrong later."""
        for dataset in self.datasets:
            borrowed.metric(dataset.metric)
        if self.max_length is None:
            return
        if self.max_length < prompts.MIN_TOKENS:
            raise EvaluationError(f"--max-length must be at least {prompts.MIN_TOKENS}, got {self.max_length}")
        if loaded.max_length is not None and self.max_length > loaded.max_length:
            raise EvaluationError(
                f"--max-length {self.max_length} is more than the model's limit of {loaded.max_length} tokens"
            )

    def _prompt(self, loaded: LoadedModel, dataset: Dataset, entry: data.Entry) -> Prompt:
        """A record's prompt, which leaves room for the longest answer."""
        text = prompts.render(f"{dataset.name}{self.suffix}", entry)
        chat = dataset.chat and prompts.has_chat_template(loaded.tokenizer)
        room = None if loaded.max_length is None else loaded.max_length - dataset.max_new_tokens
        fitted = prompts.fit(loaded.tokenizer, text, chat=chat, most=self.max_length, room=room)
        if fitted is None:
            raise EvaluationError(
                f"{dataset.name}, line {entry.line}: no room for the prompt: the model's limit is {loaded.max_length} "
                f"tokens and an answer takes {dataset.max_new_tokens} of them; leave this data set out"
            )
        return Prompt(
            name=f"{dataset.name} {entry.line}",
            ids=fitted.ids,
            dataset=dataset,
            answers=entry.answers,
            classes=entry.classes,
            length=entry.length,
            cut=fitted.cut,
            chat=chat,
        )

    def _ask(self, loaded: LoadedModel, subject: Subject, batch: Sequence[Prompt]) -> list[Record]:
        """Records of prompts of one data set and one length."""
        dataset = batch[0].dataset
        ids = [prompt.ids for prompt in batch]
        said = answer(loaded, subject, ids, dataset.max_new_tokens, dataset.stop_at_newline)
        return [
            {
                "sample": prompt.name,
                "dataset": dataset.name,
                "length": prompt.length,
                "tokens": one.tokens,
                "prompt_tokens": len(prompt.ids),
                "cut_tokens": prompt.cut,
                "prediction": one.text,
                "score": score(dataset, one.text, prompt.answers, prompt.classes),
                "attended": one.attended,
            }
            for prompt, one in zip(batch, said, strict=True)
        ]


@dataclass(frozen=True)
class LongBenchE(LongBench):
    """LongBench-E: 13 of the data sets, with comparable amounts of data in each of three bins of lengths."""

    family: ClassVar[str] = "longbench-e"
    suffix: ClassVar[str] = "_e"
    known: ClassVar[Mapping[str, tuple[str, ...]]] = MEMBERS_E

    @property
    def averages(self) -> dict[str, tuple[Part, ...]]:
        """As in LongBench, and then again for each bin."""
        whole = super().averages
        binned = {
            f"{name}_{bin_name}": tuple((dataset, bin_name) for dataset, _ in parts)
            for name, parts in whole.items()
            for bin_name in BINS
        }
        return whole | binned

    def _subsets(self, names: Sequence[str]) -> dict[str, tuple[Part, ...]]:
        return {}


def _groups(records: Sequence[Record], numbers: Sequence[float], parts: Sequence[Part]) -> list[list[float]]:
    """The numbers of each part that has any."""
    found = (
        [
            number
            for record, number in zip(records, numbers, strict=True)
            if record["dataset"] == name and (bin_name is None or record["length"] in BINS[bin_name])
        ]
        for name, bin_name in parts
    )
    return [group for group in found if group]


def _shortage(loaded: LoadedModel, batch: Sequence[Prompt]) -> str:
    """What to do when memory is out. What was measured so far is kept, whatever comes of this row."""
    prompts_of = "a prompt" if len(batch) == 1 else f"{len(batch)} prompts"
    where = f"out of memory at {prompts_of} of {len(batch[0].ids)} tokens ({batch[0].name}) on {loaded.device}"
    resume = "free some" if len(batch) == 1 else "use a smaller --batch-size"
    return f"{where}; {resume} and go on with --resume, or use a smaller --max-length"
